"""RLHF as pure functions: the public names of the ground floor, flat and sorted.

Models, steps and runs are modules: `rlhf_fn.models`, `rlhf_fn.steps`, `rlhf_fn.train`.
"""

from rlhf_fn import optim, random, tree  # noqa: I001  a name a line would be too many lines
from rlhf_fn.batch_advantages import (
    gdpo_advantages, lite_ppo_advantages, reinforce_pp_advantages, reinforce_pp_baseline_advantages,
)  # fmt: skip
from rlhf_fn.direct import (
    apo_down, apo_zero, bco_pair, discopop, exo, hinge_dpo, ipo, nca, robust_dpo, sppo,
)  # fmt: skip
from rlhf_fn.distillation import dft, generalised_jsd, smoothed_cross_entropy
from rlhf_fn.distributions import (
    categorical_entropy, categorical_kl, categorical_log_prob, categorical_sample, normal_entropy,
    normal_kl, normal_log_prob, normal_sample,
)  # fmt: skip
from rlhf_fn.fused import InPlace, fused_adamw
from rlhf_fn.groups import (
    dr_grpo_advantages, grpo_advantages, informative_groups, maxrl_advantages, opo_advantages,
    pass_at_k_advantages, remax_advantages, rloo_advantages,
)  # fmt: skip
from rlhf_fn.kl import (
    adaptive_kl, binary_kl, binary_tv, doubling_kl, fixed_kl, geometric_mixture_logprobs, k1, k2,
    k3, log1mexp, mixture_logprobs, off_policy_kl, straight_through,
)  # fmt: skip
from rlhf_fn.listwise import ordinal_loss, plackett_luce, plackett_luce_dpo, step_loss
from rlhf_fn.logprobs import cross_entropy, entropy, full_kl, token_logprobs
from rlhf_fn.mismatch import (
    chi_squared, divergence_mask, effective_sample_size, masked_weights, off_policy_sequence_mask,
    ratio_mask, second_moment_mask, self_normalised_weights, truncated_weights, veto_mask,
)  # fmt: skip
from rlhf_fn.moments import (
    Moments, PopArt, add_moments, decay_moments, denormalise, no_moments, normalise, popart,
)  # fmt: skip
from rlhf_fn.mpo import kl_constraint, mpo_temperature_loss, mpo_weights
from rlhf_fn.offpolicy import cispo, dro, sapo, topr
from rlhf_fn.optim import (
    AdamState, Schedule, SgdState, Transform, adamw, chain, clip_by_global_norm, cosine_schedule,
    linear_schedule, sgd,
)  # fmt: skip
from rlhf_fn.pairs import (
    alpha_divergence_reward, aot, aot_unpaired, desensitised_logprob, dynamic_beta,
    jensen_shannon_reward, rpo, wpo_weight, xpo,
)  # fmt: skip
from rlhf_fn.policy import (
    approximate_kl, clip_fraction, clipped_surrogate, decoupled_surrogate, dual_clipped_surrogate,
    entropy_bonus, penalised_surrogate, policy_gradient,
)  # fmt: skip
from rlhf_fn.preference import (
    bradley_terry, centring_penalty, dpo, implicit_reward, pairwise_token_loss,
)  # fmt: skip
from rlhf_fn.reference_free import alphapo, cpo, log_odds, orpo, simpo, slic
from rlhf_fn.references import periodic_update, soft_update
from rlhf_fn.returns import (
    Gae, Vtrace, discounted_returns, gae, lambda_returns, q_learning_error, td_error, vtrace,
)  # fmt: skip
from rlhf_fn.rewards import (
    discounted_reward, last_token_reward, shape_rewards, uniform_reward, whiten,
)  # fmt: skip
from rlhf_fn.scan import suffix_scan
from rlhf_fn.selection import clip_cov_mask, token_covariance, top_fraction, trust_region_mask
from rlhf_fn.sequence import (
    gmpo, gspo, gspo_token, masked_max, masked_mean, masked_sum, mean_log_ratio, perplexity,
    sum_log_ratio, vespo,
)  # fmt: skip
from rlhf_fn.shaping import (
    combined_reward, length_reward, missing_eos_penalty, overlong_penalty, repeated_share,
    safe_reward,
)  # fmt: skip
from rlhf_fn.turns import length_adaptive_lam, turn_gae, turn_starts, turn_sum
from rlhf_fn.unpaired import bco, kto, kto_baseline
from rlhf_fn.value import (
    clipped_value_loss, explained_variance, huber_value_loss, quantile_value_loss, value_loss,
)  # fmt: skip
from rlhf_fn.verifiable import constitutional_score, exact_number, follows_format, last_number
from rlhf_fn.weights import (
    fixed_length, group_mean, segment_mean, sequence_mean, sequence_sum, token_mean, token_sum,
    weighted_sum,
)  # fmt: skip

