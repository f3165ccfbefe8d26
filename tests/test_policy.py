"""Laws of policy.py, and a float64 loop beside each formula."""

import math

import pytest
import torch
from cases_losses import array, arrays, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from rlhf_fn.policy import (
    approximate_kl,
    clip_fraction,
    clipped_surrogate,
    entropy_bonus,
    policy_gradient,
)

clips = st.floats(0.01, 0.9)
logprob = st.floats(-700, 0, width=32)


def gradient(loss, x, *rest, **settings):
    return grad(lambda x: loss(x, *rest, **settings).sum())(x)


@given(arrays(3), clips, clips)
def test_clipped_surrogate_is_its_loop(inputs, clip_low, clip_high):
    loss = clipped_surrogate(*inputs, clip_low=clip_low, clip_high=clip_high)
    for got, new, old, advantage in zip(*[x.flatten().tolist() for x in (loss, *inputs)]):
        ratio = math.exp(new - old)
        clipped = max(1 - clip_low, min(1 + clip_high, ratio))
        assert got == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)


@given(arrays(3), clips, clips)
def test_clip_fraction_is_its_loop(inputs, clip_low, clip_high):
    fraction = clip_fraction(*inputs, clip_low=clip_low, clip_high=clip_high)
    for got, new, old, advantage in zip(*[x.flatten().tolist() for x in (fraction, *inputs)]):
        ratio = math.exp(new - old)
        clipped = ratio > 1 + clip_high if advantage > 0 else ratio < 1 - clip_low
        assert got == float(advantage != 0 and clipped)


@given(array(3, 4, elements=logprob, dtype=torch.float32), array(3, 4, dtype=torch.float32), clips)
def test_the_first_epoch_is_exactly_reinforce(logprobs, advantages, clip):
    settings = {"clip_low": clip, "clip_high": clip}
    inputs = logprobs, logprobs.clone(), advantages
    assert (clipped_surrogate(*inputs, **settings) == -advantages).all()
    assert (clip_fraction(*inputs, **settings) == 0).all()
    assert (clip_fraction(*inputs, clip_low=0.0, clip_high=0.0) == 0).all()
    assert (approximate_kl(logprobs, logprobs.clone()) == 0).all()
    expected = gradient(policy_gradient, logprobs, advantages)
    assert (gradient(clipped_surrogate, *inputs, **settings) == expected).all()


@given(arrays(3))
def test_clipped_surrogate_with_an_infinite_clip_is_unclipped(inputs):
    logprobs, old_logprobs, advantages = inputs
    loss = clipped_surrogate(*inputs, clip_low=math.inf, clip_high=math.inf)
    expected = -(logprobs - old_logprobs).exp() * advantages
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@given(arrays(3), clips, clips)
def test_clipped_surrogate_is_never_below_the_unclipped_loss(inputs, clip_low, clip_high):
    logprobs, old_logprobs, advantages = inputs
    loss = clipped_surrogate(*inputs, clip_low=clip_low, clip_high=clip_high)
    assert (loss >= -(logprobs - old_logprobs).exp() * advantages).all()


@given(st.floats(1, 1e30), st.sampled_from([0.0, 0.5, 3.0]), clips)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_gain_is_clipped_even_where_its_ratio_has_no_number(dtype, log_ratio, advantage, clip):
    inputs = torch.tensor([[min(log_ratio, torch.finfo(dtype).max)], [0.0], [advantage]])
    logprobs, old, advantages = inputs.to(dtype)
    settings = {"clip_low": clip, "clip_high": clip}
    loss = clipped_surrogate(logprobs, old, advantages, **settings)
    torch.testing.assert_close(loss, -(1 + clip) * advantages, check_dtype=False)
    for argument in range(3):
        slope = grad(lambda *x: clipped_surrogate(*x, **settings).sum(), argnums=argument)
        assert slope(logprobs, old, advantages).isfinite().all()
    assert gradient(clipped_surrogate, logprobs, old, advantages, **settings) == 0


