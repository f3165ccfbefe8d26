"""The gradient takes the place of the logits where that is asked for, and nowhere else."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import path, problem
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import grad
from torch.func import vmap

__all__ = ["path"]  # a fixture

FUNCTIONS = {
    "token_logprobs": lambda x, y, **k: ours.token_logprobs(x, y, **k),
    "token_logprobs_and_entropy": lambda x, y, **k: sum(
        ours.token_logprobs_and_entropy(x, y, **k), start=torch.zeros(())
    ),
}
# what a model returned -> the logits that a loss looks at
VIEWS = {
    "whole": lambda x: x,
    "all but the last of each row": lambda x: x[:, :-1],
    "one row": lambda x: x[0],
    "transposed": lambda x: x.transpose(0, 1),
}


class Subclass(torch.Tensor):
    """What a compiler traces, for one, is of a class of its own."""


# why the logits stay, each for one reason -> (log π, x) -> the gradient in x
OTHERWISE = {
    "it was not asked for": lambda f, x: grad(f(x * 1, inplace=False).sum(), x),
    "they are a leaf": lambda f, x: grad(f(x).sum(), x),
    "they lie on each other": lambda f, x: grad(f((x[:1, :1] * 1).expand_as(x)).sum(), x),
    "they are of a subclass": lambda f, x: grad(f((x * 1).as_subclass(Subclass)).sum(), x),
    "the gradient has a gradient": lambda f, x: grad(f(x * 1).sum(), x, create_graph=True),
    "it is inside of a transform": lambda f, x: vmap(
        lambda scale: scale * grad(f(x * 1).sum(), x)[0]
    )(torch.ones(1)),
    "upstream gradients are batched": lambda f, x: grad(
        f(x * 1), x, torch.ones(2, 3, 4), is_grads_batched=True
    ),
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x * 1).sum())(x),
}


def made(shape=(3, 4), vocab=20):
    """(logits that no model made, tokens, upstream gradients with a row of zeros)."""
    torch.manual_seed(0)
    x, _, y = problem(shape, vocab)
    upstream = torch.randn(shape)
    upstream.view(-1)[1] = 0.0
    return x, y, upstream


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk", [1, 45, 10**9])
def test_the_gradient_is_the_same_and_lies_where_the_logits_lay(
    name, view, chunk, path, monkeypatch
):
    monkeypatch.setattr("rlhf_kernels.cpu.OVERWRITTEN", chunk)
    x, y, upstream = made()
    y, upstream = VIEWS[view](y), VIEWS[view](upstream)
    grads, seen = [], []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = VIEWS[view](leaf * 1)
        logits.register_hook(seen.append)
        out = FUNCTIONS[name](logits, y, temperature=0.7, softcap=9.0, inplace=inplace)
        out.backward(upstream)
        grads.append(leaf.grad)
    assert seen[0].data_ptr() != seen[1].data_ptr() == logits.data_ptr()
    assert seen[1].stride() == logits.stride()
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_whoever_else_needs_the_logits_is_told_that_they_are_gone(path):
    x, y, upstream = made()
    logits = x.requires_grad_() * 1
    other = logits.logsumexp(-1)  # the older of two is the last to go backward
    total = upstream * ours.token_logprobs(logits, y, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


@pytest.mark.parametrize("why", OTHERWISE)
def test_otherwise_the_logits_stay(why, path):
    x, y, _ = made()
    seen = []

    def logprobs(logits, inplace=True):
        plain = get_unwrapped(logits) if is_functorch_wrapped_tensor(logits) else logits.detach()
        seen.append((plain, plain.clone()))
        return ours.token_logprobs(logits, y, inplace=inplace)

    gradient, *_ = OTHERWISE[why](logprobs, x.requires_grad_())
    assert gradient.any()
    (kept,) = seen
    assert torch.equal(*kept)


@pytest.mark.compile
def test_a_compiled_graph_is_right_whether_asked_or_not(path):
    x, y, upstream = made()

    def loss(x, inplace):
        logits = x * 2
        return (upstream * ours.token_logprobs(logits, y, inplace=inplace)).sum()

    torch._dynamo.reset()
    expected = torch.func.grad(loss)(x, False)
    got = torch.compile(loss, fullgraph=True)(x.requires_grad_(), True)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], expected)
