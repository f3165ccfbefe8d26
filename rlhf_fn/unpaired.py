"""Losses on single answers, each marked desirable or not: one per answer, unreduced.

x = log π/π_ref (y), of whole answers: log-probs are sums over an answer's tokens, `masked_sum`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn import checks
from rlhf_fn.preference import implicit_reward
from rlhf_fn.sequence import masked_mean


def kto(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    desirable: Bool[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    baseline: float | Tensor,
    desirable_weight: float | Tensor,
    undesirable_weight: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Kahneman-Tversky optimisation: gains and losses of utility against a reference point.

    L = λ_D (1 − σ(β (x − z))) where desirable, λ_U (1 − σ(β (z − x))) where not

    z is `baseline`, in nats: `kto_baseline`. z = 0 is APO-zero's half of a pair.

    Raises: ValueError unless the shapes agree, β > 0 and both λ are ≥ 0; TypeError unless
    `desirable` is bool.

    Ethayarajh et al. 2024: https://arxiv.org/abs/2402.01306
    """
    checks.same_shape(logprobs=logprobs, desirable=desirable)
    checks.bool_mask(desirable, name="desirable")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    checks.non_negative(**weights)
    checks.fits(logprobs, baseline=baseline, **weights)
    regret = implicit_reward(logprobs, ref_logprobs, beta=beta) - beta * baseline
    good, bad = desirable_weight * (-regret).sigmoid(), undesirable_weight * regret.sigmoid()
    return torch.where(desirable, good, bad)


def kto_baseline(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"],
) -> Float[Tensor, ""]:
    """KTO's reference point: an estimate of KL(π ‖ π_ref), from answers to other prompts. In nats.

    z = sg[max(0, mean x)], over all kept rows

    The answers are mismatched, each scored under the prompt of another row, so a batch needs two
    or more; a matched answer's x is the very reward that z is taken from.

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.

    Ethayarajh et al. 2024: https://arxiv.org/abs/2402.01306
    """
    x = implicit_reward(logprobs, ref_logprobs, beta=1.0)
    checks.same_shape(logprobs=logprobs, mask=mask)
    return masked_mean(x.flatten(), mask.flatten()).clamp(min=0).detach()


def bco(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    desirable: Bool[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    shift: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Binary classifier optimisation: a logistic classifier whose logit is the implicit reward.

    L = −log σ(βx − δ) where desirable, −log σ(δ − βx) where not

    δ is the mean reward, (E_D[βx] + E_U[βx])/2, followed from batch to batch.

    Raises: ValueError unless the shapes agree and β > 0; TypeError unless `desirable` is bool.

    Jung et al. 2024: https://arxiv.org/abs/2404.04656
    """
    checks.same_shape(logprobs=logprobs, desirable=desirable)
    checks.bool_mask(desirable, name="desirable")
    checks.fits(logprobs, shift=shift)
    logit = implicit_reward(logprobs, ref_logprobs, beta=beta) - shift
    return -logsigmoid(torch.where(desirable, logit, -logit))
