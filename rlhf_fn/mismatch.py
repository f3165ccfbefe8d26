"""Weights and masks for samples of another policy: another engine, another precision, an older one.

`log_ratio` is log π − log π_old of each token, π_old being the policy that sampled it, or of its
whole answer: `sum_log_ratio`, or `mean_log_ratio` for the geometric mean. Weights and masks
multiply the weights of a loss. Hold them constant, as the papers do, by computing them from
log-probs that carry no gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.sequence import masked_mean
from rlhf_fn.tree import like


def truncated_weights(
    log_ratio: Float[Tensor, "*batch time"], *, clip: float | Tensor
) -> Float[Tensor, "*batch time"]:
    """Truncated importance sampling: wₜ = min(ρₜ, C).

    C = ∞ is the importance weight itself. OpenRLHF also clamps from below, at ½.

    Raises: ValueError unless C ≥ 0.

    Ionides 2008: https://doi.org/10.1198/106186008X320456; Yao et al. 2025:
    https://fengyao.notion.site/off-policy-rl
    """
    checks.floating(log_ratio=log_ratio)
    checks.width(clip=clip)
    checks.fits(log_ratio, clip=clip)
    return log_ratio.clamp(max=like(log_ratio, clip).log()).exp()  # no overflow on the way


def masked_weights(
    log_ratio: Float[Tensor, "*batch time"], *, low: float | Tensor, high: float | Tensor
) -> Float[Tensor, "*batch time"]:
    """Masked importance sampling (IcePop): wₜ = ρₜ where low ≤ ρₜ ≤ high, else 0.

    Raises: ValueError unless both bounds are ≥ 0.

    Ling Team 2025: https://arxiv.org/abs/2510.18855
    """
    inside = _inside(log_ratio, low, high)
    return torch.where(inside, torch.where(inside, log_ratio, 0.0).exp(), 0.0)


def ratio_mask(
    log_ratio: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """The kept tokens with low ≤ ρₜ ≤ high: whole answers where ρ is that of the answer.

    Raises: ValueError unless the shapes agree and both bounds are ≥ 0; TypeError for a mask that is
    not bool.

    Liu et al. 2025: https://richardli.xyz/rl-collapse
    """
    checks.same_shape(log_ratio=log_ratio, mask=mask)
    checks.bool_mask(mask)
    return mask & _inside(log_ratio, low, high)


def veto_mask(
    log_ratio: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """The kept tokens of the answers with low ≤ ρₜ ≤ high at all kept tokens: one outlier vetoes.

    Raises: as `ratio_mask`.
    """
    outliers = mask & ~ratio_mask(log_ratio, mask, low=low, high=high)
    return mask & ~outliers.any(-1, keepdim=True)


def divergence_mask(
    divergence: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    limit: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """The kept tokens whose divergence from the policy that sampled them is within a limit.

    [mₜ and Dₜ ≤ limit], of a token, D = `k1`, `k2` or `k3` of (π_old, π), or of an answer: its
    `masked_sum`, `masked_mean` or `masked_max`, written `[..., None]`

    k1 is signed and rejects on one side only; verl compares its −k1 with a limit for k1.

    Raises: ValueError unless `divergence` is [*batch, time] or [*batch, 1]; TypeError for a mask
    that is not bool.
    """
    checks.bool_mask(mask)
    checks.floating(divergence=divergence)
    *batch, time = mask.shape
    if [*divergence.shape] not in ([*batch, time], [*batch, 1]):
        raise ValueError(
            f"divergence is {tuple(divergence.shape)} and mask {tuple(mask.shape)}: expected one "
            "for each token, or one for each row, written divergence[..., None]"
        )
    checks.fits(mask, limit=limit)
    return mask & (divergence <= limit)


def off_policy_sequence_mask(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    limit: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """DeepSeek-V3.2: kept tokens, but not those of bad answers that became unlikely.

    [mₜ and (Aₜ ≥ 0 or (1/|y|) Σᵤ mᵤ (log π_old,ᵤ − log πᵤ) ≤ δ)]

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.

    DeepSeek-AI 2025, §3.1: https://arxiv.org/abs/2512.02556
    """
    checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    checks.floating(logprobs=logprobs, old_logprobs=old_logprobs)
    checks.per_token(logprobs, advantages)
    checks.fits(logprobs, limit=limit)
    gap = masked_mean(old_logprobs - logprobs, mask)[..., None]
    return mask & ((advantages >= 0) | (gap <= limit))


def second_moment_mask(
    log_ratio: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    limit: float | Tensor,
) -> Bool[Tensor, "*batch time"]:
    """M2PO: the kept tokens without the most extreme, so many that the second moment is in bounds.

    The largest {t : (log ρₜ)² ≤ x} over which the mean of (log ρ)² is ≤ τ, over all axes together.
    Ties stay or go together.

    Raises: ValueError unless the shapes agree and τ ≥ 0; TypeError for a mask that is not bool.

    Zheng et al. 2025: https://arxiv.org/abs/2510.01161
    """
    checks.same_shape(log_ratio=log_ratio, mask=mask)
    checks.floating(log_ratio=log_ratio)
    checks.bool_mask(mask)
    checks.non_negative(limit=limit)
    squares = torch.where(mask, log_ratio, torch.inf).flatten().square()
    ascending = squares.sort().values
    means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=mask.device)
    number = (means <= limit).sum()  # the means of a sorted row never fall
    least_out = torch.cat([ascending, ascending.new_full((1,), torch.inf)]).gather(0, number[None])
    return mask & (squares.reshape(mask.shape) < least_out)


def self_normalised_weights(
    weights: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """wₜ / mean w, over all kept tokens together: weights of mean 1; 0 where hidden.

    Weights that are 0 throughout stay 0.

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.
    """
    total, number = _totals(weights, mask)
    return torch.where(mask, weights, 0.0) * number / torch.where(total > 0, total, 1.0)


def effective_sample_size(
    weights: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, ""]:
    """(Σ w)² / (n Σ w²), over all n kept tokens together: 1 where all weigh the same, 1/n for one.

    0 where nothing has a weight.

    Raises: as `self_normalised_weights`.

    Kish 1965, Survey Sampling
    """
    total, number = _totals(weights, mask)
    squares = torch.where(mask, weights, 0.0).square().sum()
    return total.square() / (number * torch.where(squares > 0, squares, 1.0))


def chi_squared(
    log_ratio: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """χ²(π ‖ π_old), of each row by its own kept tokens: mean ρ² − 1, E_old[ρ²] − 1 in expectation.

    0 for a row without a kept token.

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.
    """
    checks.same_shape(log_ratio=log_ratio, mask=mask)
    checks.floating(log_ratio=log_ratio)
    checks.bool_mask(mask)
    return masked_mean(torch.expm1(2 * torch.where(mask, log_ratio, 0.0)), mask)


def _inside(log_ratio: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    checks.floating(log_ratio=log_ratio)
    checks.width(low=low, high=high)
    checks.fits(log_ratio, low=low, high=high)
    ratio = log_ratio.exp()
    return (ratio >= low) & (ratio <= high)


def _totals(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Σ m w and Σ m, the latter at least 1."""
    checks.same_shape(weights=weights, mask=mask)
    checks.floating(weights=weights)
    checks.bool_mask(mask)
    return torch.where(mask, weights, 0.0).sum(), mask.sum().clamp(min=1)
