import math

import pytest
import torch
from cases_ground import array
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.func import grad

from rlhf_fn.distributions import categorical_sample
from rlhf_fn.logprobs import cross_entropy, entropy, full_kl, token_logprobs
from rlhf_fn.random import key, split

temperatures = st.floats(0.2, 5)


@st.composite
def logits(draw, count=1, rows=3, vocab=6):
    """`count` float64 logits of one shape, tokens, and which of the vocabulary is not banned."""
    shape = draw(st.integers(1, rows)), draw(st.integers(2, vocab))
    tokens = draw(st.lists(st.integers(0, shape[1] - 1), min_size=shape[0], max_size=shape[0]))
    allowed = draw(st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]))
    allowed[tokens[0]] = True
    return *[draw(array(*shape)) for _ in range(count)], torch.tensor(tokens), torch.tensor(allowed)


def log_softmax(row, temperature=1.0):
    """The slow way, one number at a time."""
    scaled = [z / temperature for z in row.tolist()]
    total = math.fsum(math.exp(z) for z in scaled)
    return [z - math.log(total) for z in scaled]


@given(logits(), temperatures)
def test_token_logprobs_are_those_of_a_loop(case, temperature):
    z, tokens, _ = case
    expected = [log_softmax(row, temperature)[y] for row, y in zip(z, tokens)]
    got = token_logprobs(z, tokens, temperature=temperature)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(cross_entropy(z, tokens), -token_logprobs(z, tokens))


@given(logits(), st.floats(-50, 50))
def test_token_logprobs_do_not_depend_on_what_is_added_to_a_row(case, shift):
    z, tokens, _ = case
    torch.testing.assert_close(token_logprobs(z + shift, tokens), token_logprobs(z, tokens))


@given(logits())
def test_without_a_temperature_it_is_one(case):
    z, tokens, _ = case
    assert (entropy(z) == entropy(z, temperature=1.0)).all()
    assert (token_logprobs(z, tokens) == token_logprobs(z, tokens, temperature=1.0)).all()


@given(logits(), temperatures)
def test_entropy_is_that_of_a_loop_and_lies_between_nought_and_that_of_a_fair_die(case, temp):
    z, *_ = case
    rows = [log_softmax(row, temp) for row in z]
    expected = [-math.fsum(math.exp(x) * x for x in row) for row in rows]
    got = entropy(z, temperature=temp)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert ((got > -1e-12) & (got < math.log(z.shape[-1]) + 1e-12)).all()


@given(logits(count=2))
def test_full_kl_is_that_of_torch_and_never_negative(case):
    z, ref, *_ = case
    expected = kl_divergence(Categorical(logits=z), Categorical(logits=ref))
    torch.testing.assert_close(full_kl(z, ref), expected)
    assert (full_kl(z, ref) > -1e-12).all()
    assert (full_kl(z, z) == 0).all()


QUANTITIES = {
    "token_logprobs": lambda z, ref, y: token_logprobs(z, y, temperature=0.7),
    "token_logprobs at a tensor": lambda z, r, y: token_logprobs(z, y, temperature=z.new_tensor(2)),
    "entropy": lambda z, ref, y: entropy(z, temperature=0.7),
    "full_kl": lambda z, ref, y: full_kl(z, ref),
}


@pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES)
@given(logits(count=2))
def test_a_banned_token_is_as_if_cut_out_of_the_vocabulary_forward_and_backward(quantity, case):
    z, ref, tokens, allowed = case
    tokens = torch.where(allowed[tokens], tokens, tokens[0])
    index = allowed.cumsum(0) - 1  # where a token stands among the allowed ones

    def banned(z, ref):
        z, ref = (torch.where(allowed, x, -torch.inf) for x in (z, ref))
        return quantity(z, ref, tokens)

    def cut(z, ref):
        return quantity(z[:, allowed], ref[:, allowed], index[tokens])

    torch.testing.assert_close(banned(z, ref), cut(z, ref))
    for position in (0, 1):
        slopes = [
            grad(lambda *a, f=f: (f(*a) * torch.arange(1, len(z) + 1)).sum(), position)(z, ref)
            for f in (banned, cut)
        ]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES)
def test_the_gradient_of_minus_infinity_is_nought(quantity):
    z = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, -torch.inf, -torch.inf]])
    ref = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, -torch.inf]])
    tokens = torch.tensor([2, 0])
    for position in (0, 1):
        slope = grad(lambda *a: quantity(*a, tokens).sum(), position)(z, ref)
        assert slope.isfinite().all()
    assert (grad(lambda z: quantity(z, ref, tokens).sum())(z)[z == -torch.inf] == 0).all()


def test_a_tensor_temperature_has_a_finite_gradient_beside_banned_tokens():
    z, tokens = torch.tensor([1.0, -torch.inf, 2.0]), torch.tensor(2)
    slope = grad(lambda t: token_logprobs(z, tokens, temperature=t))(torch.tensor(0.7))
    at = z[[0, 2]].double()
    expected = grad(lambda t: (at / t).log_softmax(-1)[1])(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(slope.double(), expected)


def test_full_kl_is_infinite_where_only_the_reference_bans():
    z, ref = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])
    assert full_kl(z, ref) == torch.inf
    assert full_kl(ref, z).isfinite()


def test_training_and_sampling_at_a_temperature_speak_of_one_distribution():
    z, temperature, draws = torch.tensor([1.0, -0.5, 0.3, 2.0]), 1.7, 40_000
    sampled = categorical_sample((z / temperature).expand(draws, -1), split(key(0), draws))
    seen = torch.bincount(sampled.flatten(), minlength=4) / draws
    said = token_logprobs(z.expand(4, 4), torch.arange(4), temperature=temperature).exp()
    torch.testing.assert_close(said.sum(), torch.tensor(1.0))
    torch.testing.assert_close(seen, said, rtol=0, atol=0.012)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(logits(count=2))
def test_half_precision_is_computed_in_float32_and_returned_so(dtype, case):
    z, ref, tokens, _ = case
    z, ref = 3 * z.to(dtype), 3 * ref.to(dtype)
    for quantity in QUANTITIES.values():
        got, exact = quantity(z, ref, tokens), quantity(z.double(), ref.double(), tokens)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.floats(-14, 14))
def test_the_gradient_is_rounded_once_however_confident_the_token(dtype, z):
    z = torch.tensor([z, 0.0], dtype=dtype)
    f = lambda z: token_logprobs(z, torch.tensor(0))  # noqa: E731
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(grad(f)(z).double(), grad(f)(z.double()), rtol=rounding, atol=2e-7)


def test_a_token_outside_the_vocabulary_is_named_by_its_position():
    z = torch.zeros(2, 3, 5)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    for bad in (5, -1, -100):
        tokens[1, 2] = bad
        with pytest.raises(ValueError, match=rf"tokens\[1, 2\].*{bad}"):
            token_logprobs(z, tokens)


def test_misuse_is_named():
    z = torch.zeros(2, 3, 5)
    with pytest.raises(TypeError, match="tokens"):
        token_logprobs(z, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and tokens \(3,\)"):
        token_logprobs(z, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="ref_logits"):
        full_kl(z, torch.zeros(2, 1, 5))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            entropy(z, temperature=temperature)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens_have_no_logprobs(shape):
    assert (
        token_logprobs(torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.long)).shape == shape
    )
