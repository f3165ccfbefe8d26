"""Laws of groups.py on ragged groups, and a float64 loop beside each formula."""

import statistics
from functools import partial

import pytest
import torch
from cases_ground import masks
from cases_groups import ragged, shapes
from cases_losses import array, finite, refused
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.func import grad, jacrev

from rlhf_fn.groups import (
    dr_grpo_advantages,
    grpo_advantages,
    maxrl_advantages,
    opo_advantages,
    pass_at_k_advantages,
    remax_advantages,
    rloo_advantages,
)
from rlhf_fn.policy import policy_gradient

close = torch.testing.assert_close


def lengths_of(rewards):
    """A length per answer, anything from 1 up, that permutes and pads with its reward."""
    return 1 + (7 * rewards).nan_to_num(0.0).abs().long() % 5


ADVANTAGES = {  # every one that is a function of a group's rewards, as (rewards, mask)
    "grpo": partial(grpo_advantages, ddof=1, eps=1e-4),
    "grpo, ddof 0": partial(grpo_advantages, ddof=0, eps=1e-9),
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "opo": lambda rewards, mask=None: opo_advantages(rewards, lengths_of(rewards), mask),
    "pass_at_k": pass_at_k_advantages,
    "maxrl": lambda rewards, mask=None: maxrl_advantages(rewards**2, mask, eps=1e-4),
}
every = pytest.mark.parametrize("name", ADVANTAGES)


def loop(name, row, lengths):
    """The advantages of one group, from the list of its kept rewards."""
    if len(row) < 2:
        return [0.0] * len(row)
    mean = statistics.fmean(row)
    centred = [r - mean for r in row]
    others = [[r for j, r in enumerate(row) if j != i] for i in range(len(row))]
    if name.startswith("grpo"):
        ddof, eps = (0, 1e-9) if "0" in name else (1, 1e-4)
        return [
            r / ((sum(c * c for c in centred) / (len(row) - ddof)) ** 0.5 + eps) for r in centred
        ]
    if name == "opo":
        baseline = sum(r * n for r, n in zip(row, lengths)) / sum(lengths)
        return [r - baseline for r in row]
    if name == "maxrl":
        squares = [r * r for r in row]
        mean = statistics.fmean(squares)
        return [(r - mean) / (mean + 1e-4) for r in squares]
    return {
        "dr_grpo": centred,
        "rloo": [r - statistics.fmean(rest) for r, rest in zip(row, others)],
        "pass_at_k": [max(row) - max(rest) for rest in others],
    }[name]


@every
@given(ragged(elements=st.integers(-4, 4).map(lambda n: n / 4)))
def test_advantages_of_a_group_are_their_loop_over_the_kept_samples(name, case):
    rewards, mask = case
    got = ADVANTAGES[name](rewards, mask)
    assert (got[~mask] == 0).all()
    for out, row, keep in zip(got, rewards, mask):
        expected = loop(name, row[keep].tolist(), lengths_of(row[keep]).tolist())
        assert out[keep].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@every
@given(st.data())
def test_a_whole_group_needs_no_mask(name, data):
    rewards = data.draw(shapes.flatmap(lambda shape: array(*shape)))
    everything = torch.ones_like(rewards, dtype=torch.bool)
    close(ADVANTAGES[name](rewards), ADVANTAGES[name](rewards, everything), rtol=0, atol=0)


@every
@given(finite, masks(3, 9))
def test_advantages_of_equal_rewards_are_exactly_zero_with_a_finite_gradient(name, reward, mask):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rewards = torch.full(mask.shape, reward, dtype=dtype)
        assert (ADVANTAGES[name](rewards, mask) == 0).all()
        slope = grad(lambda r: (ADVANTAGES[name](r, mask) * torch.arange(9)).sum())(rewards)
        assert slope.isfinite().all() and (slope[~mask] == 0).all()


