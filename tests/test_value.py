"""Laws of value.py, and a float64 loop beside each formula."""

import math
import statistics

import pytest
import torch
from cases_losses import arrays, finite, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.value import clipped_value_loss, explained_variance, value_loss

clips = st.floats(0.01, 3)
eighths = st.integers(-40, 40).map(lambda n: n / 8)  # no difference drowns in rounding


def masked(count, **options):
    """`count` arrays and a mask, all of one shape."""
    return arrays(count + 1, **options).map(lambda xs: (*xs[:-1], xs[-1] > -1))


@given(arrays(3), clips)
def test_value_losses_are_their_loops(inputs, clip):
    values, old_values, returns = inputs
    plain = value_loss(values, returns)
    clipped = clipped_value_loss(values, old_values, returns, clip=clip)
    for v, old, r, a, b in zip(*[x.flatten().tolist() for x in (*inputs, plain, clipped)]):
        moved = max(old - clip, min(old + clip, v))
        assert a == pytest.approx((v - r) ** 2 / 2, abs=1e-12)
        assert b == pytest.approx(max((v - r) ** 2, (moved - r) ** 2) / 2, abs=1e-12)


@given(arrays(2))
def test_the_gradient_of_value_loss_is_the_error_itself(inputs):
    values, returns = inputs
    slope = grad(lambda v: value_loss(v, returns).sum())(values)
    torch.testing.assert_close(slope, values - returns, rtol=0, atol=0)


@given(arrays(3, dtype=torch.float32))
def test_clipped_value_loss_with_an_infinite_clip_is_value_loss(inputs):
    values, _, returns = inputs
    torch.testing.assert_close(
        clipped_value_loss(*inputs, clip=math.inf), value_loss(values, returns), rtol=0, atol=0
    )


@given(arrays(2, dtype=torch.float32), clips)
def test_clipped_value_loss_is_value_loss_in_the_first_epoch(inputs, clip):
    values, returns = inputs
    loss = grad(lambda v: clipped_value_loss(v, values, returns, clip=clip).sum())
    torch.testing.assert_close(loss(values), values - returns, rtol=0, atol=0)


@given(arrays(3), clips)
def test_clipped_value_loss_has_gradient_zero_where_clipped_and_the_error_elsewhere(inputs, clip):
    values, old_values, returns = inputs
    slope = grad(lambda v: clipped_value_loss(v, old_values, returns, clip=clip).sum())(values)
    for v, old, r, d in zip(*[x.flatten().tolist() for x in (*inputs, slope)]):
        moved = max(old - clip, min(old + clip, v))
        if (moved - r) ** 2 != (v - r) ** 2:
            assert d == (0 if (moved - r) ** 2 > (v - r) ** 2 else v - r)


@given(arrays(3), clips)
def test_clipped_value_loss_is_never_below_value_loss(inputs, clip):
    values, _, returns = inputs
    assert (clipped_value_loss(*inputs, clip=clip) >= value_loss(values, returns)).all()


@given(masked(2, elements=st.sampled_from([-3.0, -0.7, 0.1, 0.4, 2.0])))
def test_explained_variance_is_its_loop(inputs):
    values, returns, mask = inputs
    kept = [(v, r) for v, r, m in zip(*[x.flatten().tolist() for x in inputs]) if m]
    expected = 0.0
    if len({r for _, r in kept}) > 1:
        left = statistics.pvariance([r - v for v, r in kept])
        expected = 1 - left / statistics.pvariance([r for _, r in kept])
    assert explained_variance(*inputs).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(masked(1, elements=eighths, dtype=torch.float32), finite)
def test_explained_variance_is_one_at_the_returns_and_zero_at_a_constant(inputs, constant):
    returns, mask = inputs
    varies = len(set(returns[mask].tolist())) > 1
    assert explained_variance(returns, returns, mask) == float(varies)
    flat = explained_variance(torch.full_like(returns, constant), returns, mask)
    torch.testing.assert_close(flat, torch.tensor(0.0), rtol=0, atol=1e-3)


@given(masked(1, dtype=torch.float32), st.sampled_from([0.1, -2.8, 1e-8, 1e4, 0.0]))
def test_explained_variance_of_equal_returns_is_exactly_zero_with_a_finite_gradient(
    inputs, constant
):
    values, mask = inputs
    returns = torch.full_like(values, constant)
    assert explained_variance(values, returns, mask) == 0
    for slope in grad(explained_variance, argnums=(0, 1))(values, returns, mask):
        assert slope.isfinite().all()


def test_explained_variance_of_nothing_is_zero():
    nan = torch.full((2, 3), torch.nan)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert explained_variance(nan, nan, nothing) == 0
    for slope in grad(explained_variance, argnums=(0, 1))(nan, nan, nothing):
        assert (slope == 0).all()


@given(masked(2), st.floats(-3, 3))
def test_explained_variance_knows_neither_rows_nor_a_constant_error(inputs, shift):
    values, returns, mask = inputs
    whole = explained_variance(values, returns, mask)
    flat = explained_variance(values.flatten() + shift, returns.flatten(), mask.flatten())
    if returns[mask].numel() > 1 and returns[mask].std() > 1e-3:
        torch.testing.assert_close(flat, whole, rtol=1e-6, atol=1e-6)


def test_value_losses_refuse_other_shapes_by_name():
    x, y, mask = torch.zeros(2, 3), torch.zeros(3), torch.ones(2, 3, dtype=torch.bool)
    with refused("returns"):
        value_loss(x, y)
    with refused("old_values"):
        clipped_value_loss(x, y, x, clip=0.2)
    with refused("returns"):
        explained_variance(x, y, mask)
    with refused("mask must be torch.bool", TypeError):
        explained_variance(x, x, x)
