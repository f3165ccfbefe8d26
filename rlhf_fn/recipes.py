"""Published methods: each a value that names its functions and its settings, with the paper.

`print(recipes.dapo)` shows one, `recipes.dapo._replace(group=8)` changes a part of it. To add a
method is to add a value. Settings are the paper's, those of its authors' code, or, where both are
silent, those of the method it is written as a change of.
"""

from functools import partial  # noqa: I001  a name a line would be too many lines
from math import inf

from rlhf_fn import batch_advantages, groups, kl, offpolicy, policy, sequence, weights
from rlhf_fn.losses import of_tokens
from rlhf_fn.methods import (
    ActorCritic, Online, all_groups, as_scored, length_adaptive_gae, of_answers, of_greedy_scores,
    of_lengths, of_masked_scores, of_scores, of_token_rewards, score_function, trusted,
    whitened_gae, with_length,
)  # fmt: skip
from rlhf_fn.pair_recipes import (  # noqa: F401  from pairs
    alphapo, aot, aot_unpaired, apo_down, apo_zero, bco, bco_pair, cdpo, cpo, discopop, dpo,
    dpo_norm, exo, f_dpo_alpha, f_dpo_jensen_shannon, hinge, ipo, kto, ld_dpo, mpo, nca, orpo,
    robust_dpo, rpo, simpo, slic, sppo,
)  # fmt: skip
from rlhf_fn.shaping import overlong_penalty

# from answers of the policy, and a critic

ppo = ActorCritic(
    paper="Ouyang et al. 2022, https://arxiv.org/abs/2203.02155",
    kl_reward=0.02,
    target_kl=None,
    horizon=10_000.0,
    estimate=partial(whitened_gae, discount=1.0, lam=0.95),
    surrogate=of_tokens(policy.clipped_surrogate, clip_low=0.2, clip_high=0.2),
    entropy_coef=0.0,
    imitation=0.0,
    value_clip=0.2,
    critic_first=0,
    weights=weights.token_mean,
    temperature=1.0,
    epochs=1,
    minibatches=8,
    max_kl=inf,
)
vapo = ppo._replace(
    paper="Yue et al. 2025, https://arxiv.org/abs/2504.05118",
    kl_reward=0.0,
    estimate=partial(length_adaptive_gae, alpha=0.05),
    surrogate=of_tokens(policy.clipped_surrogate, clip_low=0.2, clip_high=0.28),
    imitation=0.1,
    value_clip=inf,
    critic_first=50,
    minibatches=16,
)

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
_plain = grpo._replace(kl_coef=0.0, weights=weights.token_mean)  # what most are a change of
_centred = partial(of_scores, advantages=groups.dr_grpo_advantages)

