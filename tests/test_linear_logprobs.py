"""`linear_token_logprobs` is `token_logprobs` of a linear layer, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_fn.linear import linear_token_logprobs
from rlhf_fn.logprobs import token_logprobs

VOCAB, WIDTH = 11, 4


def inputs(*shape, vocab=VOCAB, width=WIDTH, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, dtype=dtype) for s in ((*shape, width), (vocab, width), (vocab,))
    )
    return hidden, weight, bias, torch.randint(0, vocab, shape)


def fused(hidden, weight, bias, tokens, chunk=3):
    return linear_token_logprobs(hidden, weight, tokens, bias, temperature=0.7, chunk=chunk)


def plain(hidden, weight, bias, tokens):
    return token_logprobs(hidden @ weight.mT + bias, tokens, temperature=0.7)


def uneven(f):
    """One number, to which every token contributes differently."""

    def total(*args):
        out = f(*args)
        return (out * torch.arange(1, out.numel() + 1).reshape(out.shape)).sum()

    return total


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 13), st.integers(1, 15), st.booleans()
)
def test_it_is_token_logprobs_whatever_the_chunk_with_the_same_gradients(shape, vocab, chunk, bare):
    hidden, weight, bias, tokens = inputs(*shape, vocab=vocab)
    bias = torch.zeros_like(bias) if bare else bias

    def chunked(hidden, weight, bias, tokens):
        return linear_token_logprobs(
            hidden, weight, tokens, None if bare else bias, temperature=0.7, chunk=chunk
        )

    torch.testing.assert_close(
        chunked(hidden, weight, bias, tokens), plain(hidden, weight, bias, tokens)
    )
    wrt = (0, 1) if bare else (0, 1, 2)
    slopes = [grad(uneven(f), wrt)(hidden, weight, bias, tokens) for f in (chunked, plain)]
    torch.testing.assert_close(*slopes)


def test_its_derivatives_are_those_of_its_formula_in_both_modes_and_twice():
    *floats, tokens = inputs(2, 3)
    floats = [x.requires_grad_() for x in floats]
    f = lambda *args: fused(*args, tokens)  # noqa: E731
    assert torch.autograd.gradcheck(
        f, floats, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(f, floats, check_fwd_over_rev=True)


def tangent(f):
    return lambda *args: jvp(lambda *x: f(*x, args[3]), args[:3], tuple(x.sin() for x in args[:3]))


def per_row(f):
    return vmap(grad(f, (0, 1, 2)), (0, None, None, 0))


EAGER = {
    "vmap over rows": lambda f: vmap(f, (0, None, None, 0)),
    "vmap over weights": lambda f: (
        lambda h, w, b, y: vmap(f, (None, 0, 0, None))(h, w.expand(2, -1, -1), b.expand(2, -1), y)
    ),
    "grad": lambda f: grad(uneven(f), (0, 1, 2)),
    "grad of a frozen head": lambda f: grad(uneven(f)),
    "vmap of grad": lambda f: per_row(uneven(f)),
    "grad of vmap": lambda f: grad(uneven(vmap(f, (0, None, None, 0))), (0, 1, 2)),
    "jvp": tangent,
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(uneven(f), (0, 1)),
}
COMPILED = ("vmap over rows", "grad", "grad of a frozen head", "vmap of grad", "jvp")


@pytest.mark.parametrize("name", EAGER)
def test_every_transform_of_it_is_that_of_token_logprobs(name):
    args, transform = inputs(2, 3), EAGER[name]
    torch.testing.assert_close(transform(fused)(*args), transform(plain)(*args))


def compile_(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


@pytest.mark.compile
@pytest.mark.parametrize("name", COMPILED)
def test_every_compiled_transform_of_it_is_that_of_token_logprobs(name):
    args, transform = inputs(2, 3), EAGER[name]
    torch.testing.assert_close(compile_(transform(fused))(*args), transform(plain)(*args))


@pytest.mark.slow
@pytest.mark.compile
def test_inductor_compiles_its_gradient_correctly():
    args, transform = inputs(2, 3), EAGER["grad"]
    compiled = compile_(transform(fused), "inductor")
    torch.testing.assert_close(compiled(*args), transform(plain)(*args))


@pytest.mark.compile
def test_the_backward_of_it_compiled_is_that_of_token_logprobs():
    args = [x.requires_grad_(x.is_floating_point()) for x in inputs(2, 3)]
    slopes = [
        torch.autograd.grad(uneven(f)(*args), args[:3])
        for f in (compile_(lambda *args: fused(*args)), plain)
    ]
    torch.testing.assert_close(*slopes)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def largest(f, *args):
    with Largest() as mode:
        f(*args)
    return mode.elements


def backward(f):
    def run(*args):
        args = [x.detach().requires_grad_(x.is_floating_point()) for x in args]
        f(*args).sum().backward()

    return run


@pytest.mark.parametrize("transform", [lambda f: f, backward, EAGER["grad"], tangent])
@pytest.mark.parametrize("vocab", [100, 5000])
def test_it_never_holds_tokens_by_vocab(transform, vocab):
    args = inputs(4, 50, vocab=vocab)
    default = lambda *args: fused(*args, chunk=None)  # noqa: E731
    assert largest(transform(plain), *args) >= 200 * vocab
    assert largest(transform(default), *args) <= 200 * -(-vocab // 8)


def test_a_chunk_of_one_holds_no_more_than_its_arguments_and_results():
    args = inputs(50, vocab=100)
    assert largest(backward(lambda *args: fused(*args, chunk=1)), *args) <= 100 * WIDTH


def test_a_frozen_head_costs_no_gradient_of_the_weight():
    args = inputs(5, vocab=1000, width=8)
    slopes = grad(uneven(lambda *args: fused(*args, chunk=10)))
    assert largest(slopes, *args) <= 1000 * 8
    with Shapes() as mode:
        slopes(*args)
    assert (10, 8) not in mode.products


class Shapes(TorchDispatchMode):
    """The shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.products = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.add(tuple(out.shape))
        return out


