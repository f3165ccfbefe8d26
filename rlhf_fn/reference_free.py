"""Losses on pairs without a reference policy: one per pair, unreduced."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn import checks
from rlhf_fn.kl import log1mexp
from rlhf_fn.preference import bradley_terry


def simpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    margin: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """DPO with a margin in the place of the reference, on log-probs per token.

    L = −log σ(β ℓ_w − β ℓ_l − γ),   ℓ = log π(y)/|y|, the answer's `masked_mean`

    HALOs asks for γ/β.

    Raises: ValueError unless the shapes agree and β > 0.

    Meng et al. 2024: https://arxiv.org/abs/2405.14734
    """
    checks.positive(beta=beta)
    checks.fits(chosen_logprobs, beta=beta)
    return bradley_terry(beta * chosen_logprobs, beta * rejected_logprobs, margin=margin)


def alphapo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    margin: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """`simpo` of another shape of reward than the logarithm.

    L = −log σ(β r_w − β r_l − γ),   r = (1 − p^−α)/α,   p = e^ℓ, ℓ the answer's `masked_mean`

    α → 0 is `simpo`; α < 0 is allowed.

    Raises: ValueError unless the shapes agree, β > 0 and α ≠ 0.

    Gupta et al. 2025: https://arxiv.org/abs/2501.03884
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    checks.fits(chosen_logprobs, alpha=alpha)
    if not isinstance(alpha, Tensor) and alpha == 0:
        raise ValueError("alpha must not be 0; its limit there is simpo")
    chosen, rejected = (
        -torch.expm1(-alpha * x) / alpha for x in (chosen_logprobs, rejected_logprobs)
    )
    return simpo(chosen, rejected, beta=beta, margin=margin)


def slic(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    target_logprobs: Float[Tensor, "*batch"],
    *,
    margin: float | Tensor,
    coef: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Sequence likelihood calibration: a hinge on the log-probs, and the likelihood of a target.

    L = max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_ref),   δ the margin, λ the coefficient

    Raises: ValueError unless the shapes agree and δ and λ are ≥ 0.

    Zhao et al. 2023: https://arxiv.org/abs/2305.10425
    """
    checks.same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        target_logprobs=target_logprobs,
    )
    checks.floating(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    checks.non_negative(margin=margin, coef=coef)
    checks.fits(chosen_logprobs, margin=margin, coef=coef)
    hinge = (margin - chosen_logprobs + rejected_logprobs).clamp(min=0)
    return hinge - coef * target_logprobs


def cpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Contrastive preference optimisation: DPO with a uniform reference, and a likelihood term.

    L = −log σ(β (log π(y_w) − log π(y_l))) − α log π(y_w),   α = 1 in the paper

    TRL's likelihood term is a mean over all tokens of a batch.

    Raises: ValueError unless the shapes agree, β > 0 and α ≥ 0.

    Xu et al. 2024: https://arxiv.org/abs/2401.08417
    """
    checks.non_negative(alpha=alpha)
    checks.fits(chosen_logprobs, alpha=alpha)
    preferred = simpo(chosen_logprobs, rejected_logprobs, beta=beta, margin=0.0)
    return preferred - alpha * chosen_logprobs


def orpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    *,
    coef: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Odds-ratio preference optimisation: supervised fine-tuning that also disfavours.

    L = −ℓ_w − λ log σ(log_odds(ℓ_w) − log_odds(ℓ_l)),   ℓ = log π(y)/|y|, the `masked_mean`

    λ is `coef`, the paper's weight and TRL's β. TRL's −ℓ_w is that of prompt and answer.

    Raises: ValueError unless the shapes agree and λ ≥ 0.

    Hong et al. 2024: https://arxiv.org/abs/2403.07691
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    checks.non_negative(coef=coef)
    checks.fits(chosen_logprobs, coef=coef)
    ratio = log_odds(chosen_logprobs) - log_odds(rejected_logprobs)
    return -chosen_logprobs - coef * logsigmoid(ratio)


def log_odds(logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log(p/(1 − p)) from log p ≤ 0, finite and with a finite gradient wherever log p is.

    ℓ − log(1 − eˡ)

    log p = 0, where the odds are infinite, counts as the largest number below it.

    Hong et al. 2024: https://arxiv.org/abs/2403.07691
    """
    checks.floating(logprobs=logprobs)
    return logprobs - log1mexp(logprobs.clamp(max=-torch.finfo(logprobs.dtype).tiny))
