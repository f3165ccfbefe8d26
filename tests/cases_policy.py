"""Rows of the contract's table for policy losses and the masks and weights that go with them."""

from functools import partial

import torch
from cases_ground import keys, positive, real
from cases_returns import keep

from rlhf_fn import kl, mismatch, offpolicy, policy, selection, sequence, weights

_clip = {"clip_low": 0.2, "clip_high": 0.28}
_vespo = {"k_positive": 2.0, "lam_positive": 3.0, "k_negative": 3.0, "lam_negative": 2.0}
_sapo = {"temperature_positive": 1.0, "temperature_negative": 1.05}


def surrogate(f, **settings):
    return partial(f, **settings), lambda: (real(3, 7), real(3, 7), real(3, 1))


def answers(f, **settings):
    return partial(f, **settings), lambda: (real(3, 7), real(3, 7), real(3, 7), keep(3, 7))


def of_tokens(f, count=1, **settings):
    return partial(f, **settings), lambda: (*(real(3, 7) for _ in range(count)), keep(3, 7))


CASES = {
    "dual_clipped_surrogate": surrogate(policy.dual_clipped_surrogate, **_clip, dual_clip=3.0),
    "decoupled_surrogate": (
        partial(policy.decoupled_surrogate, **_clip),
        lambda: (real(3, 7), real(3, 7), real(3, 7), real(3, 1)),
    ),
    "penalised_surrogate": surrogate(policy.penalised_surrogate, beta=0.1),
    "cispo": surrogate(offpolicy.cispo, **_clip),
    "topr": surrogate(offpolicy.topr),
    "sapo": surrogate(offpolicy.sapo, **_sapo),
    "dro": surrogate(offpolicy.dro, beta=0.1),
    "masked_sum": of_tokens(sequence.masked_sum),
    "masked_mean": of_tokens(sequence.masked_mean),
    "masked_max": of_tokens(sequence.masked_max),
    "perplexity": of_tokens(sequence.perplexity),
    "sum_log_ratio": of_tokens(sequence.sum_log_ratio, 2),
    "mean_log_ratio": of_tokens(sequence.mean_log_ratio, 2),
    "gspo": answers(sequence.gspo, **_clip),
    "gspo_token": answers(sequence.gspo_token, **_clip),
    "gmpo": answers(sequence.gmpo, **_clip),
    "vespo": answers(sequence.vespo, **_vespo),
    "top_fraction": of_tokens(selection.top_fraction, fraction=0.3),
    "token_covariance": of_tokens(selection.token_covariance, 2),
    "clip_cov_mask": (
        partial(selection.clip_cov_mask, fraction=0.2, low=-0.5, high=2.0),
        lambda: (real(3, 7), keep(3, 7), keys(3)),
    ),
    "trust_region_mask": (
        partial(selection.trust_region_mask, low=0.1, high=0.2),
        lambda: (real(3, 7), real(3, 7), real(3, 1), real(3, 7).abs()),
    ),
    "truncated_weights": (partial(mismatch.truncated_weights, clip=2.0), lambda: (real(3, 7),)),
    "masked_weights": (
        partial(mismatch.masked_weights, low=0.5, high=5.0),
        lambda: (real(3, 7),),
    ),
    "ratio_mask": of_tokens(mismatch.ratio_mask, low=0.5, high=2.0),
    "veto_mask": of_tokens(mismatch.veto_mask, low=0.2, high=5.0),
    "divergence_mask": of_tokens(mismatch.divergence_mask, limit=0.5),
    "off_policy_sequence_mask": answers(mismatch.off_policy_sequence_mask, limit=0.1),
    "second_moment_mask": of_tokens(mismatch.second_moment_mask, limit=0.4),
    "self_normalised_weights": (
        mismatch.self_normalised_weights,
        lambda: (positive(3, 7), keep(3, 7)),
    ),
    "effective_sample_size": (
        mismatch.effective_sample_size,
        lambda: (positive(3, 7), keep(3, 7)),
    ),
    "chi_squared": of_tokens(mismatch.chi_squared),
    "sequence_sum": (weights.sequence_sum, lambda: (torch.rand(3, 7) > 0.3,)),
    "token_sum": (weights.token_sum, lambda: (torch.rand(3, 7) > 0.3,)),
    "binary_tv": (kl.binary_tv, lambda: (-positive(3, 7), -positive(3, 7))),
    "binary_kl": (kl.binary_kl, lambda: (-positive(3, 7), -positive(3, 7))),
    "log1mexp": (kl.log1mexp, lambda: (-positive(3, 7),)),
    "straight_through": (kl.straight_through, lambda: (real(3, 7), real(3, 7))),
    "off_policy_kl": (kl.off_policy_kl, lambda: (real(3, 7), real(3, 7), real(3, 7))),
    "doubling_kl": (
        partial(kl.doubling_kl, target=5.0, tokens=100.0),
        lambda: (real(3), 5 + 3 * real(3)),
    ),
}

WHOLE_BATCH = {
    "effective_sample_size",
    "second_moment_mask",
    "self_normalised_weights",
    "sequence_sum",
    "token_covariance",
    "top_fraction",
}
NO_GRADIENT = {
    "clip_cov_mask",
    "divergence_mask",
    "off_policy_sequence_mask",
    "ratio_mask",
    "second_moment_mask",
    "top_fraction",
    "trust_region_mask",
    "veto_mask",
}
STOP_GRADIENT = {"cispo", "gspo_token", "straight_through", "topr", "vespo"}
FLOAT32_FROM_HALF = {"binary_kl", "off_policy_kl"}
