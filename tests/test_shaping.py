"""Laws of shaping.py and moments.py, and a loop beside each formula."""

import math
import statistics

import pytest
import torch
from cases_ground import array, masks
from cases_losses import refused
from cases_returns import ids, trajectories
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.moments import (
    Moments,
    add_moments,
    decay_moments,
    denormalise,
    no_moments,
    normalise,
    popart,
)
from rlhf_fn.shaping import (
    combined_reward,
    length_reward,
    missing_eos_penalty,
    overlong_penalty,
    repeated_share,
    safe_reward,
)

close = torch.testing.assert_close
counts = st.integers(0, 40)
states = st.tuples(st.floats(-5, 5), st.floats(0, 5)).map(
    lambda x: Moments(*(torch.tensor(v, dtype=torch.float64) for v in (7.0, *x)))
)
nothing = no_moments(dtype=torch.float64)


@given(array(4, elements=counts, dtype=torch.int64), st.integers(1, 20), st.integers(0, 20))
def test_overlong_penalty_is_its_loop_and_never_below_minus_one(lengths, buffer, rest):
    got = overlong_penalty(lengths, limit=buffer + rest, buffer=buffer, dtype=torch.float64)
    for penalty, length in zip(got.tolist(), lengths.tolist()):
        over = length - rest
        assert penalty == pytest.approx(0.0 if over <= 0 else max(-1.0, -over / buffer))


@given(array(4), array(4, elements=st.booleans(), dtype=torch.bool), st.floats(0, 3))
def test_only_an_answer_without_an_end_pays_for_it(score, ended, penalty):
    got = missing_eos_penalty(score, ended, penalty=penalty)
    expected = [s if e else s - penalty for s, e in zip(score.tolist(), ended.tolist())]
    assert got.tolist() == expected


@given(array(2, 5, elements=counts, dtype=torch.int64), masks(2, 5), masks(2, 5))
def test_length_reward_is_its_loop_over_the_kept_answers(lengths, correct, mask):
    got = length_reward(lengths, correct, mask, dtype=torch.float64)
    for out, row, right, keep in zip(got, lengths, correct, mask):
        kept = row[keep].tolist()
        for i, length in enumerate(row.tolist()):
            expected = 0.0
            if keep[i] and max(kept) > min(kept):
                expected = 0.5 - (length - min(kept)) / (max(kept) - min(kept))
                expected = expected if right[i] else min(0.0, expected)
            assert out[i].item() == pytest.approx(expected)


@given(st.integers(1, 4), st.data())
def test_repeated_share_counts_the_n_grams_that_were_there_before(n, data):
    mask, _ = data.draw(trajectories(count=0))
    words = array(*mask.shape, elements=st.integers(0, 2), dtype=torch.int64)
    tokens = data.draw(words)
    got = repeated_share(tokens, mask, n=n, dtype=torch.float64)
    for share, row, keep in zip(got.tolist(), tokens, mask):
        kept = row[keep].tolist()
        grams = [tuple(kept[i : i + n]) for i in range(len(kept) - n + 1)]
        expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
        assert share == pytest.approx(expected)


@given(array(3, 4), masks(3, 4), array(4), st.sampled_from([torch.nan, torch.inf, 1e30]))
def test_combined_reward_is_the_weighted_sum_of_the_rewards_there_are(rewards, mask, weights, bad):
    poisoned = torch.where(mask, rewards, bad)
    got = combined_reward(poisoned, mask, weights=weights)
    for out, row, keep in zip(got.tolist(), rewards.tolist(), mask.tolist()):
        expected = math.fsum(w * r for w, r, m in zip(weights.tolist(), row, keep) if m)
        assert out == pytest.approx(expected, abs=1e-9)
    slope = grad(lambda r: combined_reward(r, mask, weights=weights).sum())(poisoned)
    close(slope, torch.where(mask, weights, 0.0), rtol=0, atol=0)
    close(combined_reward(rewards, weights=weights), rewards @ weights)


@given(array(4), array(4), st.floats(0, 5))
def test_safe_reward_runs_from_the_reward_to_minus_the_cost(reward, cost, multiplier):
    got = safe_reward(reward, cost, multiplier=multiplier)
    rows = zip(reward.tolist(), cost.tolist())
    assert got.tolist() == pytest.approx([(r - multiplier * c) / (1 + multiplier) for r, c in rows])
    close(safe_reward(reward, cost, multiplier=0.0), reward)
    close(safe_reward(reward, cost, multiplier=1e12), -cost, rtol=1e-6, atol=1e-6)


