"""Laws of mismatch.py, against loops over the kept tokens of ragged rows."""

import math

import pytest
import torch
from cases_losses import array, refused
from cases_returns import trajectories
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn.kl import k1, k2, k3
from rlhf_fn.mismatch import (
    chi_squared,
    divergence_mask,
    effective_sample_size,
    masked_weights,
    off_policy_sequence_mask,
    ratio_mask,
    second_moment_mask,
    self_normalised_weights,
    truncated_weights,
    veto_mask,
)
from rlhf_fn.sequence import masked_max, masked_mean, masked_sum, mean_log_ratio, sum_log_ratio

close = torch.testing.assert_close
low, high = st.floats(0, 1), st.floats(1, 5)


@given(array(3, 5), low, high, st.floats(0, 5))
def test_weights_are_their_loops(log_ratio, low, high, clip):
    truncated = truncated_weights(log_ratio, clip=clip)
    masked = masked_weights(log_ratio, low=low, high=high)
    for x, a, b in zip(*[x.flatten().tolist() for x in (log_ratio, truncated, masked)]):
        assert a == pytest.approx(min(math.exp(x), clip))
        assert b == pytest.approx(math.exp(x) if low <= math.exp(x) <= high else 0.0)


@given(array(3, 5), st.floats(0.1, 5))
def test_weights_neither_overflow_nor_pass_on_a_gradient_from_where_they_are_cut(x, clip):
    far = 1000 * x
    settings = {truncated_weights: {"clip": clip}, masked_weights: {"low": 0.5, "high": clip}}
    for weights, bounds in settings.items():
        out, pull = torch.func.vjp(lambda x, f=weights, b=bounds: f(x, **b), far)
        (slope,) = pull(torch.ones_like(out))
        assert out.isfinite().all()
        assert slope.isfinite().all() and (slope[far > 10] == 0).all()
    close(truncated_weights(x, clip=math.inf), x.exp())
    close(masked_weights(x, low=0.0, high=math.inf), x.exp())


@given(trajectories(count=2), low, high)
def test_masks_by_ratio_are_their_loops_at_every_level(case, low, high):
    new, old, mask, _ = case
    rows = [[v for v, m in zip(*row) if m] for row in zip((new - old).tolist(), mask.tolist())]
    inside = lambda x: low <= math.exp(x) <= high  # noqa: E731
    total, mean = sum_log_ratio(new, old, mask), mean_log_ratio(new, old, mask)
    levels = {
        "sequence": (ratio_mask(total, mask, low=low, high=high), math.fsum),
        "geometric": (
            ratio_mask(mean, mask, low=low, high=high),
            lambda row: math.fsum(row) / len(row),
        ),
    }
    for name, (got, level) in levels.items():
        for i, row in enumerate(rows):
            if row and abs(math.log(max(1e-9, low)) - level(row)) > 1e-9:
                if abs(math.log(high) - level(row)) > 1e-9:
                    assert (got[i] == mask[i]).all() == inside(level(row)), name
                    assert got[i].any() == inside(level(row)), name
    token = ratio_mask(new - old, mask, low=low, high=high)
    veto = veto_mask(new - old, mask, low=low, high=high)
    for i, row in enumerate(rows):
        assert token[i][mask[i]].tolist() == [inside(x) for x in row]
        assert veto[i][mask[i]].tolist() == [all(map(inside, row))] * len(row)
    assert not (token | veto)[~mask].any()


@given(trajectories(count=2), st.floats(0, 3))
def test_divergence_mask_is_its_loop_for_tokens_and_for_answers(case, limit):
    new, old, mask, _ = case
    for estimate in (k1, k2, k3):
        divergence = estimate(old, new)
        got = divergence_mask(divergence, mask, limit=limit)
        assert (got == (mask & (divergence <= limit))).all()
        for level in (masked_sum, masked_mean, masked_max):
            of_row = level(divergence, mask)
            got = divergence_mask(of_row[..., None], mask, limit=limit)
            for i, d in enumerate(of_row.tolist()):
                assert got[i].tolist() == [m and d <= limit for m in mask[i].tolist()]


@given(trajectories(count=3), st.floats(0, 2))
def test_off_policy_sequence_mask_drops_bad_answers_that_became_unlikely(case, limit):
    new, old, advantages, mask, _ = case
    one = advantages[:, :1]
    got = off_policy_sequence_mask(new, old, one, mask, limit=limit)
    for i, keep in enumerate(mask.tolist()):
        gaps = [q - p for p, q, m in zip(new[i].tolist(), old[i].tolist(), keep) if m]
        mean = math.fsum(gaps) / max(1, len(gaps))
        if abs(mean - limit) > 1e-9:
            expected = one[i].item() >= 0 or mean <= limit
            assert got[i].tolist() == [m and expected for m in keep]


