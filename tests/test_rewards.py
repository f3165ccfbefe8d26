import math

import pytest
import torch
from cases_returns import trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.returns import discounted_returns
from rlhf_fn.rewards import (
    discounted_reward,
    last_token_reward,
    shape_rewards,
    uniform_reward,
    whiten,
)

ATTRIBUTIONS = {
    "last": last_token_reward,
    "uniform": uniform_reward,
    "discounted": lambda score, mask: discounted_reward(score, mask, discount=0.9),
    "shaped": lambda score, mask: shape_rewards(score, mask * 1.0, mask * 2.0, mask, beta=0.1),
}
attributions = pytest.mark.parametrize("attribute", ATTRIBUTIONS.values(), ids=ATTRIBUTIONS)
poisons = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@given(trajectories(), st.floats(0, 2))
def test_shape_rewards_is_a_penalty_on_kept_tokens_and_the_score_on_the_last(case, beta):
    logprobs, ref, mask, score = case
    expected = torch.zeros_like(logprobs)
    for i in range(len(mask)):
        kept = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in kept:
            expected[i, t] = -beta * (logprobs[i, t] - ref[i, t])
        if kept:
            expected[i, kept[-1]] += score[i]
    close(shape_rewards(score, logprobs, ref, mask, beta=beta), expected)


@given(trajectories(), st.floats(0, 2))
def test_shaped_rewards_sum_to_the_score_less_beta_times_the_kl(case, beta):
    logprobs, ref, mask, score = case
    kl = torch.where(mask, logprobs - ref, 0.0).sum(-1)
    expected = torch.where(mask.any(-1), score - beta * kl, 0.0)
    close(shape_rewards(score, logprobs, ref, mask, beta=beta).sum(-1), expected)


@given(trajectories(), poisons)
def test_shape_rewards_never_reads_what_the_mask_hides_forward_or_backward(case, poison):
    logprobs, ref, mask, score = case

    def everything(score, *logprobs):
        def total(*args):
            out = shape_rewards(*args, mask, beta=0.3)
            return out.sin().sum(), out

        return grad(total, (0, 1, 2), has_aux=True)(score, *logprobs)

    dirty = score.masked_fill(~mask.any(-1), poison)
    hidden = [x.masked_fill(~mask, poison) for x in (logprobs, ref)]
    clean = everything(score, logprobs, ref)
    torch.testing.assert_close(everything(dirty, *hidden), clean, rtol=0, atol=0)


@pytest.mark.parametrize("attribute", [last_token_reward, uniform_reward])
@given(trajectories(count=0))
def test_an_attributed_score_is_the_sum_of_its_rewards(attribute, case):
    mask, score = case
    rewards = attribute(score, mask)
    close(rewards.sum(-1), torch.where(mask.any(-1), score, 0.0))
    assert (rewards[~mask] == 0).all()


@given(trajectories(count=0))
def test_a_uniform_reward_is_the_same_on_every_kept_token(case):
    mask, score = case
    for row, keep in zip(uniform_reward(score, mask), mask):
        assert len(row[keep].unique()) <= 1


@given(trajectories(count=0), unit)
def test_a_discounted_reward_is_the_return_of_a_last_token_reward(case, discount):
    mask, score = case
    rewards = discounted_reward(score, mask, discount=discount)
    close(rewards, discounted_returns(last_token_reward(score, mask), mask, discount=discount))


@given(trajectories(count=0))
def test_a_discounted_reward_runs_from_the_last_token_to_every_token(case):
    mask, score = case
    close(discounted_reward(score, mask, discount=0.0), last_token_reward(score, mask))
    everywhere = torch.where(mask, score[:, None], 0.0)
    close(discounted_reward(score, mask, discount=1.0), everywhere)


@given(trajectories(count=0), poisons, st.sampled_from([0.0, 0.5, 1.0]))
def test_a_discounted_reward_is_blind_to_the_hidden_in_the_gradient_of_its_discount(
    case, poison, discount
):
    mask, score = case

    def slope(score):
        reward = lambda g: discounted_reward(score, mask, discount=g).sum()  # noqa: E731
        return grad(reward)(torch.tensor(discount, dtype=torch.float64))

    poisoned = score.masked_fill(~mask.any(-1), poison)
    assert slope(poisoned).isfinite()
    torch.testing.assert_close(slope(poisoned), slope(score), rtol=0, atol=0)


@attributions
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named_by_its_row_unless_the_row_is_padding(attribute, bad):
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    with pytest.raises(ValueError, match=r"score\[1\]"):
        attribute(torch.tensor([0.0, bad, 0.0]), mask)
    assert attribute(torch.tensor([0.0, 0.0, bad]), mask).isfinite().all()


@attributions
def test_misuse_is_named(attribute):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="score"):
        attribute(torch.zeros(2, 3), mask)
    with pytest.raises(TypeError, match="mask"):
        attribute(torch.zeros(2), mask.float())
    with pytest.raises(TypeError, match="score"):
        attribute(torch.zeros(2, dtype=torch.long), mask)


@given(trajectories(count=1), st.floats(1e-8, 1), st.booleans())
def test_whiten_is_that_of_a_loop(case, eps, shift_mean):
    x, mask, _ = case
    kept = x[mask].tolist()
    expected = torch.zeros_like(x)
    if kept:
        mean = math.fsum(kept) / len(kept)
        scale = math.sqrt(math.fsum((v - mean) ** 2 for v in kept) / len(kept) + eps)
        white = [(v - mean) / scale + (0.0 if shift_mean else mean) for v in kept]
        expected[mask] = torch.tensor(white, dtype=torch.float64)
    got = whiten(x, mask, eps=eps, shift_mean=shift_mean)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert (got[~mask] == 0).all()


@given(trajectories(count=1), st.floats(0.1, 10), st.floats(-100, 100))
def test_whiten_forgets_scale_and_shift(case, scale, shift):
    x, mask, _ = case
    if mask.any() and x[mask].std(correction=0) > 1e-3:
        whole = {"eps": 1e-12, "shift_mean": True}
        got = whiten(scale * x + shift, mask, **whole)
        torch.testing.assert_close(got, whiten(x, mask, **whole), rtol=1e-4, atol=1e-4)


@given(trajectories(count=1), poisons, st.booleans())
def test_whiten_never_reads_what_the_mask_hides_forward_or_backward(case, poison, shift_mean):
    x, mask, _ = case

    def everything(x):
        def total(x):
            out = whiten(x, mask, eps=1e-6, shift_mean=shift_mean)
            return out.sin().sum(), out

        return grad(total, has_aux=True)(x)

    dirty = everything(x.masked_fill(~mask, poison))
    torch.testing.assert_close(dirty, everything(x), rtol=0, atol=0)
    assert all(y.isfinite().all() for y in dirty)


@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 40))
def test_equal_values_whiten_to_nought_in_float32(value, number):
    x = torch.full((number,), value)
    white = whiten(x, torch.ones(number, dtype=torch.bool), eps=1e-8, shift_mean=True)
    assert (white.abs() <= 1e-5).all()
    kept = whiten(x, torch.ones(number, dtype=torch.bool), eps=1e-8, shift_mean=False)
    torch.testing.assert_close(kept, x)


def test_whiten_keeps_its_digits_far_from_nought():
    torch.manual_seed(0)
    x, mask = 10_000 + torch.randn(500, dtype=torch.float64), torch.rand(500) > 0.2
    exact = whiten(x.float().double(), mask, eps=1e-8, shift_mean=True)
    got = whiten(x.float(), mask, eps=1e-8, shift_mean=True)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)