__all__ = [
    "AdamState", "Gae", "InPlace", "Moments", "PopArt", "Schedule", "SgdState", "Transform",
    "Vtrace", "adamw", "adaptive_kl", "add_moments", "alpha_divergence_reward", "alphapo", "aot",
    "aot_unpaired", "apo_down", "apo_zero", "approximate_kl", "bco", "bco_pair", "binary_kl",
    "binary_tv", "bradley_terry", "categorical_entropy", "categorical_kl", "categorical_log_prob",
    "categorical_sample", "centring_penalty", "chain", "chi_squared", "cispo",
    "clip_by_global_norm", "clip_cov_mask", "clip_fraction", "clipped_surrogate",
    "clipped_value_loss", "combined_reward", "constitutional_score", "cosine_schedule", "cpo",
    "cross_entropy", "decay_moments", "decoupled_surrogate", "denormalise", "desensitised_logprob",
    "dft", "discopop", "discounted_returns", "discounted_reward", "divergence_mask", "doubling_kl",
    "dpo", "dr_grpo_advantages", "dro", "dual_clipped_surrogate", "dynamic_beta",
    "effective_sample_size", "entropy", "entropy_bonus", "exact_number", "exo",
    "explained_variance", "fixed_kl", "fixed_length", "follows_format", "full_kl", "fused_adamw",
    "gae", "gdpo_advantages", "generalised_jsd", "geometric_mixture_logprobs", "gmpo", "group_mean",
    "grpo_advantages", "gspo", "gspo_token", "hinge_dpo", "huber_value_loss", "implicit_reward",
    "informative_groups", "ipo", "jensen_shannon_reward", "k1", "k2", "k3", "kl_constraint", "kto",
    "kto_baseline", "lambda_returns", "last_number", "last_token_reward", "length_adaptive_lam",
    "length_reward", "linear_schedule", "linear_token_logprobs",
    "linear_token_logprobs_and_entropy", "lite_ppo_advantages", "log1mexp", "log_odds",
    "masked_max", "masked_mean", "masked_sum", "masked_weights", "maxrl_advantages",
    "mean_log_ratio", "missing_eos_penalty", "mixture_logprobs", "mpo_temperature_loss",
    "mpo_weights", "nca", "no_moments", "normal_entropy", "normal_kl", "normal_log_prob",
    "normal_sample", "normalise", "off_policy_kl", "off_policy_sequence_mask", "opo_advantages",
    "optim", "ordinal_loss", "orpo", "overlong_penalty", "pairwise_token_loss",
    "pass_at_k_advantages", "penalised_surrogate", "periodic_update", "perplexity", "plackett_luce",
    "plackett_luce_dpo", "policy_gradient", "popart", "q_learning_error", "quantile_value_loss",
    "random", "ratio_mask", "reinforce_pp_advantages", "reinforce_pp_baseline_advantages",
    "remax_advantages", "repeated_share", "rloo_advantages", "robust_dpo", "rpo", "safe_reward",
    "sapo", "second_moment_mask", "segment_mean", "self_normalised_weights", "sequence_mean",
    "sequence_sum", "sgd", "shape_rewards", "simpo", "slic", "smoothed_cross_entropy",
    "soft_update", "sppo", "step_loss", "straight_through", "suffix_scan", "sum_log_ratio",
    "td_error", "token_covariance", "token_logprobs", "token_mean", "token_sum", "top_fraction",
    "topr", "tree", "truncated_weights", "trust_region_mask", "turn_gae", "turn_starts", "turn_sum",
    "uniform_reward", "value_loss", "vespo", "veto_mask", "vtrace", "weighted_sum", "whiten",
    "wpo_weight", "xpo",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """What `linear.py` has, when it is asked for: it imports the compiler, which takes long."""
    if name in {"linear_token_logprobs", "linear_token_logprobs_and_entropy"}:
        from rlhf_fn import linear

        return getattr(linear, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