def test_off_policy_sequence_mask_asks_for_a_bad_answer_and_a_gap_past_its_limit():
    gap, old = torch.tensor([[0.25], [0.5], [0.75]]), torch.zeros(3, 1)
    for advantage, kept in ((1.0, [True] * 3), (0.0, [True] * 3), (-1.0, [True, True, False])):
        got = off_policy_sequence_mask(-gap, old, old + advantage, old == 0, limit=0.5)
        assert got.flatten().tolist() == kept


def second_moment_loop(squares, limit):
    """Drop the largest, with its ties, until the mean of the rest is within the limit."""
    while squares and math.fsum(squares) / len(squares) > limit:
        squares = [x for x in squares if x < max(squares)]
    return squares


@given(trajectories(count=1), st.floats(0, 4))
def test_second_moment_mask_drops_the_most_extreme_until_the_rest_is_within_bounds(case, limit):
    log_ratio, mask, _ = case
    log_ratio = log_ratio.round()
    got = second_moment_mask(log_ratio, mask, limit=limit)
    kept = second_moment_loop(sorted((log_ratio[mask] ** 2).tolist()), limit)
    assert sorted((log_ratio[got] ** 2).tolist()) == kept
    assert not (got & ~mask).any()


@given(trajectories(count=1))
def test_second_moment_mask_without_a_limit_is_the_mask(case):
    log_ratio, mask, _ = case
    assert (second_moment_mask(log_ratio, mask, limit=100.0) == mask).all()


@given(trajectories(count=1))
def test_self_normalised_weights_have_mean_one_and_keep_their_proportions(case):
    x, mask, _ = case
    weights = x.exp()
    got = self_normalised_weights(weights, mask)
    assert (got[~mask] == 0).all()
    if mask.any():
        close(got[mask].mean(), torch.ones_like(got[mask].mean()))
        close(got[mask] / got[mask][0], weights[mask] / weights[mask][0])
    assert (self_normalised_weights(torch.zeros_like(x), mask) == 0).all()


@given(trajectories(count=1), st.floats(0.1, 10))
def test_effective_sample_size_is_its_loop_and_forgets_scale(case, scale):
    x, mask, _ = case
    weights = x.exp()
    kept = weights[mask].tolist()
    got = effective_sample_size(weights, mask).item()
    squares = math.fsum(w * w for w in kept)
    expected = math.fsum(kept) ** 2 / (len(kept) * squares) if kept else 0.0
    assert got == pytest.approx(expected)
    assert effective_sample_size(scale * weights, mask).item() == pytest.approx(got)
    if kept:
        assert 1 / len(kept) - 1e-9 <= got <= 1 + 1e-9
        assert effective_sample_size(torch.ones_like(x), mask).item() == pytest.approx(1.0)


@given(array(6), array(6))
def test_chi_squared_is_in_expectation_the_divergence(new, old):
    new, old = new.log_softmax(-1), old.log_softmax(-1)
    exact = sum(math.exp(2 * p - q) for p, q in zip(new.tolist(), old.tolist())) - 1
    each = chi_squared((new - old)[:, None], torch.ones(6, 1, dtype=torch.bool))
    assert (old.exp() * each).sum().item() == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(trajectories(count=1))
def test_chi_squared_is_its_loop(case):
    x, mask, _ = case
    for got, row, keep in zip(chi_squared(x, mask).tolist(), x.tolist(), mask.tolist()):
        squares = [math.exp(2 * v) - 1 for v, m in zip(row, keep) if m]
        assert got == pytest.approx(math.fsum(squares) / max(1, len(squares)), abs=1e-12)


def test_weights_and_masks_refuse_what_does_not_fit_by_name():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with refused("clip must be"):
        truncated_weights(x, clip=-1.0)
    with refused("low must be"):
        masked_weights(x, low=-1.0, high=2.0)
    with refused("log_ratio"):
        ratio_mask(x[0], mask, low=0.5, high=2.0)
    with refused(r"divergence\[..., None\]"):
        divergence_mask(x[:, 0], mask, limit=1.0)
    with refused("mask must be torch.bool", TypeError):
        veto_mask(x, x, low=0.5, high=2.0)
    with refused("advantages are"):
        off_policy_sequence_mask(x, x, x[:, 0], mask, limit=0.1)
    with refused("limit must be"):
        second_moment_mask(x, mask, limit=-1.0)
    for f in (self_normalised_weights, effective_sample_size, chi_squared):
        with refused("mask must be torch.bool", TypeError):
            f(x, x)