@given(trajectories(count=1), st.integers(1, 4))
def test_moments_part_by_part_are_those_of_the_whole(case, parts):
    x, mask, _ = case
    state = nothing
    for piece, keep in zip(x.chunk(parts, 1), mask.chunk(parts, 1)):
        state = add_moments(state, piece, keep)
    kept = x[mask].tolist()
    assert state.count == len(kept)
    if kept:
        assert state.mean.item() == pytest.approx(statistics.fmean(kept), abs=1e-9)
        assert state.variance.item() == pytest.approx(statistics.pvariance(kept), abs=1e-9)
    else:
        close(state, nothing)


@given(states, trajectories(count=1), st.floats(0, 1))
def test_decaying_moments_are_exponential_averages_of_x_and_its_square(state, case, rate):
    x, mask, _ = case
    got = decay_moments(state, x, mask, rate=rate)
    kept = x[mask].tolist()
    assert got.count == state.count + len(kept)
    if kept:
        first, second = statistics.fmean(kept), statistics.fmean(v * v for v in kept)
        mean = (1 - rate) * state.mean.item() + rate * first
        square = (1 - rate) * (state.variance + state.mean**2).item() + rate * second
        assert got.mean.item() == pytest.approx(mean, abs=1e-9)
        assert got.variance.item() == pytest.approx(square - mean**2, abs=1e-7)
    else:
        close(got, state)


def test_moments_keep_their_digits_far_from_nought():
    torch.manual_seed(0)
    x = 10_000 + torch.randn(4, 500, dtype=torch.float64).float()
    state = no_moments()
    for part in x:
        state = add_moments(state, part, torch.ones(500, dtype=torch.bool))
    close(state.variance.double(), x.double().var(correction=0), rtol=1e-2, atol=0)


@given(array(5), states, st.floats(1e-6, 1))
def test_normalise_is_its_loop_and_denormalise_undoes_it(x, state, eps):
    scale = math.sqrt(state.variance + eps)
    got = normalise(x, state, eps=eps)
    assert got.tolist() == pytest.approx([(v - state.mean.item()) / scale for v in x.tolist()])
    close(denormalise(got, state, eps=eps), x)


@given(array(3), array(2, 3), array(2), states, states, st.floats(1e-3, 1))
def test_popart_leaves_what_a_critic_says_as_it_was(x, weight, bias, old, new, eps):
    head = popart(weight, bias, old, new, eps=eps)
    before = denormalise(weight @ x + bias, old, eps=eps)
    after = denormalise(head.weight @ x + head.bias, new, eps=eps)
    close(after, before, rtol=1e-6, atol=1e-6)


def test_shaping_and_moments_refuse_what_does_not_fit_by_name():
    x, mask, lengths = torch.zeros(3), torch.ones(3, dtype=torch.bool), ids(3)
    with refused("limit must be at least 8"):
        overlong_penalty(lengths, limit=4, buffer=8)
    with refused("lengths must hold integers", TypeError):
        overlong_penalty(x, limit=8, buffer=4)
    with refused("ended must be torch.bool", TypeError):
        missing_eos_penalty(x, x, penalty=1.0)
    with refused("penalty must be"):
        missing_eos_penalty(x, mask, penalty=-1.0)
    with refused("correct"):
        length_reward(lengths, mask[:2], mask)
    with refused("n must be at least 1"):
        repeated_share(lengths, mask, n=0)
    with refused("one weight for each kind"):
        combined_reward(x, weights=torch.ones(2))
    with refused(r"rewards\[1\] is nan"):
        combined_reward(torch.tensor([0.0, torch.nan, 0.0]), weights=torch.ones(3))
    with refused("multiplier must be"):
        safe_reward(x, x, multiplier=-1.0)
    with refused("mask must be torch.bool", TypeError):
        add_moments(nothing, x, x)
    with refused(r"x\[0\] is inf"):
        add_moments(nothing, x + torch.inf, mask)
    with refused("rate must be"):
        decay_moments(nothing, x, mask, rate=1.5)
    with refused("eps must be"):
        normalise(x, nothing, eps=0.0)
