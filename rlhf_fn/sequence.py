"""What is said of a whole answer, and the policy losses that weigh it by one ratio.

Hidden tokens are never read and come back as 0, and so does a row without a kept token. The
log-ratios stand at every kept token, so that any surrogate takes them in the place of the tokens'
own: `clipped_surrogate(mean_log_ratio(π, π_old, mask), torch.zeros_like(π), A, ...)`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.policy import clipped_surrogate
from rlhf_fn.tree import like


def masked_sum(
    x: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """Σₜ mₜ xₜ; of log-probs, the log-probability of the whole answer.

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.
    """
    checks.same_shape(x=x, mask=mask)
    checks.floating(x=x)
    checks.bool_mask(mask)
    return torch.where(mask, x, 0.0).sum(-1)


def masked_mean(
    x: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """Σₜ mₜ xₜ / Σₜ mₜ; of log-probs, the answer's log-probability per token.

    Raises: as `masked_sum`.
    """
    return masked_sum(x, mask) / mask.sum(-1).clamp(min=1)


def masked_max(
    x: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """The largest kept x.

    Raises: as `masked_sum`.
    """
    checks.same_shape(x=x, mask=mask)
    checks.floating(x=x)
    checks.bool_mask(mask)
    return torch.where(mask.any(-1), torch.where(mask, x, -torch.inf).amax(-1), 0.0)


def perplexity(
    logprobs: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """exp(−(1/|y|) Σₜ mₜ log πₜ): as surprised as by this many equally likely tokens.

    Raises: as `masked_sum`.
    """
    return (-masked_mean(logprobs, mask)).exp()


def sum_log_ratio(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """The log-ratio of the whole answer, at each of its tokens: the ratio of RLOO and of TOPR.

    log w = Σₜ mₜ (log πₜ − log π_old,ₜ)

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.

    Ahmadian et al. 2024: https://arxiv.org/abs/2402.14740
    """
    total = masked_sum(_log_ratio(logprobs, old_logprobs, mask), mask)
    return torch.where(mask, total[..., None], 0.0)


def mean_log_ratio(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """The log-ratio of the answer per token, at each of its tokens: the geometric mean of theirs.

    log s = (1/|y|) Σₜ mₜ (log πₜ − log π_old,ₜ)

    Raises: as `sum_log_ratio`.

    Zheng et al. 2025, eq. 7: https://arxiv.org/abs/2507.18071
    """
    mean = masked_mean(_log_ratio(logprobs, old_logprobs, mask), mask)
    return torch.where(mask, mean[..., None], 0.0)


def gspo(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """`clipped_surrogate` of the answer's ratio per token, at each of its tokens.

    Lₜ = −min(s Aₜ, clip(s, 1 − ε_low, 1 + ε_high) Aₜ),   s = exp `mean_log_ratio`

    GSPO's objective with the weights `sequence_mean`, LUSPO's with `sequence_sum`. An answer of
    one token is PPO's.

    Raises: as `clipped_surrogate`; TypeError for a mask that is not bool.

    Zheng et al. 2025, eq. 5: https://arxiv.org/abs/2507.18071; LUSPO, 2026:
    https://arxiv.org/abs/2602.05261
    """
    log_ratio = mean_log_ratio(logprobs, old_logprobs, mask)
    return _clipped(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)


def gspo_token(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """`gspo` with the gradient of each token's own log-probability, for advantages that differ.

    Lₜ = −min(sₜ Aₜ, clip(sₜ, 1 − ε_low, 1 + ε_high) Aₜ),   sₜ = sg[s] πₜ / sg[πₜ]

    With one advantage per sequence and `sequence_mean` its value and gradient are those of `gspo`.

    Raises: as `gspo`.

    Zheng et al. 2025, eq. 13-14: https://arxiv.org/abs/2507.18071
    """
    mean = mean_log_ratio(logprobs, old_logprobs, mask).detach()
    kept = torch.where(mask, logprobs, 0.0)
    log_ratio = mean + (kept - kept.detach())
    return _clipped(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high)


def gmpo(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """The geometric mean of ratios that are clipped one by one, at each of the answer's tokens.

    Lₜ = −Aₜ exp((1/|y|) Σᵤ mᵤ cᵤ)
    c = min(log ρ, ε_high) where A > 0, max(log ρ, −ε_low) where A < 0

    ε in nats: the ratio's range is [e^−ε_low, e^ε_high]. ε = ∞ is `gspo` with ε = ∞.

    Raises: as `gspo`.

    Zhao et al. 2025: https://arxiv.org/abs/2507.20673
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    checks.per_token(logprobs, advantages)
    checks.width(clip_low=clip_low, clip_high=clip_high)
    checks.fits(logprobs, clip_low=clip_low, clip_high=clip_high)
    advantages = torch.where(mask, advantages, 0.0)
    low, high = log_ratio.clamp(min=-clip_low), log_ratio.clamp(max=clip_high)
    clipped = torch.where(advantages > 0, high, torch.where(advantages < 0, low, log_ratio))
    return -advantages * masked_mean(clipped, mask).exp()[..., None]


def vespo(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    k_positive: float | Tensor,
    lam_positive: float | Tensor,
    k_negative: float | Tensor,
    lam_negative: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """REINFORCE with a smooth weight of the answer's ratio, 1 at w = 1 and 0 at w = 0 and w = ∞.

    Lₜ = −sg[φ(w)] Aₜ log πₜ,   φ(w) = wᵏ e^(λ − λw),   w = exp `sum_log_ratio`
    k, λ = k₊, λ₊ where Aₜ ≥ 0, else k₋, λ₋

    Nothing is clamped; TRL clamps log w to [log 10⁻⁸, 20].

    Raises: as `gspo`; ValueError unless both k are ≥ 0 and both λ > 0.

    Shen et al. 2026: https://arxiv.org/abs/2602.10693
    """
    log_ratio = sum_log_ratio(logprobs, old_logprobs, mask).detach()
    checks.per_token(logprobs, advantages)
    powers = {"k_positive": k_positive, "k_negative": k_negative}
    rates = {"lam_positive": lam_positive, "lam_negative": lam_negative}
    checks.non_negative(**powers)
    checks.positive(**rates)
    checks.fits(logprobs, **powers, **rates)
    advantages = torch.where(mask, advantages, 0.0)
    good = advantages >= 0
    k = torch.where(good, like(log_ratio, k_positive), like(log_ratio, k_negative))
    lam = torch.where(good, like(log_ratio, lam_positive), like(log_ratio, lam_negative))
    weight = (k * log_ratio - lam * torch.expm1(log_ratio)).exp()
    return -weight * advantages * torch.where(mask, logprobs, 0.0)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    checks.floating(logprobs=logprobs, old_logprobs=old_logprobs)
    checks.bool_mask(mask)
    return torch.where(mask, logprobs - old_logprobs, 0.0)


def _clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, **clip: float | Tensor) -> Tensor:
    """`clipped_surrogate` of a log-ratio that stands at every kept token; 0 where hidden."""
    checks.per_token(log_ratio, advantages)
    advantages = torch.where(mask, advantages, 0.0)
    return clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, **clip)
