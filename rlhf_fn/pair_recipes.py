"""Published methods that learn from pairs: the other half of `recipes.py`, which has their names.

Settings are those of the paper or of its authors' code; where there are several, one of them. What
was taken from elsewhere says so.
"""

from functools import partial

from rlhf_fn import direct, pairs, preference, reference_free
from rlhf_fn import unpaired as answers
from rlhf_fn.pair_methods import (
    Offline,
    desensitised,
    log_ratio,
    log_ratio_per_token,
    mixed,
    of_means,
    of_policy_means,
    of_policy_sums,
    of_sums,
    rewarded,
    shifted,
    surprise,
    unpaired,
    with_length,
    with_target,
)  # fmt: skip

# against a reference

dpo = Offline(
    paper="Rafailov et al. 2023, https://arxiv.org/abs/2305.18290",
    objective=of_sums(preference.dpo, beta=0.1),
    reward=log_ratio,
    reference=True,
    mismatched=False,
    whole=False,
)
cdpo = dpo._replace(
    paper="Mitchell 2023, https://ericmitchell.ai/cdpo.pdf",
    objective=of_sums(preference.dpo, beta=0.1, label_smoothing=0.1),  # the note leaves ε open
)
dpo_norm = dpo._replace(
    paper="Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124",
    objective=of_means(preference.dpo, beta=5.0),
    reward=log_ratio_per_token,
)
ipo = dpo._replace(
    paper="Azar et al. 2023, https://arxiv.org/abs/2310.12036",
    objective=of_means(direct.ipo, beta=0.1),
    reward=log_ratio_per_token,
)
hinge = dpo._replace(
    paper="Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657",
    objective=of_sums(direct.hinge_dpo, beta=0.05),
)
robust_dpo = dpo._replace(
    paper="Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409",
    objective=of_sums(direct.robust_dpo, beta=0.01, label_smoothing=0.1),
)
exo = dpo._replace(
    paper="Ji et al. 2024, https://arxiv.org/abs/2402.00856",
    objective=of_sums(direct.exo, beta=0.1, label_smoothing=1e-3),
)
nca = dpo._replace(
    paper="Chen et al. 2024, https://arxiv.org/abs/2402.05369",
    objective=of_sums(direct.nca, beta=0.01),
)
sppo = dpo._replace(
    paper="Wu et al. 2024, https://arxiv.org/abs/2405.00675",
    objective=of_sums(direct.sppo, beta=1e-3),
)
apo_zero = dpo._replace(
    paper="D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266",
    objective=of_sums(direct.apo_zero, beta=0.1),
)
apo_down = apo_zero._replace(objective=of_sums(direct.apo_down, beta=0.1))
discopop = dpo._replace(
    paper="Lu et al. 2024, https://arxiv.org/abs/2406.08414",
    objective=of_sums(direct.discopop, beta=0.05, temperature=0.05),
)
bco_pair = dpo._replace(
    paper="Jung et al. 2024, https://arxiv.org/abs/2404.04656; δ = 0, as in TRL's DPO",
    objective=of_sums(direct.bco_pair, beta=0.01),
)
f_dpo_alpha = dpo._replace(
    paper="Wang et al. 2023 (f-DPO, α-divergence), https://arxiv.org/abs/2309.16240",
    objective=partial(rewarded, reward=partial(pairs.alpha_divergence_reward, beta=0.1, alpha=0.5)),
)
f_dpo_jensen_shannon = f_dpo_alpha._replace(
    paper="Wang et al. 2023 (f-DPO, Jensen-Shannon), https://arxiv.org/abs/2309.16240",
    objective=partial(rewarded, reward=partial(pairs.jensen_shannon_reward, beta=0.1)),
)
ld_dpo = dpo._replace(
    paper="Liu et al. 2024, https://arxiv.org/abs/2409.06411",
    objective=partial(desensitised, loss=partial(preference.dpo, beta=0.1), alpha=0.5),
)
rpo = dpo._replace(
    paper="Pang et al. 2024, https://arxiv.org/abs/2404.19733",
    objective=partial(with_length, loss=partial(pairs.rpo, beta=0.1, alpha=1.0)),
)

# against a reference, of whole batches

aot = dpo._replace(
    paper="Melnyk et al. 2024, https://arxiv.org/abs/2406.05882",
    objective=of_sums(pairs.aot, beta=0.1),
    whole=True,
)
aot_unpaired = aot._replace(objective=of_sums(pairs.aot_unpaired, beta=0.1))
bco = dpo._replace(
    paper="Jung et al. 2024, https://arxiv.org/abs/2404.04656; δ of the batch, not of the past",
    objective=partial(shifted, loss=direct.bco_pair, beta=0.01),
    whole=True,
)
mpo = dpo._replace(
    paper="Wang et al. 2024 (mixed preferences), https://arxiv.org/abs/2411.10442",
    objective=partial(
        mixed,
        preference=of_sums(preference.dpo, beta=0.1),
        quality=partial(shifted, loss=direct.bco_pair, beta=0.1),
        generation=surprise,
        weights=(0.8, 0.2, 1.0),
    ),
    whole=True,
)
kto = dpo._replace(
    paper="Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306",
    objective=partial(
        unpaired,
        loss=partial(answers.kto, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    ),
    mismatched=True,
    whole=True,
)

# without a reference

simpo = dpo._replace(
    paper="Meng et al. 2024, https://arxiv.org/abs/2405.14734",
    objective=of_policy_means(reference_free.simpo, beta=2.0, margin=1.0),
    reward=log_ratio_per_token,
    reference=False,
)
alphapo = simpo._replace(
    paper="Gupta et al. 2025, https://arxiv.org/abs/2501.03884",
    objective=of_policy_means(reference_free.alphapo, beta=2.5, margin=0.1, alpha=0.25),
)
orpo = simpo._replace(
    paper="Hong et al. 2024, https://arxiv.org/abs/2403.07691",
    objective=of_policy_means(reference_free.orpo, coef=0.1),
)
cpo = simpo._replace(
    paper="Xu et al. 2024, https://arxiv.org/abs/2401.08417",
    objective=of_policy_sums(reference_free.cpo, beta=0.1, alpha=1.0),
    reward=log_ratio,
)
slic = cpo._replace(
    paper="Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425",
    objective=partial(with_target, loss=partial(reference_free.slic, margin=1.0, coef=0.1)),
)  # the settings of HALOs