@every
@given(ragged(), st.sampled_from([torch.nan, torch.inf, 1e30]))
def test_advantages_never_read_a_reward_that_is_not_kept(name, case, poison):
    rewards, mask = case
    close(
        ADVANTAGES[name](torch.where(mask, rewards, poison), mask),
        ADVANTAGES[name](torch.where(mask, rewards, 0.0), mask),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", sorted(ADVANTAGES.keys() - {"maxrl"}))  # that one knows the level
@given(ragged(), st.integers(-8, 8))
def test_advantages_do_not_depend_on_what_all_rewards_share(name, case, shift):
    rewards, mask = case
    lengths = lengths_of(rewards)
    if name == "opo":
        close(
            opo_advantages(rewards + shift, lengths, mask), opo_advantages(rewards, lengths, mask)
        )
    else:
        close(ADVANTAGES[name](rewards + shift, mask), ADVANTAGES[name](rewards, mask))


@every
@given(array(2, 5), st.permutations(range(5)))
def test_advantages_do_not_depend_on_the_order_of_a_group(name, rewards, order):
    close(ADVANTAGES[name](rewards[:, order]), ADVANTAGES[name](rewards)[:, order])


@every
@given(array(3, 4))
def test_advantages_of_a_prompt_do_not_depend_on_the_other_prompts(name, rewards):
    changed = torch.cat([rewards[:1], 7 * rewards[1:] + 3])
    close(ADVANTAGES[name](changed)[0], ADVANTAGES[name](rewards)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["grpo", "grpo, ddof 0", "dr_grpo", "rloo"])
@given(ragged())
def test_advantages_of_a_group_sum_to_nought(name, case):
    total = ADVANTAGES[name](*case).sum(-1)
    close(total, torch.zeros_like(total), rtol=0, atol=1e-9)


@given(ragged(), st.floats(0.1, 10))
def test_grpo_advantages_do_not_depend_on_the_reward_scale(case, scale):
    rewards, mask = case
    rewards = torch.where(mask, rewards.round(), 0.0)
    a = grpo_advantages(rewards, mask, ddof=1, eps=0.0)
    close(grpo_advantages(scale * rewards, mask, ddof=1, eps=0.0), a)


@given(shapes.flatmap(lambda shape: array(*shape)), st.sampled_from([0, 1]))
def test_grpo_advantages_have_mean_zero_and_std_one(rewards, ddof):
    assume((rewards.std(-1) > 1e-3).all())
    a = grpo_advantages(rewards, ddof=ddof, eps=0.0)
    close(a.mean(-1), torch.zeros_like(a[:, 0]), rtol=0, atol=1e-9)
    close(a.std(-1, correction=ddof), torch.ones_like(a[:, 0]), rtol=1e-9, atol=0)


@given(finite, st.integers(2, 9), st.sampled_from([1e-6, 1e-4, 1.0]))
def test_grpo_advantages_of_equal_rewards_have_the_gradient_of_their_formula(reward, group, eps):
    rewards = torch.full((group,), reward, dtype=torch.float64)
    slope = jacrev(lambda r: grpo_advantages(r, ddof=1, eps=eps))(rewards)
    close(slope, (torch.eye(group).double() - 1 / group) / eps)


@given(finite, st.integers(2, 9))
def test_grpo_advantages_have_a_finite_gradient_even_without_eps(reward, group):
    rewards = torch.full((group,), reward, dtype=torch.float32)
    cotangent = torch.arange(group) * 1.0
    slope = grad(lambda r: (cotangent * grpo_advantages(r, ddof=1, eps=0.0)).sum())(rewards)
    assert slope.isfinite().all()


def test_maxrl_advantages_of_a_prompt_without_a_success_are_zero_even_without_eps():
    assert (maxrl_advantages(torch.zeros(2, 3), eps=0.0) == 0).all()


@given(array(4), array(4))
def test_the_advantages_of_leave_one_out_are_an_unbiased_policy_gradient(logits, rewards):
    """By enumerating every group of 3 samples from a vocabulary of 4."""
    logprobs = logits.log_softmax(-1)
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)
    chance = logprobs[groups].sum(-1).exp()

    def expected(logits):
        losses = policy_gradient(logits.log_softmax(-1)[groups], rloo_advantages(rewards[groups]))
        return (chance * losses.mean(-1)).sum()

    exact = grad(lambda z: -(z.softmax(-1) * rewards).sum())(logits)
    close(grad(expected)(logits), exact, rtol=1e-9, atol=1e-9)


@given(array(3), array(3))
def test_pass_at_k_advantages_are_an_unbiased_gradient_of_the_best_of_k(logits, rewards):
    """By enumerating every group of 3 samples from a vocabulary of 3."""
    groups = torch.cartesian_prod(*[torch.arange(3)] * 3)

    def best(logits):
        return (logits.log_softmax(-1)[groups].sum(-1).exp() * rewards[groups].amax(-1)).sum()

    def surrogate(logits):
        logprobs = logits.log_softmax(-1)[groups]
        losses = policy_gradient(logprobs, pass_at_k_advantages(rewards[groups])).sum(-1)
        return (logprobs.sum(-1).exp().detach() * losses).sum()

    close(grad(surrogate)(logits), -grad(best)(logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (4, 0)])
@every
def test_a_group_too_small_to_compare_is_refused(name, shape):
    with refused(r"rewards are .*2 samples or more"):
        ADVANTAGES[name](torch.zeros(shape))


def test_rewards_that_would_poison_their_group_are_refused_by_position():
    rewards = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    for advantages in ADVANTAGES.values():
        with refused(r"rewards\[1, 1\] is nan"):
            advantages(rewards)
        with refused("mask must be torch.bool", TypeError):
            advantages(rewards, rewards)
        with refused("rewards must be floating point", TypeError):
            advantages(torch.tensor([[0, 1]]))
    with refused(r"greedy_rewards\[0\] is nan"):
        remax_advantages(rewards[:1], rewards[1, 1:])


def test_settings_of_advantages_that_cannot_mean_anything_are_refused():
    rewards = torch.zeros(2, 3)
    with refused("eps must be"):
        grpo_advantages(rewards, ddof=1, eps=-1.0)
    with refused("ddof must be 0"):
        grpo_advantages(rewards, ddof=2, eps=0.1)
    with refused("lengths must be at least 1"):
        opo_advantages(rewards, torch.zeros(2, 3, dtype=torch.long))
    with refused("rewards must be >= 0, got -1.0"):
        maxrl_advantages(rewards - 1, eps=0.1)
    with refused("one greedy reward per prompt"):
        remax_advantages(rewards, rewards)