@pytest.mark.compile
def test_compiled_it_saves_nothing_of_tokens_by_vocab_for_the_backward():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    sizes = []

    def forward(graph, _):
        (outputs,) = next(n for n in graph.graph.nodes if n.op == "output").args
        sizes.append(sum(n.meta["val"].numel() for n in outputs if hasattr(n, "meta")))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    args = inputs(200, vocab=1000)
    for f in (lambda *a: plain(*a).sum(), lambda *a: fused(*a, chunk=100).sum()):
        backward(compile_(f, backend))(*args)
    assert sizes[0] >= 200 * 1000 > 10 * sizes[1]


def test_half_precision_is_computed_in_float32_and_its_gradients_are_half():
    args = inputs(6, dtype=torch.bfloat16)
    exact = [x.double() if x.is_floating_point() else x for x in args]
    assert fused(*args).dtype == torch.float32
    torch.testing.assert_close(fused(*args).double(), plain(*exact), rtol=1e-5, atol=1e-5)
    slopes, wanted = (grad(uneven(f), (0, 1, 2))(*a) for f, a in ((fused, args), (plain, exact)))
    for slope, want in zip(slopes, wanted):
        assert slope.dtype == torch.bfloat16
        torch.testing.assert_close(slope.double(), want, rtol=2e-2, atol=2e-2)


def test_a_token_banned_by_its_bias_gets_no_gradient_and_leaves_the_rest_finite():
    hidden, weight, bias, tokens = inputs(5)
    bias[3], tokens[tokens == 3] = -torch.inf, 4
    torch.testing.assert_close(
        fused(hidden, weight, bias, tokens), plain(hidden, weight, bias, tokens)
    )
    slopes = grad(uneven(fused), (0, 1, 2))(hidden, weight, bias, tokens)
    assert all(x.isfinite().all() for x in slopes)
    assert (slopes[1][3] == 0).all() and slopes[2][3] == 0


def test_misuse_is_named():
    hidden, weight, bias, tokens = inputs(2, 3)
    with pytest.raises(ValueError, match="hidden"):
        linear_token_logprobs(hidden[0], weight, tokens)
    with pytest.raises(ValueError, match=r"tokens\[1, 2\]"):
        linear_token_logprobs(hidden, weight, torch.tensor([[0, 1, 2], [3, 4, VOCAB]]))
    with pytest.raises(ValueError, match="chunk"):
        linear_token_logprobs(hidden, weight, tokens, chunk=0)
