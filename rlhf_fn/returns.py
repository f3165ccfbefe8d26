"""Returns and advantages along the tokens that a mask keeps.

A masked token is as if cut out of its row: t⁺ is the next kept token after t, and what the mask
hides is never read and comes back as 0. Past the last kept token V is 0, for a row that ended, or
`bootstrap`, for one that was cut off: V after the last kept token. γ is `discount`, λ is `lam`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.rewards import (
    discounted_reward,
    last_token_reward,
    shape_rewards,
    uniform_reward,
    whiten,
)
from rlhf_fn.scan import suffix_scan

__all__ = [
    "Gae", "Vtrace", "discounted_returns", "discounted_reward", "gae", "lambda_returns",
    "last_token_reward", "q_learning_error", "shape_rewards", "td_error", "uniform_reward",
    "vtrace", "whiten",
]  # fmt: skip


class Gae(NamedTuple):
    advantages: Float[Tensor, "*batch time"]
    returns: Float[Tensor, "*batch time"]


class Vtrace(NamedTuple):
    advantages: Float[Tensor, "*batch time"]
    returns: Float[Tensor, "*batch time"]


def gae(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    lam: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Gae:
    """Generalised advantage estimation. Advantages are not normalised.

    δₜ = rₜ + γ V(t⁺) − Vₜ,   Aₜ = δₜ + γλ A(t⁺),   Rₜ = Aₜ + Vₜ

    λ = 0 is the TD error, λ = 1 the discounted return less the value.

    Raises: ValueError where shapes differ, γ or λ leave [0, 1] or a kept reward is not finite;
    TypeError for a mask that is not bool.

    Schulman et al. 2016, eq. 16: https://arxiv.org/abs/1506.02438
    """
    _check_rate(mask, lam=lam)
    deltas = td_error(rewards, values, mask, discount=discount, bootstrap=bootstrap)
    advantages = _accumulate(deltas, mask, decay=discount * lam)
    return Gae(advantages, advantages + torch.where(mask, values, 0.0))


def td_error(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch time"]:
    """The temporal-difference error of each step.

    δₜ = rₜ + γ V(t⁺) − Vₜ

    Raises: ValueError where shapes differ, γ leaves [0, 1] or a kept reward is not finite;
    TypeError for a mask that is not bool.

    Sutton 1988: https://doi.org/10.1007/BF00115009
    """
    _check(mask, discount, bootstrap, rewards=rewards, values=values)
    target = rewards + discount * _next(values, mask, bootstrap)
    return torch.where(mask, target - values, 0.0)


def discounted_returns(
    rewards: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch time"]:
    """The discounted reward still to come, this step's included.

    Rₜ = rₜ + γ R(t⁺)

    Raises: as `td_error`.

    Williams 1992: https://doi.org/10.1007/BF00992696
    """
    _check(mask, discount, bootstrap, rewards=rewards)
    return _accumulate(rewards, mask, decay=discount, past=bootstrap)


def lambda_returns(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    lam: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch time"]:
    """The λ-weighted mean of all n-step returns; the `returns` of `gae`.

    Rₜ = rₜ + γ [(1 − λ) V(t⁺) + λ R(t⁺)]

    Raises: as `gae`.

    Sutton 1988: https://doi.org/10.1007/BF00115009
    """
    _check(mask, discount, bootstrap, rewards=rewards, values=values)
    _check_rate(mask, lam=lam)
    steps = rewards + discount * (1 - lam) * _next(values, mask, bootstrap)
    return _accumulate(steps, mask, decay=discount * lam, past=bootstrap)


def q_learning_error(
    q_values: Float[Tensor, "*batch time actions"],
    target_q_values: Float[Tensor, "*batch time actions"],
    actions: Int[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch time"]:
    """The Q-learning error of each step; `actions` are tokens where the policy is a model's.

    δₜ = rₜ + γ maxₐ Q̄(t⁺, a) − Q(t, aₜ)

    Q̄ is the target network's, or `q_values.detach()`: nothing is detached here. `bootstrap` is
    maxₐ Q̄ after the last kept token of a row that was cut off.

    Raises: as `td_error`; ValueError naming the position of a kept action outside [0, actions).

    Watkins and Dayan 1992: https://doi.org/10.1007/BF00992698
    """
    checks.same_shape(q_values=q_values, target_q_values=target_q_values)
    _check(mask, discount, bootstrap, best_q=q_values[..., 0], actions=actions, rewards=rewards)
    checks.integers(actions=actions)
    actions = torch.where(mask, actions, 0).long()
    checks.token_ids(actions, q_values.shape[-1], name="actions")
    best = torch.where(mask[..., None], target_q_values, 0.0).amax(-1)
    chosen = q_values.gather(-1, actions[..., None]).squeeze(-1)
    return torch.where(mask, rewards + discount * _next(best, mask, bootstrap) - chosen, 0.0)


def vtrace(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    lam: float | Tensor = 1.0,
    clip_rho: float | Tensor,
    clip_c: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Vtrace:
    """Off-policy returns and advantages by clipped importance weights.

    ρₜ = min(ρ̄, πₜ/π_old,ₜ),   cₜ = λ min(c̄, πₜ/π_old,ₜ),   δₜ = ρₜ (rₜ + γ V(t⁺) − Vₜ)
    Rₜ = Vₜ + δₜ + γ cₜ (R(t⁺) − V(t⁺)),   Aₜ = ρₜ (rₜ + γ R(t⁺) − Vₜ)

    On policy with ρ̄, c̄ ≥ 1 the returns are `lambda_returns`. The paper holds R and A constant in
    its losses; here nothing is detached.

    Args:
        lam: λ of the paper's remark 2; 1 is IMPALA.

    Raises: as `gae`; ValueError unless ρ̄ and c̄ are ≥ 0.

    Espeholt et al. 2018, §4.1: https://arxiv.org/abs/1802.01561
    """
    checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    _check_rate(mask, lam=lam)
    checks.floating(logprobs=logprobs, old_logprobs=old_logprobs)
    checks.width(clip_rho=clip_rho, clip_c=clip_c)
    checks.fits(mask, clip_rho=clip_rho, clip_c=clip_c)
    errors = td_error(rewards, values, mask, discount=discount, bootstrap=bootstrap)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    rho, c = _clipped_exp(log_ratio, clip_rho), lam * _clipped_exp(log_ratio, clip_c)
    excess = _accumulate(rho * errors, mask, decay=discount * c)
    ahead = torch.where(mask, _next(excess, mask, None), 0.0)
    advantages = rho * (errors + discount * ahead)
    return Vtrace(advantages, excess + torch.where(mask, values, 0.0))


def _check(
    mask: Tensor, discount: float | Tensor, bootstrap: Tensor | None, **tensors: Tensor
) -> None:
    checks.same_shape(**tensors, mask=mask)
    checks.bool_mask(mask)
    checks.floating(**{name: x for name, x in tensors.items() if name != "actions"})
    if "rewards" in tensors:
        checks.finite(tensors["rewards"], mask, name="rewards")
    _check_rate(mask, discount=discount)
    if bootstrap is not None and bootstrap.shape != mask.shape[:-1]:
        raise ValueError(
            f"bootstrap and mask: got bootstrap {tuple(bootstrap.shape)} and mask "
            f"{tuple(mask.shape)}, expected one bootstrap value per row"
        )


def _check_rate(mask: Tensor, **rates: float | Tensor) -> None:
    checks.unit_interval(**rates)
    checks.fits(mask, **rates)


def _clipped_exp(x: Tensor, clip: float | Tensor) -> Tensor:
    """min(eˣ, clip), without overflow on the way."""
    return x.clamp(max=torch.as_tensor(clip, dtype=x.dtype, device=x.device).log()).exp()


def _past(x: Tensor, past: Tensor | None) -> Tensor:
    """One more column at the end: what holds past the last token."""
    last = torch.zeros_like(x[..., :1].sum(-1)) if past is None else past
    return torch.cat([x, last[..., None]], -1)


def _next(x: Tensor, mask: Tensor, past: Tensor | None) -> Tensor:
    """x(t⁺): x at the next kept token, and `past` (None: 0) after the last."""
    kept = _past(torch.where(mask, x, 0.0), past)
    held = _past(torch.where(mask, 0.0, 1.0).to(x.dtype), None)  # a masked token passes it on
    return suffix_scan(kept, held)[..., 1:]


def _accumulate(
    x: Tensor, mask: Tensor, *, decay: float | Tensor, past: Tensor | None = None
) -> Tensor:
    """yₜ = xₜ + decayₜ y(t⁺), and `past` (None: 0) after the last kept token; 0 off mask."""
    kept = _past(torch.where(mask, x, 0.0), past)
    decay = torch.as_tensor(decay, dtype=x.dtype, device=x.device)
    held = _past(torch.where(mask, decay, 1.0), None)
    return torch.where(mask, suffix_scan(kept, held)[..., :-1], 0.0)
