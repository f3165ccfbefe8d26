"""Returns and advantages along the tokens that a mask keeps, in scans over time.

A masked token is as if cut out of its row: t⁺ is the next kept token after t, and what the mask
hides is never read and comes back as 0. Past the last kept token V is 0, for a row that ended, or
`bootstrap`, for one that was cut off: V after the last kept token. γ is `discount`, λ is `lam`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backups import backup
from rlhf_kernels.scans import suffix_scan


class Gae(NamedTuple):
    advantages: Tensor
    returns: Tensor


class Vtrace(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float | Tensor,
    lam: float | Tensor, bootstrap: Tensor | None = None,
) -> Gae:  # fmt: skip
    """Generalised advantage estimation. Advantages are not normalised.

    δₜ = rₜ + γ V(t⁺) − Vₜ,   Aₜ = δₜ + γλ A(t⁺),   Rₜ = Aₜ + Vₜ

    `rlhf_fn.gae`, at one read of rewards, values and mask and one write of both results, and as
    much backward; what the mask hides is not read. Any strides. Its results within 1e-13 in
    float64; else summed in float32, and as near to the truth as its. Reverse mode of any order is
    scans; forward mode, and gradients in γ and λ, are those of the formula.

    Args:
        discount, lam: γ and λ, numbers, or tensors that fit `mask` and do not recompile. Rates of
            each step take two passes and a few operations between them.

    Raises: ValueError where shapes or devices differ, γ or λ leave [0, 1] or a kept reward is not
    finite; TypeError for a mask that is not bool. Numbers on a GPU are not looked at.

    Schulman et al. 2016, eq. 16: https://arxiv.org/abs/1506.02438
    """
    _check(mask, discount, bootstrap, rewards=rewards, values=values)
    checks.unit_interval(mask, lam=lam)
    if _per_row(discount) and _per_row(lam):
        return Gae(*backup(rewards, values, mask, bootstrap, discount, lam))
    errors = _td_error(rewards, values, mask, discount, bootstrap)
    advantages = _accumulate(errors, mask, discount * lam)
    return Gae(advantages, advantages + torch.where(mask, values, 0.0))


def discounted_returns(
    rewards: Tensor, mask: Tensor, *, discount: float | Tensor, bootstrap: Tensor | None = None
) -> Tensor:
    """The discounted reward still to come, this step's included.

    Rₜ = rₜ + γ R(t⁺)

    `rlhf_fn.discounted_returns`; speed, arguments and errors as `gae`.

    Williams 1992: https://doi.org/10.1007/BF00992696
    """
    _check(mask, discount, bootstrap, rewards=rewards)
    if _per_row(discount):
        return backup(rewards, None, mask, bootstrap, discount, 1.0)[1]
    return _accumulate(rewards, mask, discount, bootstrap)


def vtrace(
    logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, values: Tensor, mask: Tensor, *,
    discount: float | Tensor, lam: float | Tensor = 1.0, clip_rho: float | Tensor,
    clip_c: float | Tensor, bootstrap: Tensor | None = None,
) -> Vtrace:  # fmt: skip
    """Off-policy returns and advantages by clipped importance weights.

    ρₜ = min(ρ̄, πₜ/π_old,ₜ),   cₜ = λ min(c̄, πₜ/π_old,ₜ),   δₜ = ρₜ (rₜ + γ V(t⁺) − Vₜ)
    Rₜ = Vₜ + δₜ + γ cₜ (R(t⁺) − V(t⁺)),   Aₜ = ρₜ (rₜ + γ R(t⁺) − Vₜ)

    `rlhf_fn.vtrace` in three scans: of V, of R − V, and of that once more. Nothing is detached.
    Arguments and errors as `gae`; ValueError unless ρ̄ and c̄ are ≥ 0.

    Espeholt et al. 2018, §4.1: https://arxiv.org/abs/1802.01561
    """
    checks.floating(logprobs=logprobs, old_logprobs=old_logprobs)
    checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    _check(mask, discount, bootstrap, rewards=rewards, values=values)
    checks.unit_interval(mask, lam=lam)
    checks.width(mask, clip_rho=clip_rho, clip_c=clip_c)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    rho, c = _clipped_exp(log_ratio, clip_rho), lam * _clipped_exp(log_ratio, clip_c)
    errors = _td_error(rewards, values, mask, discount, bootstrap)
    excess = _accumulate(rho * errors, mask, discount * c)
    advantages = rho * (errors + discount * _next(excess, mask, None))
    return Vtrace(advantages, excess + torch.where(mask, values, 0.0))


def _td_error(rewards, values, mask, discount, bootstrap) -> Tensor:
    """δₜ = rₜ + γ V(t⁺) − Vₜ, 0 off mask."""
    target = rewards + discount * _next(values, mask, bootstrap)
    return torch.where(mask, target - values, 0.0)


def _next(x: Tensor, mask: Tensor, past: Tensor | None) -> Tensor:
    """x(t⁺): x at the next kept token, and `past` (None: 0) after the last; 0 off mask."""
    return backup(x.new_zeros(()).expand_as(x), x, mask, past, 1.0, 0.0)[1]


def _accumulate(x: Tensor, mask: Tensor, decay: Tensor, past: Tensor | None = None) -> Tensor:
    """yₜ = xₜ + decayₜ y(t⁺), and `past` (None: 0) after the last kept token; 0 off mask."""
    kept = torch.where(mask, x, 0.0)
    held = torch.where(mask, decay, 1.0).to(x.dtype)
    if past is not None:
        kept, held = torch.cat([kept, past[..., None]], -1), F.pad(held, (0, 1))
    return torch.where(mask, suffix_scan(kept, held)[..., : mask.shape[-1]], 0.0)


def _per_row(rate: float | Tensor) -> bool:
    return not isinstance(rate, Tensor) or rate.ndim == 0 or rate.shape[-1] == 1


def _clipped_exp(x: Tensor, clip: float | Tensor) -> Tensor:
    """min(eˣ, clip), without overflow on the way."""
    return x.clamp(max=torch.as_tensor(clip, dtype=x.dtype, device=x.device).log()).exp()


def _check(
    mask: Tensor, discount: float | Tensor, bootstrap: Tensor | None, **tensors: Tensor
) -> None:
    checks.same_shape(**tensors, mask=mask)
    checks.same_device(**tensors, mask=mask)
    checks.bool_mask(mask)
    checks.floating(**tensors)
    checks.finite(tensors["rewards"], mask, name="rewards")
    checks.unit_interval(mask, discount=discount)
    if bootstrap is not None:
        checks.one_per_row(mask, bootstrap)
        checks.same_device(bootstrap=bootstrap, mask=mask)
