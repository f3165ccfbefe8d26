import math
from decimal import Decimal, localcontext

import pytest
import torch
from cases_ground import array
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.kl import (
    adaptive_kl,
    doubling_kl,
    fixed_kl,
    geometric_mixture_logprobs,
    k1,
    k2,
    k3,
    mixture_logprobs,
    off_policy_kl,
    straight_through,
)
from rlhf_fn.logprobs import full_kl

six = array(6)
unit = st.floats(0, 1)


def expectation(estimator, logits, ref):
    """E[k] over every token of the vocabulary, drawn from π but not differentiated through it."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref.log_softmax(-1)
    return (logprobs.detach().exp() * estimator(logprobs, ref_logprobs)).sum(-1)


@given(six, six)
def test_k1_and_k3_are_unbiased(logits, ref):
    expected = full_kl(logits, ref)
    torch.testing.assert_close(expectation(k1, logits, ref), expected)
    torch.testing.assert_close(expectation(k3, logits, ref), expected)


@given(six, six)
def test_the_mean_gradient_of_k1_is_nought(logits, ref):
    slope = grad(lambda z: expectation(k1, z, ref))(logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@given(six, six)
def test_the_mean_gradient_of_k2_is_the_gradient_of_the_kl(logits, ref):
    slope = grad(lambda z: expectation(k2, z, ref))(logits)
    torch.testing.assert_close(slope, grad(full_kl)(logits, ref))


@given(six, six)
def test_the_mean_gradient_of_k3_is_the_gradient_of_the_forward_kl(logits, ref):
    slope = grad(lambda z: expectation(k3, z, ref))(logits)
    torch.testing.assert_close(slope, grad(full_kl, 1)(ref, logits), rtol=1e-6, atol=1e-10)


@given(st.floats(-1, 1), st.integers(-40, 6), st.floats(-9, 0, width=32))
def test_k2_and_k3_are_never_negative_in_float32(x, magnitude, ref):
    ref = torch.tensor([ref])
    logprobs = ref + x * 2.0**magnitude
    assert k2(logprobs, ref) >= 0 and k3(logprobs, ref) >= 0


@example(1.0, -7)
@example(-1.0, -7)
@given(st.floats(1e-3, 1) | st.floats(-1, -1e-3), st.integers(-40, 4))
def test_k3_keeps_its_digits_near_nought(x, magnitude):
    x = torch.tensor([x * 2.0**magnitude], dtype=torch.float64)
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(-x.item()).exp() - 1 + Decimal(x.item())
    rounding = 1e-14 if x.abs() < 1e-2 else 1e-11  # without the series, 1 is lost and found again
    got = k3(x, torch.zeros_like(x)).item()
    torch.testing.assert_close(got, float(exact), rtol=rounding, atol=0)
    slope = grad(lambda x: k3(x, torch.zeros_like(x)).sum())(x)
    torch.testing.assert_close(slope.item(), -math.expm1(-x.item()), rtol=1e-11, atol=0)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@given(six)
def test_equal_policies_are_at_distance_nought(estimator, logprobs):
    assert (estimator(logprobs, logprobs) == 0).all()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_half_precision_is_computed_in_float32_and_returned_so(estimator):
    a, b = torch.tensor([-3.0, -0.1]).bfloat16(), torch.tensor([-0.13, -7.7]).bfloat16()
    assert estimator(a, b).dtype == torch.float32
    torch.testing.assert_close(estimator(a, b), estimator(a.float(), b.float()), rtol=0, atol=0)


@given(st.floats(0.01, 1), st.floats(0, 20), st.floats(0.1, 10), st.integers(0, 1000))
def test_adaptive_kl_is_the_papers_controller(coef, kl, target, tokens):
    error = max(-0.2, min(0.2, kl / target - 1))
    got = adaptive_kl(coef, torch.tensor(kl).double(), target=target, horizon=5e3, tokens=tokens)
    assert got.item() == pytest.approx(coef * (1 + error * tokens / 5000))
    plain = adaptive_kl(coef, kl, target=target, horizon=5e3, tokens=tokens)
    assert plain.item() == pytest.approx(got.item(), rel=1e-5)


@given(st.floats(0.01, 1), st.floats(0, 20), st.floats(0.1, 10), st.integers(1, 1000))
def test_adaptive_kl_raises_the_penalty_above_its_target_and_lowers_it_below(coef, kl, target, n):
    kl, coef = torch.tensor(kl, dtype=torch.float64), torch.tensor(coef, dtype=torch.float64)
    new = adaptive_kl(coef, kl, target=target, horizon=1e3, tokens=n)
    assert (new - coef) * (kl - target) >= 0
    assert (new / coef - 1).abs() <= 0.2 * n / 1000 + 1e-12
    assert adaptive_kl(coef, torch.tensor(target), target=target, horizon=9.0, tokens=n) == coef


@example(0.5, 2.0, 3.0)  # the ends of the band belong to it
@example(0.5, 3.0, 2.0)
@given(st.floats(0.01, 1), st.floats(0, 20), st.floats(0.1, 10))
def test_doubling_kl_doubles_above_its_band_and_halves_below(coef, kl, target):
    got = doubling_kl(coef, torch.tensor(kl).double(), target=target, tokens=9)
    factor = 2.0 if kl / target > 1.5 else 0.5 if kl / target < 1 / 1.5 else 1.0
    assert got.item() == coef * factor


@pytest.mark.parametrize("value", [k1, k2, k3])
@given(six, six)
def test_straight_through_has_one_functions_value_and_anothers_gradient(value, logits, ref):
    def mixed(logprobs, ref_logprobs):
        exact = value(logprobs, ref_logprobs).clamp(-1, 1)  # whose own gradient would be cut
        return straight_through(exact, k2(logprobs, ref_logprobs))

    a, b = logits.log_softmax(-1), ref.log_softmax(-1)
    assert (mixed(a, b) == value(a, b).clamp(-1, 1)).all()
    slope = grad(lambda z: expectation(mixed, z, ref))(logits)
    torch.testing.assert_close(slope, grad(full_kl)(logits, ref))


@given(six, six, six)
def test_off_policy_kl_has_the_value_and_the_gradient_of_the_kl_on_older_samples(z, old, ref):
    old = old.log_softmax(-1)

    def expected(z):
        return (old.exp() * off_policy_kl(z.log_softmax(-1), old, ref.log_softmax(-1))).sum()

    torch.testing.assert_close(expected(z), full_kl(z, ref), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad(expected)(z), grad(full_kl)(z, ref), rtol=1e-6, atol=1e-9)


@given(st.floats(0, 1), st.floats(0, 20))
def test_fixed_kl_changes_nothing(coef, kl):
    assert fixed_kl(coef, kl, tokens=100) == coef
    with pytest.raises(TypeError):
        fixed_kl(coef, kl, 100)


@given(six, six, unit)
def test_a_mixture_is_the_weighted_mean_of_the_probabilities(a, b, weight):
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    mixed = mixture_logprobs(a, b, weight=weight)
    torch.testing.assert_close(mixed.exp(), (1 - weight) * a.exp() + weight * b.exp())
    torch.testing.assert_close(mixed, mixture_logprobs(b, a, weight=1 - weight))


@pytest.mark.parametrize("mixture", [mixture_logprobs, geometric_mixture_logprobs])
@given(six, six, unit)
def test_a_mixture_is_normalised_and_runs_from_one_policy_to_the_other(mixture, a, b, weight):
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    torch.testing.assert_close(mixture(a, b, weight=0.0), a)
    torch.testing.assert_close(mixture(a, b, weight=1.0), b)
    total = mixture(a, b, weight=weight).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total))


@given(six, six, unit)
def test_a_geometric_mixture_is_linear_in_log_odds(a, b, weight):
    mixed = geometric_mixture_logprobs(a, b, weight=weight)
    odds = (1 - weight) * a.diff() + weight * b.diff()
    torch.testing.assert_close(mixed.diff(), odds)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_mixture_of_policies_far_apart_neither_underflows_nor_overflows(weight):
    a, b = torch.tensor([-300.0, -0.1]), torch.tensor([-0.1, -300.0])
    exact = mixture_logprobs(a.double(), b.double(), weight=weight)
    torch.testing.assert_close(mixture_logprobs(a, b, weight=weight).double(), exact)
    slopes = grad(lambda *x: mixture_logprobs(*x, weight=weight).sum(), (0, 1))(a, b)
    torch.testing.assert_close(sum(slopes), torch.ones(2))


def test_misuse_is_named():
    a = torch.zeros(3)
    for estimator in (k1, k2, k3):
        with pytest.raises(ValueError, match="ref_logprobs"):
            estimator(torch.zeros(2, 3), a)
    with pytest.raises(ValueError, match="weight"):
        mixture_logprobs(a, a, weight=1.5)
    with pytest.raises(ValueError, match="target"):
        adaptive_kl(0.1, 1.0, target=0.0, horizon=10.0, tokens=1)
