"""What the tests of the fused projection share: problems, the float64 truth, and ways to run."""

import pytest
import torch
from cases_kernels import eager, oracle
from rlhf_kernels import linear, linear_cpu
from rlhf_kernels import linear_tiles as tiles


@pytest.fixture(params=["interpreter", "cpu"])
def path(request, monkeypatch):
    """How a projection runs without a GPU: interpreted, or by its own path; in small parts."""
    if request.param == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(linear_cpu, "ELEMENTS", 600)
    else:
        monkeypatch.setattr(tiles, "plan", lambda *_, **__: tiles.Plan(16, 16, 16, 4, 2))
        monkeypatch.setattr(tiles, "slabs", lambda blocks, tiles: min(tiles, 3))
    monkeypatch.setattr(tiles, "LEAST", 16)
    return request.param


KEPT, AGAIN = 2**28, 0  # bytes; 0 stands for the least there may be


def least(hidden, weight):
    """Memory for one part of the vocabulary: the logits are computed again."""
    rows = hidden[..., 0].numel()
    return rows * min(len(weight), tiles.LEAST) * hidden.element_size()


def bytes_of(memory, hidden, weight):
    return memory or least(hidden, weight)


# name -> (function of (hidden, weight, tokens, bias), which of the oracle's outputs it returns)
FUNCTIONS = {
    "log π": (lambda *args, **k: (linear.linear_token_logprobs(*args, **k),), [0]),
    "log π, H": (
        lambda *args, **k: tuple(linear.linear_token_logprobs_and_entropy(*args, **k)),
        [0, 1],
    ),
}


def of_logits(statistics, which):
    """A function of logits as one of (hidden, weight, tokens, bias)."""

    def function(hidden, weight, tokens, bias=None, **options):
        x = hidden @ weight.mT
        x = x if bias is None else x + bias
        x = x if x.dtype == torch.float64 else x.float()
        outputs = statistics(x, x, tokens, **options)
        return tuple(outputs[i] for i in which)

    return function


def plain(which):
    """Floor 0, in the dtype of its arguments."""
    return of_logits(eager, which)


def exact(which):
    """In float64."""
    return of_logits(oracle, which)


def wide(*args):
    """The arguments in float64."""
    return tuple(x.double() if x.is_floating_point() else x for x in args)


def problem(*shape, width=24, vocab=50, dtype=torch.float32, scale=3.0):
    """(hidden, weight, tokens, bias): some tokens likely, some nearly certain, some far off."""
    hidden, weight = torch.randn(*shape, width), scale * torch.randn(vocab, width) / width**0.5
    tokens, bias = torch.randint(0, vocab, shape), torch.randn(vocab)
    chosen = weight[tokens]
    push = torch.tensor([0.0, 25.0, -60.0])[torch.arange(tokens.numel()) % 3].reshape(*shape, 1)
    hidden = hidden + push * chosen / chosen.square().sum(-1, keepdim=True).clamp(min=1e-3)
    return hidden.to(dtype), weight.to(dtype), tokens, bias.to(dtype)


def gradients(function, hidden, weight, tokens, bias, upstream, **options):
    """The outputs of `function`, and the gradients of a mixture of them."""
    given = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    outputs = function(given[0], given[1], tokens, given[2], **options)
    total = sum((g.to(out.dtype) * out).sum() for g, out in zip(upstream, outputs))
    return [out.detach() for out in outputs], torch.autograd.grad(total, given)
