"""Policy losses, per token and unreduced: minimise them, and choose the reduction as weights.

ρₜ = exp(log πₜ − log π_old,ₜ) throughout; at the first epoch, π = π_old, it is exactly 1. One
advantage per sequence is written `advantages[..., None]`, never broadcast by accident.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn.checks import fits, floating, same_shape, width
from rlhf_fn.kl import k3


def policy_gradient(
    logprobs: Float[Tensor, "*batch time"], advantages: Float[Tensor, "*batch #time"]
) -> Float[Tensor, "*batch time"]:
    """REINFORCE: raise the log-probability of what did better than expected.

    Lₜ = −Aₜ log πₜ

    Raises: ValueError unless `advantages` are [*batch, time] or [*batch, 1].

    Williams 1992: https://doi.org/10.1007/BF00992696
    """
    _per_token(logprobs, advantages)
    return -advantages * logprobs


def clipped_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """PPO's clipped surrogate.

    Lₜ = −min(ρₜ Aₜ, clip(ρₜ, 1 − ε_low, 1 + ε_high) Aₜ)

    ε_low = ε_high is PPO, ε_low < ε_high DAPO's clip-higher, ε = ∞ the unclipped −ρₜ Aₜ.

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and both ε are ≥ 0.

    Schulman et al. 2017, eq. 7: https://arxiv.org/abs/1707.06347
    """
    _check_clip(logprobs, old_logprobs, clip_low, clip_high)
    _per_token(logprobs, advantages)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(min=1 - clip_low).clamp(max=1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_fraction(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """1 where `clipped_surrogate` has no gradient because of its clip, else 0; a per-token metric.

    cₜ = [Aₜ > 0 and ρₜ > 1 + ε_high] + [Aₜ < 0 and ρₜ < 1 − ε_low]

    A ratio outside the range on the side that the minimum does not clip is not counted. The
    fraction is its `weighted_sum` with weights that sum to 1.

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and both ε are ≥ 0.

    Schulman et al. 2017, §3: https://arxiv.org/abs/1707.06347
    """
    _check_clip(logprobs, old_logprobs, clip_low, clip_high)
    _per_token(logprobs, advantages)
    ratio = (logprobs - old_logprobs).exp()
    too_high = (advantages > 0) & (ratio > 1 + clip_high)
    too_low = (advantages < 0) & (ratio < 1 - clip_low)
    return (too_high | too_low).to(ratio.dtype)


def approximate_kl(
    logprobs: Float[Tensor, "*batch time"], old_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """How far the policy has moved from the one that sampled; a per-token metric, in nats.

    dₜ = ρₜ − 1 − log ρₜ ≥ 0,   E_old[dₜ] = KL(π_old ‖ π)

    `k3` with the behaviour policy first, for the tokens are its samples. float32 from
    half precision.

    Raises: ValueError unless the shapes agree.

    Schulman 2020: http://joschu.net/blog/kl-approx.html
    """
    return k3(old_logprobs, logprobs)


def entropy_bonus(
    entropy: Float[Tensor, "*batch time"], *, coef: float | Tensor
) -> Float[Tensor, "*batch time"]:
    """The loss that keeps a policy exploring: minimising it raises the entropy.

    Lₜ = −c Hₜ

    Mnih et al. 2016, §4: https://arxiv.org/abs/1602.01783
    """
    fits(entropy, coef=coef)
    return -coef * entropy


def _check_clip(
    logprobs: Tensor, old_logprobs: Tensor, clip_low: float | Tensor, clip_high: float | Tensor
) -> None:
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    floating(old_logprobs=old_logprobs)
    width(clip_low=clip_low, clip_high=clip_high)
    fits(logprobs, clip_low=clip_low, clip_high=clip_high)


def _per_token(logprobs: Tensor, advantages: Tensor) -> None:
    floating(logprobs=logprobs, advantages=advantages)
    *batch, time = logprobs.shape
    if [*advantages.shape] not in ([*batch, time], [*batch, 1]):
        raise ValueError(
            f"advantages are {tuple(advantages.shape)} and logprobs {tuple(logprobs.shape)}: "
            f"expected {(*batch, time)}, or {(*batch, 1)} for one advantage per sequence, which is "
            "written advantages[..., None]"
        )
