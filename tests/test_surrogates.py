"""Laws of the policy losses beside PPO's, and each as a float64 loop over tokens."""

import math

import pytest
import torch
from cases_losses import array, arrays, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.kl import k2
from rlhf_fn.offpolicy import cispo, dro, sapo, topr
from rlhf_fn.policy import (
    approximate_kl,
    clipped_surrogate,
    decoupled_surrogate,
    dual_clipped_surrogate,
    penalised_surrogate,
    policy_gradient,
)

clips = st.floats(0.01, 0.9)
positive = st.floats(0.1, 3)
CLIP = {"clip_low": clips, "clip_high": clips}


def clamp(x, low, high):
    return max(low, min(high, x))


def dual_loop(new, old, a, clip_low, clip_high, dual_clip):
    ratio = math.exp(new - old)
    gain = min(ratio * a, clamp(ratio, 1 - clip_low, 1 + clip_high) * a)
    return -(max(gain, dual_clip * a) if a < 0 else gain)


def two_sided_loop(new, old, a, clip_low, clip_high, dual_clip):
    ratio = math.exp(new - old)
    clipped = clamp(ratio, 1 - clip_low, 1 + clip_high)
    return -min(min(ratio, dual_clip) * a, clipped * a)


def cispo_loop(new, old, a, clip_low, clip_high):
    return -clamp(math.exp(new - old), 1 - clip_low, 1 + clip_high) * a * new


def topr_loop(new, old, a):
    return -a * new if a >= 0 else -min(1.0, math.exp(new - old)) * a * new


def sapo_loop(new, old, a, temperature_positive, temperature_negative):
    tau = temperature_positive if a > 0 else temperature_negative
    return -4 / tau / (1 + math.exp(-tau * (math.exp(new - old) - 1))) * a


def dro_loop(new, old, a, beta):
    return -a * new + beta / 2 * (new - old) ** 2


