"""Laws of sequence.py: whole answers, ragged, against loops over their kept tokens."""

import math

import pytest
import torch
from cases_losses import refused
from cases_returns import trajectories
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.offpolicy import cispo
from rlhf_fn.policy import clipped_surrogate, policy_gradient
from rlhf_fn.sequence import (
    gmpo,
    gspo,
    gspo_token,
    masked_max,
    masked_mean,
    masked_sum,
    mean_log_ratio,
    perplexity,
    sum_log_ratio,
    vespo,
)
from rlhf_fn.weights import sequence_mean, sequence_sum, weighted_sum

clips = st.floats(0.01, 0.9)
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
SHAPE = {"k_positive": 2.0, "lam_positive": 3.0, "k_negative": 3.0, "lam_negative": 2.0}
SETTINGS = {gspo: CLIP, gspo_token: CLIP, gmpo: CLIP, vespo: SHAPE}
losses = pytest.mark.parametrize("loss", SETTINGS, ids=lambda f: f.__name__)
close = torch.testing.assert_close


def kept(x, mask):
    """The kept values of each row, as lists."""
    return [[v for v, m in zip(row, keep) if m] for row, keep in zip(x.tolist(), mask.tolist())]


def slope(loss, logprobs, *rest, **settings):
    return grad(lambda x: loss(x, *rest, **settings).sum())(logprobs)


@given(trajectories(count=1))
def test_masked_reductions_are_their_loops(case):
    x, mask, _ = case
    rows = kept(x, mask)
    for name, got, expected in (
        ("sum", masked_sum, math.fsum),
        ("mean", masked_mean, lambda row: math.fsum(row) / max(1, len(row))),
        ("max", masked_max, lambda row: max(row, default=0.0)),
        ("perplexity", perplexity, lambda row: math.exp(-math.fsum(row) / max(1, len(row)))),
    ):
        assert got(x, mask).tolist() == pytest.approx([expected(r) for r in rows]), name


@given(trajectories(count=2))
def test_log_ratios_of_answers_are_their_loops_at_every_kept_token(case):
    *logprobs, mask, _ = case
    total, mean = sum_log_ratio(*logprobs, mask), mean_log_ratio(*logprobs, mask)
    for i, row in enumerate(kept(logprobs[0] - logprobs[1], mask)):
        for t in range(mask.shape[1]):
            here = mask[i, t].item()
            assert total[i, t].item() == pytest.approx(math.fsum(row) if here else 0.0)
            expected = math.fsum(row) / len(row) if here else 0.0
            assert mean[i, t].item() == pytest.approx(expected, abs=1e-12)


@given(trajectories(count=3), clips, clips)
def test_gspo_is_its_loop(case, low, high):
    *inputs, mask, _ = case
    loss = gspo(*inputs, mask, clip_low=low, clip_high=high)
    same = gspo_token(*inputs, mask, clip_low=low, clip_high=high)
    close(loss, same)
    rows = kept(inputs[0] - inputs[1], mask)
    for i, row in enumerate(rows):
        s = math.exp(math.fsum(row) / max(1, len(row)))
        for t in range(mask.shape[1]):
            a = inputs[2][i, t].item()
            expected = -min(s * a, max(1 - low, min(1 + high, s)) * a) if mask[i, t] else 0.0
            assert loss[i, t].item() == pytest.approx(expected, abs=1e-12)


@given(trajectories(count=3), clips, clips, st.sampled_from([1, 100]))
def test_gmpo_is_its_loop(case, low, high, part):
    *inputs, mask, _ = case
    advantages = inputs[2][:, :1] / part
    loss = gmpo(*inputs[:2], advantages, mask, clip_low=low, clip_high=high)
    for i, row in enumerate(kept(inputs[0] - inputs[1], mask)):
        a = advantages[i].item()
        sign = (a > 0) - (a < 0)
        clipped = [sign * min(sign * x, sign * max(-low, min(high, x))) for x in row]
        expected = -a * math.exp(math.fsum(clipped) / max(1, len(row)))
        for t in range(mask.shape[1]):
            assert loss[i, t].item() == pytest.approx(expected if mask[i, t] else 0, abs=1e-12)


