"""Value losses, per token and unreduced, and how much of the returns the values explain."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn.checks import bool_mask, fits, floating, same_shape, width


def value_loss(
    values: Float[Tensor, "*batch time"], returns: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """Squared error, with the half: its gradient is the error, V − R.

    Lₜ = ½ (Vₜ − Rₜ)²

    Raises: ValueError unless the shapes agree.

    Schulman et al. 2017, eq. 9 (there without the half): https://arxiv.org/abs/1707.06347
    """
    same_shape(values=values, returns=returns)
    floating(values=values, returns=returns)
    return 0.5 * (values - returns).square()


def clipped_value_loss(
    values: Float[Tensor, "*batch time"],
    old_values: Float[Tensor, "*batch time"],
    returns: Float[Tensor, "*batch time"],
    *,
    clip: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """Squared error that stops paying once a value has moved `clip` towards its return.

    Lₜ = ½ max((Vₜ − Rₜ)², (clip(Vₜ, V_old,ₜ − c, V_old,ₜ + c) − Rₜ)²)

    c is in units of reward; c = ∞ is `value_loss`.

    Raises: ValueError unless the shapes agree and c ≥ 0.

    From OpenAI's PPO code; studied by Engstrom et al. 2020: https://arxiv.org/abs/2005.12729
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    floating(values=values, old_values=old_values, returns=returns)
    width(clip=clip)
    fits(values, clip=clip)
    clipped = values.clamp(old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def huber_value_loss(
    values: Float[Tensor, "*batch time"],
    returns: Float[Tensor, "*batch time"],
    *,
    delta: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """Squared error near the return and absolute error far from it: a gradient of at most δ.

    Lₜ = ½ e² where |e| ≤ δ, else δ (|e| − ½ δ),   e = Vₜ − Rₜ

    δ in units of reward; δ = ∞ is `value_loss`.

    Raises: ValueError unless the shapes agree and δ ≥ 0.

    Huber 1964: https://doi.org/10.1214/aoms/1177703732
    """
    same_shape(values=values, returns=returns)
    floating(values=values, returns=returns)
    width(delta=delta)
    fits(values, delta=delta)
    error = (values - returns).abs()
    near = error.clamp(max=delta)
    return near * (error - 0.5 * near)


def quantile_value_loss(
    quantiles: Float[Tensor, "*batch time quantiles"], returns: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """Quantile regression: a critic of the whole distribution of returns, at evenly spaced shares.

    Lₜ = Σᵢ uᵢ (τᵢ − [uᵢ < 0]),   uᵢ = Rₜ − θₜᵢ,   τᵢ = (2i − 1)/2N,   i = 1 ... N

    Raises: ValueError unless the leading axes of `quantiles` are those of `returns`.

    Dabney et al. 2017, eq. 8: https://arxiv.org/abs/1710.10044
    """
    same_shape(quantiles=quantiles[..., 0], returns=returns)
    floating(quantiles=quantiles, returns=returns)
    number = quantiles.shape[-1]
    place = torch.arange(number, device=quantiles.device, dtype=quantiles.dtype)
    below = returns[..., None] - quantiles
    return (
        torch.where(below < 0, (place + 0.5) / number - 1, (place + 0.5) / number)
        .mul(below)
        .sum(-1)
    )


def explained_variance(
    values: Float[Tensor, "*batch time"],
    returns: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, ""]:
    """The share of the returns' variance that the values explain, over all kept tokens together.

    1 − Var(R − V) / Var(R): 1 is perfect, 0 no better than a constant, negative worse than one.

    0 by definition where the returns do not vary (nothing to explain) or nothing is kept. Hidden
    positions are never read.

    Raises: ValueError unless the shapes agree; TypeError unless `mask` is bool.
    """
    bool_mask(mask)
    same_shape(values=values, returns=returns, mask=mask)
    floating(values=values, returns=returns)
    total = _variance(returns, mask)
    explained = 1 - _variance(returns - values, mask) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, explained, 0.0)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """Mean squared deviation of what `mask` keeps: exactly 0 when that is all equal."""
    x, mask, kept = x.flatten(), mask.flatten(), mask.sum().clamp(min=1)
    first = x.gather(0, mask.int().argmax(0, keepdim=True))  # equal entries become exact zeros
    relative = torch.where(mask, x - first, 0.0)
    return torch.where(mask, relative - relative.sum() / kept, 0.0).square().sum() / kept
