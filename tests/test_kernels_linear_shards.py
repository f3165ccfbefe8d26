"""A projection split over ranks gives every rank the numbers of the whole."""

import pytest
import rlhf_kernels as ours
import torch
import torch.distributed as dist
from cases_linear import problem
from torch import multiprocessing
from torch.autograd import forward_ad


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "func.grad": lambda loss, h: torch.func.grad(loss)(h),
    "vmap": lambda loss, h: torch.func.vmap(loss)(h),
    "jvp": lambda loss, h: torch.func.jvp(loss, (h,), (h,)),
    "forward mode": lambda loss, h: dual(loss, h),
    "the gradient of the gradient": lambda loss, h: torch.autograd.functional.hvp(loss, h, h),
}
SIZES = (5, 26, 1)  # tokens per rank, uneven; the last has one
OPTIONS = {"temperature": 0.7, "softcap": 9.0}


def inputs():
    torch.manual_seed(0)
    hidden, weight, tokens, bias = problem(3, 4, width=8, vocab=sum(SIZES), dtype=torch.float64)
    tokens[0] = torch.tensor([0, 4, 5, sum(SIZES) - 1])  # the edges of the shards
    bias = bias.clone()
    bias[10:20] += 300.0  # far above some tokens
    bias[tokens[1, 1]] += 900.0  # nearly certain
    return hidden, weight, tokens, bias, torch.randn(3, 4).double(), torch.randn(3, 4).double()


def run(rank, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    hidden, weight, tokens, bias, g, gh = inputs()
    first = sum(SIZES[:rank])
    part = slice(first, first + SIZES[rank])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[part], bias[part])]
    both = ours.vocab_parallel_token_logprobs_and_entropy(
        leaves[0], leaves[1], tokens, leaves[2], first=first, **OPTIONS
    )
    grads = torch.autograd.grad((both.logprobs * g + both.entropy * gh).sum(), leaves)
    stray = tokens.clone()
    stray[2, 2] = sum(SIZES) + 3
    lost = ours.vocab_parallel_token_logprobs_and_entropy(
        leaves[0], leaves[1], stray, leaves[2], first=first
    )
    torch.save([x.detach() for x in (*both, *grads, lost.logprobs)], f"{results}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    address = f"file://{folder}/rendezvous"
    multiprocessing.spawn(run, (address, str(folder)), nprocs=len(SIZES))
    return [torch.load(folder / str(rank)) for rank in range(len(SIZES))]


@pytest.fixture(scope="module")
def whole():
    hidden, weight, tokens, bias, g, gh = inputs()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    x = leaves[0] @ leaves[1].mT + leaves[2]
    both = ours.token_logprobs_and_entropy(x, tokens, **OPTIONS)
    grads = torch.autograd.grad((both.logprobs * g + both.entropy * gh).sum(), leaves)
    return *(out.detach() for out in both), *grads


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_every_rank_has_the_log_probs_and_the_entropy_of_the_whole(ranks, whole):
    for rank in ranks:
        torch.testing.assert_close(rank[0], whole[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(rank[1], whole[1], rtol=1e-9, atol=1e-9)


def test_every_rank_has_the_whole_gradient_of_hidden_and_its_own_of_the_weight(ranks, whole):
    for rank in ranks:
        torch.testing.assert_close(rank[2], whole[2])
    for i in (3, 4):
        torch.testing.assert_close(torch.cat([rank[i] for rank in ranks]), whole[i])


def test_a_token_that_no_rank_has_makes_its_row_no_number(ranks):
    for rank in ranks:
        assert rank[5].isnan().nonzero().tolist() == [[2, 2]]


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_that_cannot_see_what_ranks_exchange_is_refused(name, alone):
    hidden, weight, tokens, *_ = inputs()
    with pytest.raises(NotImplementedError, match="by backward.. alone"):
        TRANSFORMS[name](
            lambda h: ours.vocab_parallel_token_logprobs_and_entropy(
                h, weight, tokens[0], first=0
            ).entropy.sum(),
            hidden[0] if name != "vmap" else hidden,
        )
