"""Running mean and variance as a value: of rewards, to scale them, or of returns, for PopArt.

No sum of squares is kept, so nothing cancels far from 0. Hidden entries are never read. Scaling is
(x − μ)/√(σ² + ε).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.tree import like


class Moments(NamedTuple):
    count: Float[Tensor, ""]
    mean: Float[Tensor, ""]
    variance: Float[Tensor, ""]


class PopArt(NamedTuple):
    """The last layer of a critic, which says weight · x + bias."""

    weight: Float[Tensor, "..."]
    bias: Float[Tensor, "..."]


def no_moments(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Moments:
    """Of nothing yet: count and mean 0, variance 1."""
    nought = torch.zeros((), dtype=dtype, device=device)
    return Moments(nought, nought.clone(), torch.ones_like(nought))


def add_moments(
    moments: Moments, x: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch"]
) -> Moments:
    """The moments of all that was ever kept: part by part is the whole at once.

    n' = n + m,   μ' = μ + (m/n')(x̄ − μ),   σ'² = (n σ² + m s²)/n' + (n m/n'²)(x̄ − μ)²

    x̄ and s² are mean and population variance of the m kept entries; none change nothing.

    Raises: ValueError unless the shapes agree or where a kept entry is not finite; TypeError for a
    mask that is not bool.

    Chan et al. 1983: https://doi.org/10.1080/00031305.1983.10483115
    """
    number, mean, variance = _moments_of(moments, x, mask)
    rate = number / (moments.count + number).clamp(min=1)
    return _blend(moments, mean, variance, rate, moments.count + number)


def decay_moments(
    moments: Moments,
    x: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"],
    *,
    rate: float | Tensor,
) -> Moments:
    """Moments that forget, as PopArt's do: exponential averages of x and x², at a rate per batch.

    μ' = (1 − β) μ + β x̄,   σ'² = (1 − β) σ² + β s² + β (1 − β)(x̄ − μ)²

    The variance is the paper's ν − μ², without its cancellation. No kept entry changes nothing.

    Raises: as `add_moments`; ValueError unless 0 ≤ β ≤ 1.

    Van Hasselt et al. 2016: https://arxiv.org/abs/1602.07714
    """
    checks.unit_interval(rate=rate)
    number, mean, variance = _moments_of(moments, x, mask)
    rate = torch.where(number > 0, like(mean, rate), 0.0)
    return _blend(moments, mean, variance, rate, moments.count + number)


def normalise(
    x: Float[Tensor, "*batch"], moments: Moments, *, eps: float | Tensor
) -> Float[Tensor, "*batch"]:
    """(x − μ)/√(σ² + ε).

    Raises: ValueError unless ε > 0.
    """
    checks.floating(x=x)
    checks.positive(eps=eps)
    return (x - moments.mean.to(x.dtype)) / (moments.variance + eps).sqrt().to(x.dtype)


def denormalise(
    x: Float[Tensor, "*batch"], moments: Moments, *, eps: float | Tensor
) -> Float[Tensor, "*batch"]:
    """√(σ² + ε) x + μ, what `normalise` undoes.

    Raises: ValueError unless ε > 0.
    """
    checks.floating(x=x)
    checks.positive(eps=eps)
    return x * (moments.variance + eps).sqrt().to(x.dtype) + moments.mean.to(x.dtype)


def popart(
    weight: Float[Tensor, "..."],
    bias: Float[Tensor, "..."],
    old: Moments,
    new: Moments,
    *,
    eps: float | Tensor,
) -> PopArt:
    """A critic's last layer for new moments, so that what it says, denormalised, stays the same.

    w' = (σ/σ') w,   b' = (σ b + μ − μ')/σ'

    Raises: ValueError unless ε > 0.

    Van Hasselt et al. 2016: https://arxiv.org/abs/1602.07714
    """
    checks.positive(eps=eps)
    scale, new_scale = (old.variance + eps).sqrt(), (new.variance + eps).sqrt()
    shifted = (scale * bias + old.mean - new.mean) / new_scale
    return PopArt((scale / new_scale * weight).to(weight.dtype), shifted.to(bias.dtype))


def _moments_of(moments: Moments, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and population variance of the kept entries, in the dtype of `moments`."""
    checks.same_shape(x=x, mask=mask)
    checks.floating(x=x)
    checks.bool_mask(mask)
    checks.finite(x, mask, name="x")
    kept = torch.where(mask, x, 0.0).to(moments.mean.dtype)
    number = mask.sum().to(kept.dtype)
    mean = kept.sum() / number.clamp(min=1)
    variance = torch.where(mask, kept - mean, 0.0).square().sum() / number.clamp(min=1)
    return number, mean, variance


def _blend(
    moments: Moments, mean: Tensor, variance: Tensor, rate: Tensor, count: Tensor
) -> Moments:
    step = mean - moments.mean
    spread = (1 - rate) * moments.variance + rate * variance + rate * (1 - rate) * step.square()
    return Moments(count, moments.mean + rate * step, spread)