@given(trajectories(count=3), st.floats(0, 3), st.floats(0.1, 3), st.floats(0, 3))
def test_vespo_is_its_loop(case, k, lam, k_negative):
    *inputs, mask, _ = case
    numbers = {"k_positive": k, "lam_positive": lam, "k_negative": k_negative, "lam_negative": 2.0}
    loss = vespo(*inputs, mask, **numbers)
    for i, row in enumerate(kept(inputs[0] - inputs[1], mask)):
        w = math.exp(math.fsum(row))
        for t in range(mask.shape[1]):
            a, logprob = inputs[2][i, t].item(), inputs[0][i, t].item()
            power, rate = (k, lam) if a >= 0 else (k_negative, 2.0)
            weight = w**power * math.exp(rate - rate * w) if rate * w < 700 else 0.0
            expected = -weight * a * logprob if mask[i, t] else 0.0
            assert loss[i, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@losses
@given(trajectories(count=2))
def test_at_ratio_one_every_answer_has_the_gradient_of_reinforce_over_its_tokens(loss, case):
    """gspo and gmpo share an answer's gradient out evenly, so their sum over a row is compared."""
    logprobs, advantages, mask, _ = case
    one = advantages[:, :1]
    got = slope(loss, logprobs, logprobs.clone(), one, mask, **SETTINGS[loss])
    expected = torch.where(mask, slope(policy_gradient, logprobs, one), 0.0)
    close(got, expected)


@given(trajectories(count=3), clips)
def test_gspo_of_one_token_is_ppo(case, clip):
    *inputs, mask, _ = case
    one = mask & (mask.cumsum(-1) == 1)
    both = {"clip_low": clip, "clip_high": clip}
    expected = torch.where(one, clipped_surrogate(*inputs, **both), 0.0)
    for loss in (gspo, gspo_token):
        close(loss(*inputs, one, **both), expected)
        got = slope(loss, *inputs, one, **both)
        close(got, torch.where(one, slope(clipped_surrogate, *inputs, **both), 0.0))


@given(trajectories(count=3), clips)
def test_gspo_token_with_one_advantage_has_the_value_and_the_gradient_of_gspo(case, clip):
    logprobs, old_logprobs, advantages, mask, _ = case
    rest = old_logprobs, advantages[:, :1], mask
    both, weights = {"clip_low": clip, "clip_high": clip}, sequence_mean(mask, dtype=torch.float64)
    objectives = [
        lambda x, loss=loss: weighted_sum(loss(x, *rest, **both), weights)
        for loss in (gspo, gspo_token)
    ]
    close(objectives[0](logprobs), objectives[1](logprobs))
    close(grad(objectives[0])(logprobs), grad(objectives[1])(logprobs))


@given(trajectories(count=3), clips)
def test_gspo_token_gives_each_token_the_gradient_of_its_own_advantage(case, clip):
    """Unlike gspo, whose gradient an answer's tokens share."""
    logprobs, old_logprobs, advantages, mask, _ = case
    both = {"clip_low": clip, "clip_high": clip}
    loss = gspo_token(logprobs, old_logprobs, advantages, mask, **both)
    s = mean_log_ratio(logprobs, old_logprobs, mask).exp()
    clipped = torch.where(advantages > 0, s > 1 + clip, s < 1 - clip)
    expected = torch.where(mask & ~clipped, -s * advantages, 0.0)
    close(slope(gspo_token, logprobs, old_logprobs, advantages, mask, **both), expected)
    assert (loss[~mask] == 0).all()


@given(trajectories(count=3), clips)
def test_length_times_gspo_is_gspo_under_the_weights_sequence_sum(case, clip):
    *inputs, mask, _ = case
    inputs[2] = inputs[2][:, :1]
    loss = gspo(*inputs, mask, clip_low=clip, clip_high=clip)
    length = mask.sum(-1)
    luspo = (length * masked_mean(loss, mask)).sum() / max(1, int((length > 0).sum()))
    close(weighted_sum(loss, sequence_sum(mask, dtype=torch.float64)), luspo)


@given(trajectories(count=3))
def test_gmpo_and_gspo_are_one_without_their_clips(case):
    *inputs, mask, _ = case
    free = {"clip_low": math.inf, "clip_high": math.inf}
    close(gmpo(*inputs, mask, **free), gspo(*inputs, mask, **free))


@given(trajectories(count=3), st.floats(0.1, 3), st.floats(0.1, 3))
def test_vespo_fades_far_from_ratio_one_and_never_overflows(case, k, lam):
    *inputs, mask, _ = case
    numbers = {"k_positive": k, "lam_positive": lam, "k_negative": k, "lam_negative": lam}
    far = vespo(300 * inputs[0], inputs[1], inputs[2], mask, **numbers)
    assert far.isfinite().all()
    if k == lam:  # then 1 is where φ is largest
        reinforce = cispo(*inputs, clip_low=0.0, clip_high=0.0).abs()
        assert (vespo(*inputs, mask, **numbers).abs() <= reinforce + 1e-12).all()


@losses
def test_losses_of_answers_refuse_other_shapes_by_name(loss):
    x, mask = torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool)
    with refused("old_logprobs"):
        loss(x, x[0], x, mask, **SETTINGS[loss])
    with refused(r"advantages are .*expected \(3, 5\), or \(3, 1\)"):
        loss(x, x, x[:, 0], mask, **SETTINGS[loss])
    with refused("mask must be torch.bool", TypeError):
        loss(x, x, x, x, **SETTINGS[loss])


def test_vespo_refuses_a_weight_that_does_not_fade():
    x, mask = torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool)
    with refused("lam_negative must be"):
        vespo(x, x, x, mask, **SHAPE | {"lam_negative": 0.0})
    with refused("k_positive must be"):
        vespo(x, x, x, mask, **SHAPE | {"k_positive": -1.0})
