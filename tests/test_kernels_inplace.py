"""The gradient takes the place of the logits where that is asked for, and nowhere else."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import path, problem

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
OTHERWISE = {
    "it was not asked for": lambda loss, x: torch.autograd.grad(loss(x * 1, inplace=False), x),
    "the logits are a leaf": lambda loss, x: torch.autograd.grad(loss(x), x),
    "the gradient has a gradient": lambda loss, x: torch.autograd.grad(
        loss(x * 1), x, create_graph=True
    ),
    "func.grad": lambda loss, x: (torch.func.grad(lambda x: loss(x * 1))(x),),
    "vmap": lambda loss, x: (torch.func.vmap(torch.func.grad(loss), (0, None))(x, x),),
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


@pytest.mark.parametrize("how", OTHERWISE)
def test_otherwise_the_logits_stay(how, path):
    x, y, upstream = made()
    kept, seen = x.clone(), []

    def loss(z, *_, inplace=True):
        seen.append(z)
        return (upstream * ours.token_logprobs(z, y, inplace=inplace)).sum()

    if how == "vmap":
        y, upstream, one = y[0], upstream[0], upstream[0]
        assert one.shape == y.shape
    grads = OTHERWISE[how](loss, x.requires_grad_())
    assert grads[0].isfinite().all() and grads[0].abs().sum() > 0
    assert torch.equal(x.detach(), kept)
    plain = [z for z in seen if not torch._C._functorch.is_functorch_wrapped_tensor(z)]
    assert all(torch.equal(z.detach(), kept) for z in plain)


def test_logits_that_lie_on_each_other_stay(path):
    _, y, upstream = made()
    row = torch.randn(20, requires_grad=True)
    logits = (row * 1).expand(3, 4, 20)
    kept = logits.detach().clone()
    ours.token_logprobs(logits, y, inplace=True).backward(upstream)
    assert torch.equal(logits.detach(), kept)


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