@given(arrays(3), clips, clips)
def test_clip_fraction_is_one_exactly_where_the_clip_takes_the_gradient(inputs, low, high):
    settings = {"clip_low": low, "clip_high": high}
    slope = gradient(clipped_surrogate, *inputs, **settings)
    expected = (slope == 0) & (inputs[2] != 0)
    assert (clip_fraction(*inputs, **settings) == expected).all()


@given(arrays(3), clips)
def test_one_advantage_per_sequence_is_that_advantage_at_every_token(inputs, clip):
    logprobs, old_logprobs, advantages = inputs
    for loss, before in (
        (policy_gradient, (logprobs,)),
        (clipped_surrogate, (logprobs, old_logprobs)),
        (clip_fraction, (logprobs, old_logprobs)),
    ):
        settings = {} if loss is policy_gradient else {"clip_low": clip, "clip_high": clip}
        one = advantages[..., :1]
        short = loss(*before, one, **settings)
        long = loss(*before, one.expand_as(logprobs), **settings)
        torch.testing.assert_close(short, long, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (5,), (5, 3), (1, 5), (3, 2), (2, 3, 5)])
@pytest.mark.parametrize("loss", [policy_gradient, clipped_surrogate, clip_fraction])
def test_advantages_of_another_shape_are_refused_by_name(loss, shape):
    arrays = [torch.zeros(3, 5)] * (1 if loss is policy_gradient else 2)
    settings = {} if loss is policy_gradient else {"clip_low": 0.2, "clip_high": 0.2}
    with refused(r"advantages are .*expected \(3, 5\), or \(3, 1\)"):
        loss(*arrays, torch.zeros(shape), **settings)


def test_old_logprobs_of_another_shape_are_refused_by_name():
    for loss in (clipped_surrogate, clip_fraction):
        with refused("old_logprobs"):
            loss(
                *[torch.zeros(3, 5), torch.zeros(5), torch.zeros(3, 5)], clip_low=0.2, clip_high=0.2
            )
    with refused("logprobs"):
        approximate_kl(torch.zeros(3, 5), torch.zeros(5))


@given(arrays(3), array(4, elements=clips))
def test_clips_may_be_mapped_over(inputs, clip):
    def loss(clip_high):
        return clipped_surrogate(*inputs, clip_low=0.2, clip_high=clip_high)

    torch.testing.assert_close(vmap(loss)(clip), torch.stack([loss(c.item()) for c in clip]))


@given(array(6), array(6))
def test_policy_gradient_points_up_the_expected_advantage(logits, advantages):
    """E_π[∇ L] = −∇ E_π[A], by enumerating a vocabulary of six."""

    def loss(logits):
        logprobs = logits.log_softmax(-1)
        return (logprobs.exp().detach() * policy_gradient(logprobs, advantages)).sum()

    expected = grad(lambda logits: -(logits.softmax(-1) * advantages).sum())(logits)
    torch.testing.assert_close(grad(loss)(logits), expected, rtol=1e-9, atol=1e-9)


@given(array(6), array(6))
def test_approximate_kl_is_in_expectation_the_divergence_of_the_old_policy_from_the_new(new, old):
    new, old = new.log_softmax(-1), old.log_softmax(-1)
    expected = sum(math.exp(q) * (q - p) for p, q in zip(new.tolist(), old.tolist()))
    mean = (old.exp() * approximate_kl(new, old)).sum().item()
    assert mean == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_approximate_kl_is_never_negative(dtype):
    step = torch.logspace(-8, 0, 4001)
    for move in (step, -step):
        new, old = (move - 2).to(dtype), torch.full_like(step, -2).to(dtype)
        assert (approximate_kl(new, old) >= 0).all()


@given(array(6), st.floats(0.001, 1))
def test_descending_the_entropy_bonus_raises_the_entropy(logits, coef):
    def entropy(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1, keepdim=True)

    slope = grad(lambda x: entropy_bonus(entropy(x), coef=coef).sum())(logits)
    torch.testing.assert_close(slope, -coef * grad(lambda x: entropy(x).sum())(logits))
    assert entropy(logits - 1e-3 * slope) >= entropy(logits) - 1e-12
