"""Direct alignment: the losses of DPO's family, one per pair, unreduced.

a = log π/π_ref (y_w) and b = log π/π_ref (y_l), of whole answers: log-probs are sums over an
answer's tokens (`masked_sum`), or means (`masked_mean`), where a paper normalises by length: DPO of
means is Tülu 3's. The reference may be a model, an older policy, or zeros for none. A divergence
other than the reverse KL enters as another implicit reward: `dpo` is `bradley_terry` of
`implicit_reward`, f-DPO is `bradley_terry` of `alpha_divergence_reward` or `jensen_shannon_reward`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn import checks
from rlhf_fn.preference import implicit_reward
from rlhf_fn.tree import like

Pairs = Float[Tensor, "*batch"]


def hinge_dpo(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """DPO with a margin that suffices: the loss of SLiC and RSO.

    L = max(0, 1 − β (a − b))

    Raises: ValueError unless all shapes agree and β > 0.

    Liu et al. 2023: https://arxiv.org/abs/2309.06657
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return (1 - (good - bad)).clamp(min=0)


def ipo(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """Identity preference optimisation: the margin has a target, so sure labels do not overfit.

    L = (a − b − 1/(2β))²,   β the paper's τ

    Sums in the paper, OpenRLHF and ROLL; TRL, AReaL and HALOs pass means per token, which is what
    the authors ran.

    Raises: as `hinge_dpo`.

    Azar et al. 2023, eq. 17: https://arxiv.org/abs/2310.12036
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return ((good - bad - 0.5) / beta).square()


def robust_dpo(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor,
) -> Pairs:
    """The loss whose mean over labels flipped with chance ε is DPO's on the labels that were not.

    L = ((1 − ε)(−log σ(β (a − b))) − ε (−log σ(β (b − a)))) / (1 − 2ε)

    Raises: as `dpo`.

    Chowdhury et al. 2024: https://arxiv.org/abs/2403.00409
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    checks.minority(label_smoothing=label_smoothing)
    checks.fits(chosen_logprobs, label_smoothing=label_smoothing)
    kept, flipped = -logsigmoid(good - bad), -logsigmoid(bad - good)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor,
) -> Pairs:
    """Exact optimisation, of pairs: the reverse KL where `dpo` has the forward one.

    L = KL((p, 1 − p) ‖ (1 − ε, ε)),   p = σ(β (a − b)),   0 < ε < ½

    Raises: as `dpo`; ValueError unless ε > 0, where the loss is infinite.

    Ji et al. 2024: https://arxiv.org/abs/2402.00856
    """
    checks.positive(label_smoothing=label_smoothing)
    checks.minority(label_smoothing=label_smoothing)
    checks.fits(chosen_logprobs, label_smoothing=label_smoothing)
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    margin, share = good - bad, like(good, label_smoothing)
    right = margin.sigmoid() * (logsigmoid(margin) - torch.log1p(-share))
    wrong = (-margin).sigmoid() * (logsigmoid(-margin) - share.log())
    return right + wrong


def nca(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """Noise-contrastive alignment, of pairs: the chosen answer's likelihood may not fall, too.

    L = −log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb)

    Raises: as `hinge_dpo`.

    Chen et al. 2024: https://arxiv.org/abs/2402.05369
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return -logsigmoid(good) - (logsigmoid(-good) + logsigmoid(-bad)) / 2


def sppo(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """Self-play preference optimisation with hard labels: each answer has a target of its own.

    L = (a − 1/(2β))² + (b + 1/(2β))²,   1/β the paper's η

    Added to `dpo` with β = 1 it is Cal-DPO (https://arxiv.org/abs/2412.14516; halved in its code).

    Raises: as `hinge_dpo`.

    Wu et al. 2024: https://arxiv.org/abs/2405.00675
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return ((good - 0.5) / beta).square() + ((bad + 0.5) / beta).square()


def apo_zero(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """Anchored preference optimisation, for answers better than the policy's: up and down.

    L = 1 − σ(βa) + σ(βb)

    Raises: as `hinge_dpo`.

    D'Oosterlinck et al. 2024, eq. 7: https://arxiv.org/abs/2408.06266
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return (-good).sigmoid() + bad.sigmoid()


def apo_down(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
) -> Pairs:
    """Anchored preference optimisation, for answers worse than the policy's: both down.

    L = σ(βa) + 1 − σ(β (a − b))

    Raises: as `hinge_dpo`.

    D'Oosterlinck et al. 2024, eq. 8: https://arxiv.org/abs/2408.06266
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    return good.sigmoid() + (bad - good).sigmoid()


def discopop(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
    temperature: float | Tensor,
) -> Pairs:
    """The discovered loss of DiscoPOP: logistic where the margin is low, exponential where high.

    L = (1 − g)(−log σ(m)) + g e^−m,   g = σ(m/τ),   m = β (a − b)

    Raises: as `hinge_dpo`; ValueError unless τ > 0.

    Lu et al. 2024, eq. 5: https://arxiv.org/abs/2406.08414
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    checks.positive(temperature=temperature)
    checks.fits(chosen_logprobs, temperature=temperature)
    margin = good - bad
    gate = (margin / temperature).sigmoid()
    exponential = (logsigmoid(margin / temperature) - margin).exp()  # g e^−m, without overflow
    return (1 - gate) * -logsigmoid(margin) + exponential


def bco_pair(
    chosen_logprobs: Pairs,
    rejected_logprobs: Pairs,
    ref_chosen_logprobs: Pairs,
    ref_rejected_logprobs: Pairs,
    *,
    beta: float | Tensor,
    shift: float | Tensor = 0.0,
) -> Pairs:
    """Binary classifier optimisation, of pairs: `bco` of the chosen and of the rejected answer.

    L = −log σ(βa − δ) − log σ(−(βb − δ)),   δ the mean of recent rewards βa and βb

    Raises: as `hinge_dpo`.

    Jung et al. 2024: https://arxiv.org/abs/2404.04656
    """
    good, bad = _rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta
    )
    checks.fits(good, shift=shift)
    return -logsigmoid(good - shift) - logsigmoid(shift - bad)


def _rewards(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """βa and βb."""
    checks.same_shape(chosen_logprobs=chosen, rejected_logprobs=rejected)
    good = implicit_reward(chosen, ref_chosen, beta=beta)
    return good, implicit_reward(rejected, ref_rejected, beta=beta)
