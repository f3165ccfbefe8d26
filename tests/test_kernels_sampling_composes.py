"""`sample` and `greedy` under vmap, compile and autograd, and the bad input that they refuse."""

import pytest
import rlhf_kernels as ours
import torch
from cases_sampling import cpu, keys_for, path, problem
from torch.func import grad, jvp, vmap
from torch.library import opcheck

__all__ = ["cpu", "path"]  # fixtures

SUPPORTS = [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.7}]


def assert_same(got, expected):
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.logprobs, expected.logprobs)


def loop(function, *stacked):
    return ours.Sample(*map(torch.stack, zip(*map(function, *stacked))))


@pytest.mark.parametrize("support", [{}, {"top_k": 5, "top_p": 0.7}], ids=str)
def test_vmap_is_a_loop(support, path):
    x, keys = problem(3, 2, 18)
    taus = torch.tensor([0.5, 1.0, 2.0])

    def both(x, keys, tau):
        return ours.sample(x, keys, temperature=tau, **support)

    assert_same(vmap(both)(x, keys, taus), loop(both, x, keys, taus))
    assert_same(vmap(vmap(both), (1, 1, None))(x, keys, taus[:3]), vmap(both, (1, 1, None))(
        x, keys, taus[:, None]
    ))  # fmt: skip


def test_vmap_of_one_argument_shares_the_others(path):
    x, keys = problem(2, 18), keys_for(3, 2)
    x = x[0]
    of_keys = vmap(lambda k: ours.sample(x, k, temperature=1.0))
    assert_same(of_keys(keys), loop(lambda k: ours.sample(x, k, temperature=1.0), keys))
    of_logits = vmap(lambda z: ours.sample(z, keys[0, 0], temperature=1.0))
    assert_same(of_logits(x), loop(lambda z: ours.sample(z, keys[0, 0], temperature=1.0), x))
    assert_same(vmap(ours.greedy, 1)(x[:, None]), ours.greedy(x[None]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_is_one_graph_equal_to_eager(backend, path):
    x, keys = problem(2, 18)

    def step(x, keys, tau):
        drawn = ours.sample(2 * x, keys, temperature=tau, top_k=7, top_p=0.9)
        return drawn, ours.greedy(2 * x, temperature=0.7)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for number in (2, 1):
        args = x[:number], keys[:number], torch.tensor(0.8)
        for got, expected in zip(compiled(*args), step(*args)):
            assert_same(got, expected)


def test_the_operators_pass_torch_s_own_checks(path):
    x, keys = problem(2, 18)
    scale = torch.ones(2)
    ops = torch.ops.rlhf_kernels
    for top_k, top_p in ((0, 1.0), (5, 0.7)):
        opcheck(ops.sample.default, (x, keys, scale, 0.0, top_k, top_p))
    opcheck(ops.sample.default, (x.bfloat16(), keys, None, 5.0, 0, 1.0))
    opcheck(ops.greedy.default, (x, scale, 0.0))


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_nothing_is_differentiable(support, cpu):
    x, keys = problem(2, 18)
    tau = torch.tensor(0.7, requires_grad=True)
    for each in (
        ours.sample(x.requires_grad_(), keys, temperature=tau, **support),
        ours.greedy(x.requires_grad_(), temperature=tau),
    ):
        assert not each.tokens.requires_grad and not each.logprobs.requires_grad
    x = x.detach()

    def total(x):
        drawn = ours.sample(x, keys, temperature=1.0, **support)
        return drawn.logprobs.sum() + ours.greedy(x).logprobs.sum()

    assert not grad(total)(x).any()
    assert not jvp(total, (x,), (x,))[1].any()


def test_arguments_are_not_written_to(path):
    x, keys = problem(2, 18)
    before = x.clone(), keys.clone()
    for support in SUPPORTS:
        ours.sample(x, keys, temperature=0.5, **support)
    ours.greedy(x, temperature=0.5)
    assert torch.equal(x, before[0]) and torch.equal(keys, before[1])


def test_a_draw_is_the_same_twice(path):
    x, keys = problem(2, 33)
    for support in SUPPORTS:
        once, again = (ours.sample(x, keys, temperature=1.0, **support) for _ in range(2))
        assert_same(once, again)


def test_the_words_of_a_key_are_32_bits(path):
    """What is above them is not read, as in floor 0."""
    x, keys = problem(2, 33)
    assert_same(
        ours.sample(x, keys + (1 << 32), temperature=1.0), ours.sample(x, keys, temperature=1.0)
    )


X, KEYS = torch.zeros(2, 9), torch.zeros(2, 2, dtype=torch.int64)
BAD = {
    "temperature 0": (X, KEYS, {"temperature": 0.0}, ValueError, "temperature"),
    "temperature below 0": (X, KEYS, {"temperature": -1.0}, ValueError, "temperature"),
    "temperature inf": (X, KEYS, {"temperature": float("inf")}, ValueError, "temperature"),
    "temperature of the batch": (X, KEYS, {"temperature": torch.ones(2)}, ValueError, "temperat"),
    "top_k 0": (X, KEYS, {"top_k": 0}, ValueError, "top_k"),
    "top_k below 0": (X, KEYS, {"top_k": -3}, ValueError, "top_k"),
    "top_k a float": (X, KEYS, {"top_k": 5.0}, TypeError, "top_k"),
    "top_k a bool": (X, KEYS, {"top_k": True}, TypeError, "top_k"),
    "top_p 0": (X, KEYS, {"top_p": 0.0}, ValueError, "top_p"),
    "top_p above 1": (X, KEYS, {"top_p": 1.5}, ValueError, "top_p"),
    "top_p nan": (X, KEYS, {"top_p": float("nan")}, ValueError, "top_p"),
    "softcap 0": (X, KEYS, {"softcap": 0.0}, ValueError, "softcap"),
    "keys int32": (X, KEYS.int(), {}, TypeError, "keys"),
    "keys float": (X, KEYS.float(), {}, TypeError, "keys"),
    "one key": (X, KEYS[0], {}, ValueError, "keys"),
    "too many keys": (X, KEYS.repeat(2, 1), {}, ValueError, "keys"),
    "keys elsewhere": (X, KEYS.to("meta"), {}, ValueError, "keys"),
    "logits of integers": (X.long(), KEYS, {}, TypeError, "logits"),
    "no vocabulary": (X[:, :0], KEYS, {}, ValueError, "logits"),
    "a number": (X[0, 0], KEYS, {}, ValueError, "logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    x, keys, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        ours.sample(x, keys, **{"temperature": 1.0} | options)
    if keys is KEYS and options.keys() <= {"temperature", "softcap"}:
        with pytest.raises(error, match=match):
            ours.greedy(x, **options)
