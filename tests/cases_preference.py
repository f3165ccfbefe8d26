"""Rows of the contract's table for losses on pairs, answers, rankings and grades; and for loops."""

import math
from functools import partial

import torch
from cases_ground import positive, real
from cases_returns import VOCAB, ids, keep

from rlhf_fn import direct, listwise, pairs, preference, reference_free, unpaired


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def cost(x):
    """−log σ(x)."""
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def pair(f, **settings):
    return partial(f, **settings), lambda: tuple(real(3) for _ in range(4))


def batch(f, **settings):
    return partial(f, **settings), lambda: tuple(real(3, 5) for _ in range(4))


_kto = {"baseline": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5}

CASES = {
    "hinge_dpo": pair(direct.hinge_dpo, beta=0.1),
    "ipo": pair(direct.ipo, beta=0.1),
    "robust_dpo": pair(direct.robust_dpo, beta=0.1, label_smoothing=0.2),
    "exo": pair(direct.exo, beta=0.1, label_smoothing=0.2),
    "nca": pair(direct.nca, beta=0.1),
    "sppo": pair(direct.sppo, beta=0.1),
    "apo_zero": pair(direct.apo_zero, beta=0.1),
    "apo_down": pair(direct.apo_down, beta=0.1),
    "discopop": pair(direct.discopop, beta=0.1, temperature=0.05),
    "bco_pair": pair(direct.bco_pair, beta=0.1, shift=0.2),
    "aot": batch(pairs.aot, beta=0.1, label_smoothing=0.2),
    "aot_unpaired": batch(pairs.aot_unpaired, beta=0.1, label_smoothing=0.2),
    "alpha_divergence_reward": (
        partial(pairs.alpha_divergence_reward, beta=0.1, alpha=0.5),
        lambda: (real(3), real(3)),
    ),
    "jensen_shannon_reward": (
        partial(pairs.jensen_shannon_reward, beta=0.1),
        lambda: (real(3), real(3)),
    ),
    "desensitised_logprob": (
        partial(pairs.desensitised_logprob, alpha=0.3),
        lambda: (real(3, 7), torch.tensor([2, 0, 9]), keep(3, 7)),
    ),
    "wpo_weight": (pairs.wpo_weight, lambda: (real(3, 7, VOCAB), ids(3, 7), keep(3, 7))),
    "rpo": (
        partial(pairs.rpo, beta=0.1, alpha=1.0),
        lambda: (*(real(3) for _ in range(4)), torch.tensor([2, 1, 9])),
    ),
    "xpo": (
        partial(pairs.xpo, beta=0.1, alpha=0.01),
        lambda: tuple(real(3) for _ in range(5)),
    ),
    "dynamic_beta": (
        partial(pairs.dynamic_beta, beta=0.1, alpha=0.6, baseline=0.2),
        lambda: (real(3),),
    ),
    "simpo": (partial(reference_free.simpo, beta=2.0, margin=0.5), lambda: (real(3), real(3))),
    "alphapo": (
        partial(reference_free.alphapo, beta=2.0, margin=0.5, alpha=0.25),
        lambda: (-positive(3), -positive(3)),
    ),
    "slic": (
        partial(reference_free.slic, margin=1.0, coef=0.1),
        lambda: (real(3), real(3), real(3)),
    ),
    "cpo": (partial(reference_free.cpo, beta=0.1, alpha=1.0), lambda: (real(3), real(3))),
    "orpo": (partial(reference_free.orpo, coef=0.1), lambda: (-positive(3), -positive(3))),
    "log_odds": (reference_free.log_odds, lambda: (-positive(3),)),
    "kto": (
        partial(unpaired.kto, beta=0.1, **_kto),
        lambda: (real(5), real(5), real(5) > 0),
    ),
    "kto_baseline": (
        unpaired.kto_baseline,
        lambda: (1 + real(3, 5), real(3, 5) / 9, keep(3, 5)),
    ),
    "bco": (partial(unpaired.bco, beta=0.1, shift=0.2), lambda: (real(5), real(5), real(5) > 0)),
    "plackett_luce": (listwise.plackett_luce, lambda: (real(3, 5), keep(3, 5))),
    "plackett_luce_dpo": (
        partial(listwise.plackett_luce_dpo, beta=0.1),
        lambda: (real(3, 5), real(3, 5), keep(3, 5)),
    ),
    "ordinal_loss": (
        partial(listwise.ordinal_loss, thresholds=torch.tensor([-1.0, 0.2, 1.5])),
        lambda: (real(5), torch.tensor([0, 1, 2, 3, 1])),
    ),
    "step_loss": (listwise.step_loss, lambda: (real(3, 7), real(3, 7) > 0, keep(3, 7))),
    "centring_penalty": (
        partial(preference.centring_penalty, coef=0.01),
        lambda: (real(3), real(3)),
    ),
}

WHOLE_BATCH = {"kto_baseline"}
NO_GRADIENT = {"kto_baseline"}
STOP_GRADIENT = set()
FLOAT32_FROM_HALF = {"wpo_weight"}
