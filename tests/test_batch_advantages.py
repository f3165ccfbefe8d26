"""Laws of batch_advantages.py, and of what groups.py has for whole batches or single samples."""

import statistics

import pytest
import torch
from cases_ground import array, masks
from cases_groups import ragged
from cases_losses import refused
from cases_returns import trajectories, unit
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf_fn.batch_advantages import (
    gdpo_advantages,
    lite_ppo_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
)
from rlhf_fn.groups import dr_grpo_advantages, informative_groups, remax_advantages
from rlhf_fn.policy import policy_gradient
from rlhf_fn.returns import discounted_returns
from rlhf_fn.rewards import last_token_reward, whiten
from rlhf_fn.weights import token_mean, weighted_sum

close = torch.testing.assert_close
whole = st.integers(-2, 2).map(float)  # so that ties are common


def normalised(row):
    """GRPO's advantages of one list, with n − 1 and ε = 1e-4."""
    if len(row) < 2:
        return [0.0] * len(row)
    return [(r - statistics.fmean(row)) / (statistics.stdev(row) + 1e-4) for r in row]


@given(array(2, 4), array(2))
def test_remax_advantages_are_the_rewards_above_the_greedy_one(rewards, greedy):
    expected = [[r - g for r in row] for row, g in zip(rewards.tolist(), greedy.tolist())]
    assert remax_advantages(rewards, greedy).tolist() == expected
    assert remax_advantages(rewards[:, :1], greedy).shape == (2, 1)


@given(ragged(elements=whole), st.sampled_from([0, 1]))
def test_lite_ppo_advantages_are_centred_in_the_group_and_scaled_over_the_batch(case, ddof):
    rewards, mask = case
    got = lite_ppo_advantages(rewards, mask, ddof=ddof, eps=1e-4)
    kept = rewards[mask].tolist()
    spread = statistics.pstdev(kept) if len(kept) > 1 else 0.0
    if ddof and len(kept) > 1:
        spread = statistics.stdev(kept)
    centred = dr_grpo_advantages(rewards, mask)
    assert got.flatten().tolist() == pytest.approx((centred / (spread + 1e-4)).flatten().tolist())
    assert (lite_ppo_advantages(0 * rewards + 0.3, mask, ddof=ddof, eps=0.0) == 0).all()


@given(ragged(elements=whole), array(2, elements=st.floats(0.1, 3)))
def test_gdpo_advantages_normalise_each_reward_then_their_sum(case, weights):
    first, mask = case
    rewards = torch.stack([first, first.flip(-1).square()], -1)
    got = gdpo_advantages(rewards, mask, weights=weights, ddof=1, eps=1e-4)
    total = torch.zeros_like(first)
    for k in range(2):
        for i, (row, keep) in enumerate(zip(rewards[..., k], mask)):
            each = normalised(row[keep].tolist())
            total[i, keep] += weights[k] * torch.tensor(each, dtype=torch.float64)
    expected = normalised(total[mask].tolist())
    assert got[mask].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (got[~mask] == 0).all()


@given(trajectories(count=0), unit)
def test_reinforce_pp_advantages_are_whitened_returns(case, discount):
    mask, score = case
    rewards = last_token_reward(score, mask)
    got = reinforce_pp_advantages(rewards, mask, discount=discount, eps=1e-8)
    returns = discounted_returns(rewards, mask, discount=discount)
    close(got, whiten(returns, mask, eps=1e-8, shift_mean=True), rtol=0, atol=0)


@given(array(2, 3), masks(2, 3, 5))
def test_reinforce_pp_with_a_baseline_weighs_every_kept_token_the_same(rewards, mask):
    got = reinforce_pp_baseline_advantages(rewards, mask, eps=1e-8)
    rows = mask.any(-1)
    means = [statistics.fmean(g[k].tolist()) if k.any() else 0.0 for g, k in zip(rewards, rows)]
    centred = [r - mean for g, mean in zip(rewards.tolist(), means) for r in g]
    tokens = [a for a, keep in zip(centred, mask.flatten(0, 1)) for m in keep if m]
    if tokens:
        mean, scale = statistics.fmean(tokens), (statistics.pvariance(tokens) + 1e-8) ** 0.5
        expected = [(a - mean) / scale for a in tokens]
        assert got[mask].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (got[~mask] == 0).all()


@given(ragged(elements=whole))
def test_a_group_is_informative_where_its_kept_rewards_differ(case):
    rewards, mask = case
    got = informative_groups(rewards, mask)
    assert got.tolist() == [len(set(r[k].tolist())) > 1 for r, k in zip(rewards, mask)]
    assert (dr_grpo_advantages(rewards, mask)[~got] == 0).all()


@given(array(3, 2, elements=whole), array(3, 2, 4), masks(3, 2, 4))
def test_leaving_out_uninformative_groups_is_gpgs_factor(rewards, logprobs, mask):
    """Of answers of one length: α = B/(B − M), M the samples of groups without a signal."""
    mask = mask | True
    informative = informative_groups(rewards)
    assume(informative.any())
    losses = policy_gradient(logprobs, dr_grpo_advantages(rewards)[..., None])
    kept = token_mean(mask & informative[:, None, None], dtype=torch.float64)
    alpha = len(rewards) / informative.sum()
    everything = token_mean(mask, dtype=torch.float64)
    close(weighted_sum(losses, kept), alpha * weighted_sum(losses, everything))


def test_advantages_of_a_batch_refuse_what_does_not_fit_by_name():
    rewards = torch.zeros(2, 3)
    with refused("one weight for each objective"):
        gdpo_advantages(rewards, weights=torch.ones(2), ddof=1, eps=0.1)
    with refused("eps must be"):
        lite_ppo_advantages(rewards, ddof=1, eps=-0.1)
    with refused("ddof must be 0"):
        lite_ppo_advantages(rewards, ddof=2, eps=0.1)
