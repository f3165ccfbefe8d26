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
    fixed_kl,
    geometric_mixture_logprobs,
    k1,
    k2,
    k3,
    mixture_logprobs,
)
from rlhf_fn.logprobs import (
    cross_entropy,
    entropy,
    full_kl,
    token_logprobs,
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
    entropy_bonus,
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
from rlhf_fn.value import (
    clipped_value_loss,
    explained_variance,
    value_loss,
)
from rlhf_fn.weights import (
    fixed_length,
    group_mean,
    sequence_mean,
    token_mean,
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
    "bradley_terry",
    "categorical_entropy",
    "categorical_kl",
    "categorical_log_prob",
    "categorical_sample",
    "chain",
    "clip_by_global_norm",
    "clip_fraction",
    "clipped_surrogate",
    "clipped_value_loss",
    "cosine_schedule",
    "cross_entropy",
    "discounted_returns",
    "discounted_reward",
    "dpo",
    "entropy",
    "entropy_bonus",
    "explained_variance",
    "fixed_kl",
    "fixed_length",
    "full_kl",
    "gae",
    "geometric_mixture_logprobs",
    "group_mean",
    "grpo_advantages",
    "implicit_reward",
    "k1",
    "k2",
    "k3",
    "lambda_returns",
    "last_token_reward",
    "linear_schedule",
    "linear_token_logprobs",
    "mixture_logprobs",
    "normal_entropy",
    "normal_kl",
    "normal_log_prob",
    "normal_sample",
    "optim",
    "pairwise_token_loss",
    "policy_gradient",
    "q_learning_error",
    "random",
    "sequence_mean",
    "sgd",
    "shape_rewards",
    "suffix_scan",
    "td_error",
    "token_logprobs",
    "token_mean",
    "tree",
    "uniform_reward",
    "value_loss",
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
