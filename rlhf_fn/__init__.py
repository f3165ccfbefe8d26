"""RLHF as pure functions: the public names of the ground floor, flat and sorted.

Models, steps and runs are modules: `rlhf_fn.models`, `rlhf_fn.steps`, `rlhf_fn.train`.
"""

from rlhf_fn import optim, random, tree
from rlhf_fn.distributions import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    categorical_sample,
    normal_entropy,
    normal_kl,
    normal_log_prob,
    normal_sample,
)
from rlhf_fn.groups import (
    grpo_advantages,
)
from rlhf_fn.kl import (
    adaptive_kl,
    binary_kl,
    binary_tv,
    doubling_kl,
    fixed_kl,
    geometric_mixture_logprobs,
    k1,
    k2,
    k3,
    log1mexp,
    mixture_logprobs,
    off_policy_kl,
    straight_through,
)
from rlhf_fn.logprobs import (
    cross_entropy,
    entropy,
    full_kl,
    token_logprobs,
)
from rlhf_fn.mismatch import (
    chi_squared,
    divergence_mask,
    effective_sample_size,
    masked_weights,
    off_policy_sequence_mask,
    ratio_mask,
    second_moment_mask,
    self_normalised,
    truncated_weights,
    veto_mask,
)
from rlhf_fn.offpolicy import (
    cispo,
    dro,
    sapo,
    topr,
)
from rlhf_fn.optim import (
    AdamState,
    Schedule,
    SgdState,
    Transform,
    adamw,
    chain,
    clip_by_global_norm,
    cosine_schedule,
    linear_schedule,
    sgd,
)
from rlhf_fn.policy import (
    approximate_kl,
    clip_fraction,
    clipped_surrogate,
    decoupled_surrogate,
    dual_clipped_surrogate,
    entropy_bonus,
    penalised_surrogate,
    policy_gradient,
)
from rlhf_fn.preference import (
    bradley_terry,
    dpo,
    implicit_reward,
    pairwise_token_loss,
)
from rlhf_fn.returns import (
    Gae,
    Vtrace,
    discounted_returns,
    gae,
    lambda_returns,
    q_learning_error,
    td_error,
    vtrace,
)
from rlhf_fn.rewards import (
    discounted_reward,
    last_token_reward,
    shape_rewards,
    uniform_reward,
    whiten,
)
from rlhf_fn.scan import (
    suffix_scan,
)
from rlhf_fn.selection import (
    clip_cov_mask,
    token_covariance,
    top_fraction,
    trust_region_mask,
)
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
from rlhf_fn.value import (
    clipped_value_loss,
    explained_variance,
    value_loss,
)
from rlhf_fn.weights import (
    fixed_length,
    group_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
    weighted_sum,
)

__all__ = [
    "AdamState",
    "Gae",
    "Schedule",
    "SgdState",
    "Transform",
    "Vtrace",
    "adamw",
    "adaptive_kl",
    "approximate_kl",
    "binary_kl",
    "binary_tv",
    "bradley_terry",
    "categorical_entropy",
    "categorical_kl",
    "categorical_log_prob",
    "categorical_sample",
    "chain",
    "chi_squared",
    "cispo",
    "clip_by_global_norm",
    "clip_cov_mask",
    "clip_fraction",
    "clipped_surrogate",
    "clipped_value_loss",
    "cosine_schedule",
    "cross_entropy",
    "decoupled_surrogate",
    "discounted_returns",
    "discounted_reward",
    "divergence_mask",
    "doubling_kl",
    "dpo",
    "dro",
    "dual_clipped_surrogate",
    "effective_sample_size",
    "entropy",
    "entropy_bonus",
    "explained_variance",
    "fixed_kl",
    "fixed_length",
    "full_kl",
    "gae",
    "geometric_mixture_logprobs",
    "gmpo",
    "group_mean",
    "grpo_advantages",
    "gspo",
    "gspo_token",
    "implicit_reward",
    "k1",
    "k2",
    "k3",
    "lambda_returns",
    "last_token_reward",
    "linear_schedule",
    "linear_token_logprobs",
    "log1mexp",
    "masked_max",
    "masked_mean",
    "masked_sum",
    "masked_weights",
    "mean_log_ratio",
    "mixture_logprobs",
    "normal_entropy",
    "normal_kl",
    "normal_log_prob",
    "normal_sample",
    "off_policy_kl",
    "off_policy_sequence_mask",
    "optim",
    "pairwise_token_loss",
    "penalised_surrogate",
    "perplexity",
    "policy_gradient",
    "q_learning_error",
    "random",
    "ratio_mask",
    "sapo",
    "second_moment_mask",
    "self_normalised",
    "sequence_mean",
    "sequence_sum",
    "sgd",
    "shape_rewards",
    "straight_through",
    "suffix_scan",
    "sum_log_ratio",
    "td_error",
    "token_covariance",
    "token_logprobs",
    "token_mean",
    "token_sum",
    "top_fraction",
    "topr",
    "tree",
    "truncated_weights",
    "trust_region_mask",
    "uniform_reward",
    "value_loss",
    "vespo",
    "veto_mask",
    "vtrace",
    "weighted_sum",
    "whiten",
]


def __getattr__(name: str) -> object:
    """`linear_token_logprobs`, when it is asked for: it imports the compiler, which takes long."""
    if name == "linear_token_logprobs":
        from rlhf_fn.linear import linear_token_logprobs

        return linear_token_logprobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