dr_grpo = _plain._replace(
    paper="Liu et al. 2025, https://arxiv.org/abs/2503.20783",
    group=8,
    advantages=_centred,
    weights=partial(weights.fixed_length, length=3000),
)
dapo = _plain._replace(
    paper="Yu et al. 2025, https://arxiv.org/abs/2503.14476",
    group=16,
    shaping=partial(with_length, penalty=partial(overlong_penalty, limit=20480, buffer=4096)),
    keep=groups.informative_groups,
    rounds=10,
    surrogate=of_tokens(policy.clipped_surrogate, clip_low=0.2, clip_high=0.28),
    minibatches=16,
)
gspo = _plain._replace(
    paper="Zheng et al. 2025, https://arxiv.org/abs/2507.18071",
    surrogate=partial(sequence.gspo, clip_low=3e-4, clip_high=4e-4),
    weights=weights.sequence_mean,
    minibatches=4,
)
luspo = gspo._replace(
    paper="LUSPO, 2026, https://arxiv.org/abs/2602.05261", weights=weights.sequence_sum
)
gmpo = gspo._replace(
    paper="Zhao et al. 2025, https://arxiv.org/abs/2507.20673",
    surrogate=partial(sequence.gmpo, clip_low=0.4, clip_high=0.4),
)
cispo = _plain._replace(
    paper="MiniMax 2025, https://arxiv.org/abs/2506.13585; the bound of 5: Khatri et al. 2025, "
    "https://arxiv.org/abs/2510.13786",
    surrogate=of_tokens(offpolicy.cispo, clip_low=inf, clip_high=4.0),
)
sapo = _plain._replace(
    paper="Gao et al. 2025, https://arxiv.org/abs/2511.20347",
    surrogate=of_tokens(offpolicy.sapo, temperature_positive=1.0, temperature_negative=1.05),
    weights=weights.sequence_mean,
)
vespo = _plain._replace(
    paper="Shen et al. 2026, https://arxiv.org/abs/2602.10693",
    surrogate=partial(
        sequence.vespo, k_positive=2.0, lam_positive=3.0, k_negative=3.0, lam_negative=2.0
    ),
)
dppo_tv = _plain._replace(
    paper="Qi et al. 2026, https://arxiv.org/abs/2602.04879",
    surrogate=partial(trusted, divergence=kl.binary_tv, low=0.2, high=0.2),
)
dppo_kl = dppo_tv._replace(surrogate=partial(trusted, divergence=kl.binary_kl, low=0.05, high=0.05))
two_sided = _plain._replace(
    paper="INTELLECT-2, Prime Intellect 2025, https://arxiv.org/abs/2505.07291",
    surrogate=of_tokens(policy.dual_clipped_surrogate, clip_low=0.2, clip_high=0.2, dual_clip=4.0),
)
rloo = _plain._replace(
    paper="Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; clip and β of TRL",
    group=4,
    advantages=partial(of_scores, advantages=groups.rloo_advantages, beta=0.05),
    surrogate=of_answers(policy.clipped_surrogate, clip_low=0.2, clip_high=0.2),
    weights=weights.sequence_mean,
)
reinforce_pp = _plain._replace(
    paper="Hu et al. 2025, https://arxiv.org/abs/2501.03262; β of OpenRLHF",
    group=1,
    advantages=partial(
        of_token_rewards,
        advantages=partial(batch_advantages.reinforce_pp_advantages, discount=1.0, eps=1e-8),
        beta=0.01,
    ),
)
reinforce_pp_baseline = reinforce_pp._replace(
    group=8,
    advantages=partial(
        of_masked_scores,
        advantages=partial(batch_advantages.reinforce_pp_baseline_advantages, eps=1e-8),
    ),
    penalty=kl.k2,
    kl_coef=0.01,
)
remax = _plain._replace(
    paper="Li et al. 2023, https://arxiv.org/abs/2310.10505",
    group=1,
    advantages=partial(of_greedy_scores, advantages=groups.remax_advantages, beta=0.05),
    greedy=True,
    surrogate=score_function,
    weights=weights.sequence_sum,
)
opo = _plain._replace(
    paper="Hao et al. 2025, https://arxiv.org/abs/2505.23585",
    group=8,
    advantages=partial(of_lengths, advantages=groups.opo_advantages),
    surrogate=score_function,
    weights=weights.sequence_sum,
)
gpg = _plain._replace(
    paper="Chu et al. 2025, https://arxiv.org/abs/2504.02546",
    group=8,
    advantages=_centred,
    keep=groups.informative_groups,
    surrogate=score_function,
)
lite_ppo = _plain._replace(
    paper="Liu et al. 2025, https://arxiv.org/abs/2508.08221",
    group=8,
    advantages=partial(
        of_scores, advantages=partial(batch_advantages.lite_ppo_advantages, ddof=1, eps=1e-4)
    ),
)
maxrl = _plain._replace(
    paper="MaxRL, 2026, https://arxiv.org/abs/2602.02710",
    group=16,
    advantages=partial(of_scores, advantages=partial(groups.maxrl_advantages, eps=1e-6)),
    surrogate=score_function,
)
pass_at_k = _plain._replace(
    paper="Tang et al. 2025, https://arxiv.org/abs/2503.19595",
    group=8,
    advantages=partial(of_scores, advantages=groups.pass_at_k_advantages),
)
topr = _plain._replace(
    paper="Le Roux et al. 2025, https://arxiv.org/abs/2503.14286",
    group=16,
    advantages=_centred,
    surrogate=of_answers(offpolicy.topr),
    weights=weights.sequence_mean,
)
kimi = _plain._replace(
    paper="Kimi Team 2025, https://arxiv.org/abs/2501.12599; β of ROLL",
    group=8,
    advantages=_centred,
    surrogate=of_answers(offpolicy.dro, beta=0.1),
    weights=weights.sequence_mean,
)
