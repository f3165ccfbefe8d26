"""Policy losses, per token and unreduced: minimise them, and choose the reduction as weights.

ρₜ = exp(log πₜ − log π_old,ₜ) throughout; at the first epoch, π = π_old, it is exactly 1. One
advantage per sequence is written `advantages[..., None]`, never broadcast by accident.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn.checks import above_one, fits, floating, non_negative, per_token, same_shape, width
from rlhf_fn.kl import k3
from rlhf_fn.tree import like


def policy_gradient(
    logprobs: Float[Tensor, "*batch time"], advantages: Float[Tensor, "*batch #time"]
) -> Float[Tensor, "*batch time"]:
    """REINFORCE: raise the log-probability of what did better than expected.

    Lₜ = −Aₜ log πₜ

    Of `vtrace`'s advantages, held constant, IMPALA's; of p − ½, p the chance to win, and with
    β `k2`, Nash-MD's.

    Raises: ValueError unless `advantages` are [*batch, time] or [*batch, 1].

    Williams 1992: https://doi.org/10.1007/BF00992696
    """
    per_token(logprobs, advantages)
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
    per_token(logprobs, advantages)
    log_ratio = logprobs - old_logprobs
    past = 1 + like(log_ratio, clip_high).log1p()  # a gain is clipped there; eˣ may be ∞, and 0 · ∞
    ratio = torch.where(advantages >= 0, log_ratio.clamp(max=past), log_ratio).exp()
    clipped = ratio.clamp(min=1 - clip_low).clamp(max=1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def dual_clipped_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """`clipped_surrogate` whose loss is bounded for bad tokens that became much more likely, too.

    Lₜ = Pₜ where Aₜ ≥ 0, else min(Pₜ, −c Aₜ),   P = `clipped_surrogate`,   c > 1

    It is `clipped_surrogate` of min(ρₜ, c) where Aₜ < 0, so c = ∞ is `clipped_surrogate`, and for
    c > 1 + ε_high it is INTELLECT-2's two-sided clip: −min(min(ρₜ, δ) Aₜ, clip(ρₜ) Aₜ), δ = c.

    Raises: as `clipped_surrogate`; ValueError unless c > 1.

    Ye et al. 2020: https://arxiv.org/abs/1912.09729. Two-sided: Prime Intellect 2025:
    https://arxiv.org/abs/2505.07291
    """
    _check_clip(logprobs, old_logprobs, clip_low, clip_high)
    per_token(logprobs, advantages)
    above_one(dual_clip=dual_clip)
    fits(logprobs, dual_clip=dual_clip)
    log_ratio = logprobs - old_logprobs
    limit = like(log_ratio, dual_clip).log()
    capped = torch.where(advantages < 0, log_ratio.clamp(max=limit), log_ratio)
    return clipped_surrogate(
        capped, torch.zeros_like(capped), advantages, clip_low=clip_low, clip_high=clip_high
    )


def decoupled_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    prox_logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """PPO with two old policies: one that sampled, and one that the clip keeps near.

    Lₜ = (π_prox/π_old)ₜ · clipped_surrogate(π, π_prox, A)ₜ

    π_prox = π_old is `clipped_surrogate`.

    Raises: as `clipped_surrogate`.

    Hilton et al. 2021: https://arxiv.org/abs/2110.00641; AReaL, Fu et al. 2025:
    https://arxiv.org/abs/2505.24298
    """
    same_shape(logprobs=logprobs, prox_logprobs=prox_logprobs, old_logprobs=old_logprobs)
    floating(old_logprobs=old_logprobs)
    near = clipped_surrogate(
        logprobs, prox_logprobs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    return (prox_logprobs - old_logprobs).exp() * near


def penalised_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """PPO with a penalty in the place of the clip.

    Lₜ = −ρₜ Aₜ + β (ρₜ − 1 − log ρₜ),   E_old[ρ − 1 − log ρ] = KL(π_old ‖ π)

    `doubling_kl` is the paper's rule for β. The paper's KL is the exact one.

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and β ≥ 0.

    Schulman et al. 2017, eq. 8: https://arxiv.org/abs/1707.06347
    """
    non_negative(beta=beta)
    fits(logprobs, beta=beta)
    surrogate = clipped_surrogate(
        logprobs, old_logprobs, advantages, clip_low=torch.inf, clip_high=torch.inf
    )
    log_ratio = logprobs - old_logprobs
    return surrogate + beta * (log_ratio.exp() - 1 - log_ratio)


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
    per_token(logprobs, advantages)
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
