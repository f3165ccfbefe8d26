"""Masks of the tokens that an update may use: `weights * mask` leaves the others out.

A mask multiplies weights that are already normalised, so what it leaves out still counts in their
denominator; make the weights from it to leave it out of that, too. Tokens that the batch's own mask
hides are never read and never selected.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_fn import checks, random


def top_fraction(
    x: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    fraction: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """The share of the kept tokens, over all axes together, where x is largest.

    [t is kept and the share of kept u with xᵤ > xₜ is below f]

    Of entropies, the forking tokens of the 80/20 rule. Ties are selected together, so more than f
    may be; f = 1 is `mask` and f = 0 nothing.

    Raises: ValueError unless the shapes agree and 0 ≤ f ≤ 1; TypeError for a mask that is not bool.

    Wang et al. 2025: https://arxiv.org/abs/2506.01939
    """
    checks.same_shape(x=x, mask=mask)
    checks.floating(x=x)
    checks.bool_mask(mask)
    checks.unit_interval(fraction=fraction)
    descending = torch.where(mask, x, -torch.inf).flatten().sort(descending=True).values
    above = torch.arange(x.numel(), device=x.device, dtype=torch.float64)
    number = (above / mask.sum().clamp(min=1) < fraction).sum()
    least = descending.gather(0, (number - 1).clamp(min=0)[None])
    return mask & (x >= least) & (number > 0)


def token_covariance(
    logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Each kept token's part in the covariance that drives the entropy down; 0 where hidden.

    covₜ = (log πₜ − mean log π) (Aₜ − mean A), the means over all kept tokens together

    Clip-Cov drops tokens where it is high (`clip_cov_mask`); KL-Cov adds c |log ρₜ| to −ρₜ Aₜ where
    it is highest (`top_fraction`).

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.

    Cui et al. 2025: https://arxiv.org/abs/2505.22617
    """
    checks.same_shape(logprobs=logprobs, mask=mask)
    checks.per_token(logprobs, advantages)
    checks.bool_mask(mask)
    number = mask.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        return torch.where(mask, x - torch.where(mask, x, 0.0).sum() / number, 0.0)

    return centred(logprobs) * centred(advantages)


def clip_cov_mask(
    covariance: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    key: Int64[Tensor, "*keys 2"],
    *,
    fraction: float | Tensor,
    low: float | Tensor,
    high: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """Clip-Cov: all kept tokens but a few, drawn at random, of those with a high covariance.

    Leaves out ⌈f n⌉ of the kept tokens with low < covₜ < high, or all if they are fewer; n is the
    number of kept tokens. One key draws for all axes together, a key per row for each row.

    Raises: ValueError unless the shapes agree, 0 ≤ f ≤ 1 and the leading axes of `key` are those of
    `covariance`; TypeError for a mask that is not bool.

    Cui et al. 2025: https://arxiv.org/abs/2505.22617
    """
    checks.same_shape(covariance=covariance, mask=mask)
    checks.floating(covariance=covariance)
    checks.bool_mask(mask)
    checks.unit_interval(fraction=fraction)
    checks.fits(covariance, low=low, high=high)
    keys = key.ndim - 1
    if mask.shape[:keys] != key.shape[:-1]:
        raise ValueError(
            f"the leading axes of key, {tuple(key.shape[:-1])}, must be those of covariance, "
            f"{tuple(mask.shape)}; split or fold the key"
        )
    kept, x = mask.flatten(keys), covariance.flatten(keys)
    candidates = kept & (x > low) & (x < high)
    order = random.permutation(key, x.shape[-1])  # the candidates, in a random order, come first
    place = (order + x.shape[-1] * ~candidates).argsort(-1).argsort(-1)
    number = kept.sum(-1, keepdim=True).clamp(min=1).double()
    return (kept & ~(candidates & (place / number < fraction))).reshape(mask.shape)


def trust_region_mask(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    divergence: Float[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """DPPO: all tokens but those that would move on, away from a policy they are already far from.

    ¬[Aₜ > 0 and πₜ > π_old,ₜ and Dₜ > δ_high] ∧ ¬[Aₜ < 0 and πₜ < π_old,ₜ and Dₜ > δ_low]

    DPPO-TV with D = `binary_tv`, DPPO-KL with D = `binary_kl`; the loss is −ρₜ Aₜ on this mask.

    Raises: ValueError unless the shapes agree and both δ are ≥ 0.

    Qi et al. 2026: https://arxiv.org/abs/2602.04879
    """
    checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, divergence=divergence)
    checks.floating(old_logprobs=old_logprobs, divergence=divergence)
    checks.per_token(logprobs, advantages)
    checks.width(low=low, high=high)
    checks.fits(logprobs, low=low, high=high)
    up = (advantages > 0) & (logprobs > old_logprobs) & (divergence > high)
    down = (advantages < 0) & (logprobs < old_logprobs) & (divergence > low)
    return ~(up | down)
