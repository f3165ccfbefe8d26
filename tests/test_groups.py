"""Laws of groups.py, and a float64 loop beside the formula."""

import statistics

import pytest
import torch
from cases_losses import array, arrays, finite, refused
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, jacrev

from rlhf_fn.groups import grpo_advantages

groups = arrays(1, least=(1, 2), most=(3, 8)).map(lambda xs: xs[0])


@given(groups, st.sampled_from([1e-9, 1e-6, 1e-4, 1e-2, 1.0]))
def test_grpo_advantages_are_their_loop(rewards, eps):
    for row, got in zip(rewards.tolist(), grpo_advantages(rewards, eps=eps).tolist()):
        scale = statistics.stdev(row) + eps
        expected = [(r - statistics.mean(row)) / scale for r in row]
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(finite, st.integers(2, 33), st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-4]))
def test_grpo_advantages_of_equal_rewards_are_exactly_zero(reward, group, eps):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rewards = torch.full((group,), reward, dtype=dtype)
        assert (grpo_advantages(rewards, eps=eps) == 0).all()


@given(finite, st.integers(2, 9), st.sampled_from([1e-6, 1e-4, 1.0]))
def test_grpo_advantages_of_equal_rewards_have_the_gradient_of_their_formula(reward, group, eps):
    rewards = torch.full((group,), reward, dtype=torch.float64)
    slope = jacrev(lambda r: grpo_advantages(r, eps=eps))(rewards)
    torch.testing.assert_close(slope, (torch.eye(group).double() - 1 / group) / eps)


@given(finite, st.integers(2, 9))
def test_grpo_advantages_have_a_finite_gradient_even_without_eps(reward, group):
    rewards = torch.full((group,), reward, dtype=torch.float32)
    cotangent = torch.arange(group) * 1.0
    slope = grad(lambda r: (cotangent * grpo_advantages(r, eps=0.0)).sum())(rewards)
    assert slope.isfinite().all()


@given(groups, finite, st.floats(0.1, 10))
def test_grpo_advantages_do_not_depend_on_the_reward_scale(rewards, shift, scale):
    spread = rewards.std(-1) > 1e-3
    a = grpo_advantages(rewards[spread], eps=0.0)
    b = grpo_advantages(scale * rewards[spread] + shift, eps=0.0)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@given(groups)
def test_grpo_advantages_have_mean_zero_and_std_one(rewards):
    assume((rewards.std(-1) > 1e-3).all())
    a = grpo_advantages(rewards, eps=0.0)
    torch.testing.assert_close(a.mean(-1), torch.zeros_like(a[:, 0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(a.std(-1), torch.ones_like(a[:, 0]), rtol=1e-9, atol=0)


@given(array(2, 5), st.permutations(range(5)))
def test_grpo_advantages_do_not_depend_on_the_order_of_a_group(rewards, order):
    shuffled = grpo_advantages(rewards[:, order], eps=1e-4)
    torch.testing.assert_close(shuffled, grpo_advantages(rewards, eps=1e-4)[:, order])


@given(array(3, 4))
def test_grpo_advantages_of_a_prompt_do_not_depend_on_the_other_prompts(rewards):
    changed = torch.cat([rewards[:1], 7 * rewards[1:] + 3])
    torch.testing.assert_close(
        grpo_advantages(changed, eps=1e-4)[0], grpo_advantages(rewards, eps=1e-4)[0], rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 0)])
def test_a_group_too_small_to_compare_is_refused(shape):
    with refused(r"rewards are .*2 samples or more"):
        grpo_advantages(torch.zeros(shape), eps=1e-4)


def test_rewards_that_would_poison_their_group_are_refused_by_position():
    rewards = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    with refused(r"rewards\[1, 1\] is nan"):
        grpo_advantages(rewards, eps=1e-4)
    with refused("eps must be"):
        grpo_advantages(rewards[:1], eps=-1.0)
    with refused("rewards must be floating point", TypeError):
        grpo_advantages(torch.tensor([[0, 1]]), eps=1e-4)
