"""Rows of the contract's table for rewards, critics, fine-tuning and references."""

from functools import partial

import torch
from cases_ground import positive, real
from cases_returns import VOCAB, ids, keep

from rlhf_fn import distillation, moments, references, shaping, value, weights
from rlhf_fn.moments import Moments


def lengths(*shape):
    return torch.randint(1, 20, shape)


def _moments(f, **settings):
    """f of a `Moments` given leaf by leaf."""
    return lambda count, mean, variance, *rest: f(Moments(count, mean, variance), *rest, **settings)


def _state():
    return positive(3), real(3), positive(3)


def _scaled(f):
    return lambda x, *state: f(x, Moments(*state), eps=1e-5)


def _popart(weight, bias, *states):
    return moments.popart(weight, bias, Moments(*states[:3]), Moments(*states[3:]), eps=1e-5)


_weights = torch.tensor([0.3, 1.0, -2.0])

CASES = {
    "add_moments": (_moments(moments.add_moments), lambda: (*_state(), real(3), keep(3, 2)[:, 0])),
    "decay_moments": (
        _moments(moments.decay_moments, rate=0.3),
        lambda: (*_state(), real(3), keep(3, 2)[:, 0]),
    ),
    "normalise": (_scaled(moments.normalise), lambda: (real(3), *_state())),
    "denormalise": (_scaled(moments.denormalise), lambda: (real(3), *_state())),
    "popart": (_popart, lambda: (real(3), real(3), *_state(), *_state())),
    "overlong_penalty": (
        partial(shaping.overlong_penalty, limit=16, buffer=8),
        lambda: (lengths(3, 5),),
    ),
    "missing_eos_penalty": (
        partial(shaping.missing_eos_penalty, penalty=1.0),
        lambda: (real(5), real(5) > 0),
    ),
    "length_reward": (
        shaping.length_reward,
        lambda: (lengths(3, 5), real(3, 5) > 0, keep(3, 5)),
    ),
    "repeated_share": (partial(shaping.repeated_share, n=2), lambda: (ids(3, 9) % 2, keep(3, 9))),
    "combined_reward": (  # of kinds, not of tokens: there is nothing to pad
        lambda rewards, there: shaping.combined_reward(rewards, there, weights=_weights),
        lambda: (real(4, 3), keep(4, 3)),
    ),
    "safe_reward": (partial(shaping.safe_reward, multiplier=0.5), lambda: (real(3), real(3))),
    "huber_value_loss": (
        partial(value.huber_value_loss, delta=0.7),
        lambda: (real(3, 7), real(3, 7)),
    ),
    "quantile_value_loss": (value.quantile_value_loss, lambda: (real(3, 7, 4), real(3, 7))),
    "segment_mean": (weights.segment_mean, lambda: (keep(3, 7), ids(3, 7).cumsum(-1))),
    "smoothed_cross_entropy": (
        partial(distillation.smoothed_cross_entropy, label_smoothing=0.1),
        lambda: (real(3, 7, VOCAB), ids(3, 7)),
    ),
    "dft": (distillation.dft, lambda: (-positive(3, 7),)),
    "generalised_jsd": (
        partial(distillation.generalised_jsd, beta=0.3),
        lambda: (real(3, 7, VOCAB), real(3, 7, VOCAB)),
    ),
    "soft_update": (partial(references.soft_update, rate=0.6), lambda: (real(3, 7), real(3, 7))),
    "periodic_update": (
        partial(references.periodic_update, step=6, every=3),
        lambda: (real(3, 7), real(3, 7)),
    ),
}

WHOLE_BATCH = {"segment_mean", "add_moments", "decay_moments"}
NO_GRADIENT = set()
STOP_GRADIENT = {"dft"}
FLOAT32_FROM_HALF = {"smoothed_cross_entropy", "generalised_jsd"}
