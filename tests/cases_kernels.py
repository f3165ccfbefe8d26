"""What the tests of the kernels share: the functions, their float64 oracle, and the ways to run."""

import pytest
import rlhf_kernels as ours
import torch
from rlhf_kernels import rows

import rlhf_fn

SMALL = 16  # tokens per block where a test wants several blocks, slabs and a ragged end


def small_blocks(number, vocab):
    return rows.Plan(SMALL, 3 * SMALL, -(-vocab // (3 * SMALL)), 4)


def differences(f, leaves, path, **more):
    """gradcheck and gradgradcheck; under the interpreter, where each is a launch, of one direction.

    (`fast_mode`: of uᵀJv for drawn u and v, not of every entry of J.)
    """
    fast = path == "interpreter"
    torch.autograd.gradcheck(f, leaves, check_batched_grad=True, fast_mode=fast, **more)
    torch.autograd.gradgradcheck(f, leaves, fast_mode=fast)


@pytest.fixture(params=["interpreter", "cpu"])
def path(request, monkeypatch):
    """How a kernel runs where there is no GPU: interpreted, in small blocks, or by its own path."""
    if request.param == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setattr(rows, "plan", small_blocks)
    return request.param


# name -> (the kernels' function of (logits, ref_logits, tokens), which of the oracle's it returns)
FUNCTIONS = {
    "token_logprobs": (lambda x, q, y, **k: (ours.token_logprobs(x, y, **k),), [0]),
    "entropy": (lambda x, q, y, **k: (ours.entropy(x, **k),), [1]),
    "full_kl": (lambda x, q, y, **k: (ours.full_kl(x, q, **k),), [2]),
    "token_logprobs_and_entropy": (
        lambda x, q, y, **k: tuple(ours.token_logprobs_and_entropy(x, y, **k)),
        [0, 1],
    ),
    "token_logprobs_and_kl": (
        lambda x, q, y, **k: tuple(ours.token_logprobs_and_kl(x, q, y, **k)),
        [0, 1, 2],
    ),
}


def tempered(x, temperature, softcap):
    x = x if softcap is None else torch.where(x == -torch.inf, x, softcap * (x / softcap).tanh())
    return x / temperature


def eager(x, q, y, temperature=1.0, softcap=None):
    """(log π, H, KL) by floor 0, in the dtype that floor 0 computes in."""
    x, q = (tempered(each.to(x.dtype), temperature, softcap) for each in (x, q))
    return rlhf_fn.token_logprobs(x, y.long()), rlhf_fn.entropy(x), rlhf_fn.full_kl(x, q)


def oracle(x, q, y, temperature=1.0, softcap=None):
    """(log π, H, KL) in float64, log π exact however close π is to 1."""
    x, q = x.double(), q.double()
    _, entropy, kl = eager(x, q, y, temperature, softcap)
    z, chosen = tempered(x, temperature, softcap), y.long()[..., None]
    u = torch.where(z == -torch.inf, -torch.inf, z - z.gather(-1, chosen))  # ∞ over a banned token
    others = u.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    return -torch.logaddexp(others, torch.zeros_like(others)), entropy, kl


def problem(shape, vocab, dtype=torch.float32, scale=3.0):
    """Logits, reference logits near them, and tokens: some likely, some confident, some far off."""
    x = scale * torch.randn(*shape, vocab)
    q = x + torch.randn(*shape, vocab)
    y = torch.randint(0, vocab, shape)
    push = torch.tensor([0.0, 25.0, -60.0])[torch.arange(y.numel()) % 3].reshape(*shape, 1)
    x = x.scatter_add(-1, y[..., None], push)
    return x.to(dtype), q.to(dtype), y


def gradients(function, x, q, y, upstream, **options):
    """The gradients in logits and in reference logits of a mixture of the outputs."""
    x, q = x.detach().requires_grad_(), q.detach().requires_grad_()
    outputs = function(x, q, y, **options)
    total = sum((w.to(out.dtype) * out).sum() for w, out in zip(upstream, outputs))
    return torch.autograd.grad(total, (x, q), materialize_grads=True, allow_unused=True)