LOOPS = {  # name: the function, a strategy for each of its settings, one token's loss
    "dual": (dual_clipped_surrogate, CLIP | {"dual_clip": st.floats(1.01, 5)}, dual_loop),
    "two-sided": (dual_clipped_surrogate, CLIP | {"dual_clip": st.floats(2, 5)}, two_sided_loop),
    "penalised": (
        penalised_surrogate,
        {"beta": positive},
        lambda new, old, a, beta: (
            -math.exp(new - old) * a + beta * (math.exp(new - old) - 1 - (new - old))
        ),
    ),
    "cispo": (cispo, CLIP, cispo_loop),
    "topr": (topr, {}, topr_loop),
    "sapo": (sapo, dict.fromkeys(["temperature_positive", "temperature_negative"], positive),
             sapo_loop),
    "dro": (dro, {"beta": positive}, dro_loop),
}  # fmt: skip
SETTINGS = {  # one of each, for what holds whatever they are
    dual_clipped_surrogate: {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
    penalised_surrogate: {"beta": 0.1},
    cispo: {"clip_low": 0.2, "clip_high": 0.28},
    topr: {},
    sapo: {"temperature_positive": 1.0, "temperature_negative": 1.05},
    dro: {"beta": 0.1},
}
losses = pytest.mark.parametrize("loss", SETTINGS, ids=lambda f: f.__name__)


def gradient(loss, x, *rest, **settings):
    return grad(lambda x: loss(x, *rest, **settings).sum())(x)


@pytest.mark.parametrize("name", LOOPS)
@given(arrays(3), st.data())
def test_a_policy_loss_is_its_loop(name, inputs, data):
    function, strategies, formula = LOOPS[name]
    settings = data.draw(st.fixed_dictionaries(strategies))
    out = function(*inputs, **settings)
    for got, *token in zip(*[x.flatten().tolist() for x in (out, *inputs)]):
        assert got == pytest.approx(formula(*token, **settings), rel=1e-9, abs=1e-9)


@losses
@given(arrays(2, dtype=torch.float32))
def test_at_ratio_one_every_policy_loss_has_the_gradient_of_reinforce(loss, inputs):
    logprobs, advantages = inputs
    slope = gradient(loss, logprobs, logprobs.clone(), advantages, **SETTINGS[loss])
    torch.testing.assert_close(slope, gradient(policy_gradient, logprobs, advantages))


@losses
@given(arrays(3))
def test_one_advantage_per_sequence_is_that_advantage_at_every_token(loss, inputs):
    logprobs, old_logprobs, advantages = inputs
    one = advantages[..., :1]
    short = loss(logprobs, old_logprobs, one, **SETTINGS[loss])
    long = loss(logprobs, old_logprobs, one.expand_as(logprobs), **SETTINGS[loss])
    torch.testing.assert_close(short, long, rtol=0, atol=0)


@given(arrays(3), clips, clips)
def test_dual_clipped_surrogate_without_its_clip_is_clipped_surrogate(inputs, low, high):
    clip = {"clip_low": low, "clip_high": high}
    expected = clipped_surrogate(*inputs, **clip)
    assert (dual_clipped_surrogate(*inputs, **clip, dual_clip=math.inf) == expected).all()
    slopes = grad(
        lambda *x: dual_clipped_surrogate(*x, **clip, dual_clip=math.inf).sum(), (0, 1, 2)
    )(*inputs)
    assert all(slope.isfinite().all() for slope in slopes)


@given(arrays(3), clips, st.floats(1.01, 5))
def test_a_dual_clip_bounds_the_loss_of_a_bad_token(inputs, clip, dual_clip):
    *_, advantages = inputs
    loss = dual_clipped_surrogate(*inputs, clip_low=clip, clip_high=clip, dual_clip=dual_clip)
    assert (loss <= -dual_clip * advantages.clamp(max=0) + 1e-12).all()


@given(arrays(3), clips, st.floats(1.01, 5))
def test_a_dual_clip_leaves_a_good_token_as_it_is(inputs, clip, dual_clip):
    logprobs, old_logprobs, advantages = inputs
    settings = {"clip_low": clip, "clip_high": clip + 4}
    for good in (advantages.abs(), advantages.abs() / 100):
        got = dual_clipped_surrogate(logprobs, old_logprobs, good, **settings, dual_clip=dual_clip)
        assert (got == clipped_surrogate(logprobs, old_logprobs, good, **settings)).all()


@given(arrays(3), clips)
def test_cispo_gives_every_token_the_gradient_of_its_clipped_weight(inputs, clip):
    logprobs, old_logprobs, advantages = inputs
    weight = (logprobs - old_logprobs).exp().clamp(1 - clip, 1 + clip)
    slope = gradient(cispo, *inputs, clip_low=clip, clip_high=clip)
    torch.testing.assert_close(slope, -weight * advantages)


@given(arrays(3))
def test_unclipped_cispo_has_the_gradient_of_the_unclipped_surrogate(inputs):
    free = {"clip_low": math.inf, "clip_high": math.inf}
    slope = gradient(cispo, *inputs, **free)
    torch.testing.assert_close(slope, gradient(clipped_surrogate, *inputs, **free))


@given(arrays(3))
def test_topr_is_reinforce_on_good_tokens_and_truncated_reinforce_on_bad_ones(inputs):
    logprobs, _, advantages = inputs
    truncated = cispo(*inputs, clip_low=1.0, clip_high=0.0)
    plain = policy_gradient(logprobs, advantages)
    expected = torch.where(advantages < 0, truncated, plain)
    torch.testing.assert_close(topr(*inputs), expected)
    weight = (-gradient(topr, *inputs) / advantages)[advantages != 0]
    assert (weight >= 0).all() and (weight <= 1 + 1e-12).all()


@given(arrays(3), positive)
def test_the_gradient_of_sapo_never_grows_past_that_of_the_unclipped_surrogate(inputs, tau):
    temperatures = {"temperature_positive": tau, "temperature_negative": tau}
    slope = gradient(sapo, *inputs, **temperatures)
    free = gradient(clipped_surrogate, *inputs, clip_low=math.inf, clip_high=math.inf)
    assert (slope.abs() <= free.abs() + 1e-12).all() and (slope * free >= 0).all()


@given(arrays(3), positive)
def test_dro_has_the_gradient_of_a_squared_error_and_is_least_at_its_optimum(inputs, beta):
    logprobs, old_logprobs, advantages = inputs

    def squared(logprobs):
        return ((advantages - beta * (logprobs - old_logprobs)) ** 2 / (2 * beta)).sum()

    torch.testing.assert_close(gradient(dro, *inputs, beta=beta), grad(squared)(logprobs))
    best = old_logprobs + advantages / beta
    slope = gradient(dro, best, old_logprobs, advantages, beta=beta)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


@given(arrays(3), positive)
def test_dro_is_reinforce_with_a_k2_penalty(inputs, beta):
    logprobs, old_logprobs, advantages = inputs
    expected = policy_gradient(logprobs, advantages) + beta * k2(logprobs, old_logprobs)
    torch.testing.assert_close(dro(*inputs, beta=beta), expected)


@given(arrays(3), positive)
def test_penalised_surrogate_is_the_unclipped_one_and_a_penalty(inputs, beta):
    free = clipped_surrogate(*inputs, clip_low=math.inf, clip_high=math.inf)
    torch.testing.assert_close(penalised_surrogate(*inputs, beta=0.0), free)
    penalty = beta * approximate_kl(*inputs[:2])
    torch.testing.assert_close(penalised_surrogate(*inputs, beta=beta), free + penalty)


@given(array(6), array(6), positive)
def test_the_penalty_descends_the_divergence_of_the_old_policy_from_the_new(new, old, beta):
    """By enumerating a vocabulary of six, with tokens drawn from the old policy."""
    old = old.log_softmax(-1)

    def expected(logits):
        logprobs = logits.log_softmax(-1)
        return (old.exp() * penalised_surrogate(logprobs, old, 0 * old, beta=beta)).sum()

    exact = grad(lambda z: beta * (old.exp() * (old - z.log_softmax(-1))).sum())(new)
    torch.testing.assert_close(grad(expected)(new), exact, rtol=1e-9, atol=1e-9)


@given(arrays(4), clips, clips)
def test_decoupled_surrogate_weighs_the_clipped_one_by_how_likely_its_sample_has_become(
    inputs, low, high
):
    logprobs, prox, old_logprobs, advantages = inputs
    clip = {"clip_low": low, "clip_high": high}
    loss = decoupled_surrogate(*inputs, **clip)
    near = clipped_surrogate(logprobs, prox, advantages, **clip)
    torch.testing.assert_close(loss, (prox - old_logprobs).exp() * near)
    on_policy = decoupled_surrogate(logprobs, old_logprobs, old_logprobs, advantages, **clip)
    expected = clipped_surrogate(logprobs, old_logprobs, advantages, **clip)
    torch.testing.assert_close(on_policy, expected, rtol=0, atol=0)


@losses
def test_a_policy_loss_refuses_other_shapes_by_name(loss):
    x = torch.zeros(3, 5)
    with refused("old_logprobs"):
        loss(x, x[0], x, **SETTINGS[loss])
    with refused(r"advantages are .*expected \(3, 5\), or \(3, 1\)"):
        loss(x, x, x[:, 0], **SETTINGS[loss])


def test_a_policy_loss_refuses_settings_that_cannot_mean_anything():
    x = torch.zeros(3, 5)
    with refused("dual_clip must be a number > 1, got 1.0"):
        dual_clipped_surrogate(x, x, x, clip_low=0.2, clip_high=0.2, dual_clip=1.0)
    with refused("prox_logprobs"):
        decoupled_surrogate(x, x[0], x, x, clip_low=0.2, clip_high=0.2)
    with refused("clip_low must be"):
        cispo(x, x, x, clip_low=-0.1, clip_high=0.2)
    with refused("temperature_negative must be"):
        sapo(x, x, x, temperature_positive=1.0, temperature_negative=0.0)
    for loss in (dro, penalised_surrogate):
        with refused("beta must be"):
            loss(x, x, x, beta=-0.1)
