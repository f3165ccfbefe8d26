"""Published methods: each a value that names its functions and its settings, with the paper.

`print(recipes.dapo)` shows one, `recipes.dapo._replace(group=8)` changes a part of it. To add a
method is to add a value. Settings are the paper's; where it is silent, those of its authors' code.
"""

from functools import partial

from rlhf_fn import groups, kl, policy, weights
from rlhf_fn.losses import of_tokens
from rlhf_fn.methods import (
    Online,
    all_groups,
    as_scored,
    of_scores,
    with_length,
)
from rlhf_fn.shaping import overlong_penalty

# from groups of the policy's own answers

grpo = Online(
    paper="Shao et al. 2024, https://arxiv.org/abs/2402.03300",
    group=64,
    shaping=as_scored,
    advantages=partial(of_scores, advantages=partial(groups.grpo_advantages, ddof=1, eps=1e-4)),
    keep=all_groups,
    rounds=1,
    greedy=False,
    surrogate=of_tokens(policy.clipped_surrogate, clip_low=0.2, clip_high=0.2),
    penalty=kl.k3,
    kl_coef=0.04,
    entropy_coef=0.0,
    weights=weights.sequence_mean,
    temperature=1.0,
    epochs=1,
    minibatches=1,
)
dr_grpo = grpo._replace(
    paper="Liu et al. 2025, https://arxiv.org/abs/2503.20783",
    group=8,
    advantages=partial(of_scores, advantages=groups.dr_grpo_advantages),
    kl_coef=0.0,
    weights=partial(weights.fixed_length, length=3000),
)
dapo = grpo._replace(
    paper="Yu et al. 2025, https://arxiv.org/abs/2503.14476",
    group=16,
    shaping=partial(with_length, penalty=partial(overlong_penalty, limit=20480, buffer=4096)),
    keep=groups.informative_groups,
    rounds=10,
    surrogate=of_tokens(policy.clipped_surrogate, clip_low=0.2, clip_high=0.28),
    kl_coef=0.0,
    weights=weights.token_mean,
    minibatches=16,
)
