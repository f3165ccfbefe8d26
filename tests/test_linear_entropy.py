"""`linear_token_logprobs_and_entropy` is `token_logprobs` and `entropy` of a linear layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_logprobs import COMPILED, EAGER, backward, compile_, inputs, largest, uneven
from torch.func import grad

from rlhf_fn.linear import linear_token_logprobs, linear_token_logprobs_and_entropy
from rlhf_fn.logprobs import entropy, token_logprobs

WRT = (0, 1, 2)


def fused(hidden, weight, bias, tokens, chunk=3):
    options = {"temperature": 0.7, "chunk": chunk}
    return torch.stack(linear_token_logprobs_and_entropy(hidden, weight, tokens, bias, **options))


def plain(hidden, weight, bias, tokens):
    logits = hidden @ weight.mT + bias
    both = token_logprobs(logits, tokens, temperature=0.7), entropy(logits, temperature=0.7)
    return torch.stack(both)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 13), st.integers(1, 15))
def test_it_is_both_of_them_whatever_the_chunk_with_the_same_gradients(shape, vocab, chunk):
    args = inputs(*shape, vocab=vocab)
    chunked = lambda *args: fused(*args, chunk=chunk)  # noqa: E731
    torch.testing.assert_close(chunked(*args), plain(*args))
    torch.testing.assert_close(*(grad(uneven(f), WRT)(*args) for f in (chunked, plain)))


def test_its_derivatives_are_those_of_its_formula_in_both_modes_and_twice():
    *floats, tokens = inputs(2, 3)
    floats = [x.requires_grad_() for x in floats]
    f = lambda *args: fused(*args, tokens)  # noqa: E731
    assert torch.autograd.gradcheck(f, floats, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, floats, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", EAGER)
def test_every_transform_of_it_is_that_of_both(name):
    args, transform = inputs(2, 3), EAGER[name]
    torch.testing.assert_close(transform(fused)(*args), transform(plain)(*args))


@pytest.mark.compile
@pytest.mark.parametrize(
    "name", [n if n == "grad" else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED]
)
def test_every_compiled_transform_of_it_is_that_of_both(name):
    args, transform = inputs(2, 3), EAGER[name]
    torch.testing.assert_close(compile_(transform(fused))(*args), transform(plain)(*args))


def test_its_log_probs_are_those_without_an_entropy_to_the_bit():
    hidden, weight, bias, tokens = inputs(4, 5, dtype=torch.float32)
    both = linear_token_logprobs_and_entropy(hidden, weight, tokens, bias, chunk=3)
    assert torch.equal(both.logprobs, linear_token_logprobs(hidden, weight, tokens, bias, chunk=3))


@pytest.mark.parametrize("vocab", [100, 5000])
def test_it_never_holds_tokens_by_vocab(vocab):
    args = inputs(4, 50, vocab=vocab)
    default = lambda *args: fused(*args, chunk=None)  # noqa: E731
    assert largest(backward(plain), *args) >= 200 * vocab
    assert largest(backward(default), *args) <= 200 * -(-vocab // 8)


@pytest.mark.parametrize("banned", [[0], [0, 1, 2], [3, 4, 5, 10]])
def test_a_banned_token_has_no_part_in_the_entropy_and_gets_no_gradient(banned):
    hidden, weight, bias, tokens = inputs(5)
    bias[banned] = -torch.inf
    tokens[:] = 7
    args = hidden, weight, bias, tokens
    torch.testing.assert_close(fused(*args), plain(*args))
    slopes = grad(uneven(fused), WRT)(*args)
    assert all(x.isfinite().all() for x in slopes)
    assert (slopes[1][banned] == 0).all() and (slopes[2][banned] == 0).all()


def test_a_certain_token_has_the_entropy_of_float64():
    """Logits 40 apart: what is left of H is what the second token gives."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[60.0], [20.0], [-60.0]])
    tokens = torch.tensor([0])
    got = linear_token_logprobs_and_entropy(hidden, weight, tokens, chunk=1).entropy
    exact = entropy(hidden.double() @ weight.double().mT)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
