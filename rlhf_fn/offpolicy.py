"""Policy losses that weigh the score function, per token and unreduced.

ρₜ = exp(log πₜ − log π_old,ₜ), and at ρ = 1 each has the gradient of `policy_gradient`. Whole
answers are one token each: pass `masked_sum(logprobs, mask)[..., None]`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn.checks import fits, floating, non_negative, per_token, positive, same_shape, width
from rlhf_fn.tree import like


def cispo(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """REINFORCE with a clipped importance weight: no token loses its gradient to the clip.

    Lₜ = −sg[clip(ρₜ, 1 − ε_low, 1 + ε_high)] Aₜ log πₜ

    ε = ∞ is off-policy REINFORCE; ε_low = 1, ε_high = 0 truncates the weight to [0, 1]. TRL's
    bound is absolute, 1 + ε_high in one number.

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and both ε are ≥ 0.

    MiniMax 2025, eq. 4: https://arxiv.org/abs/2506.13585
    """
    _check(logprobs, old_logprobs, advantages)
    width(clip_low=clip_low, clip_high=clip_high)
    fits(logprobs, clip_low=clip_low, clip_high=clip_high)
    ratio = (logprobs - old_logprobs).exp()
    weight = ratio.clamp(min=1 - clip_low).clamp(max=1 + clip_high)
    return -weight.detach() * advantages * logprobs


def topr(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
) -> Float[Tensor, "*batch time"]:
    """Tapered off-policy REINFORCE: good samples count in full, bad ones as far as still likely.

    Lₜ = −Aₜ log πₜ where Aₜ ≥ 0, else −sg[min(ρₜ, 1)] Aₜ log πₜ

    The paper's ρ is that of the whole answer, ROLL's that of a token.

    Raises: ValueError unless the log-probs agree in shape and `advantages` are [*batch, time] or
    [*batch, 1].

    Le Roux et al. 2025: https://arxiv.org/abs/2503.14286
    """
    _check(logprobs, old_logprobs, advantages)
    taper = (logprobs - old_logprobs).clamp(max=0).exp().detach()
    return -torch.where(advantages < 0, taper, 1.0) * advantages * logprobs


def sapo(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    temperature_positive: float | Tensor,
    temperature_negative: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """A soft gate in the place of the clip: the gradient fades as the ratio leaves 1.

    Lₜ = −(4/τ) σ(τ (ρₜ − 1)) Aₜ,   τ = τ₊ where Aₜ > 0, else τ₋

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and both τ are > 0.

    Gao et al. 2025: https://arxiv.org/abs/2511.20347
    """
    _check(logprobs, old_logprobs, advantages)
    positive(temperature_positive=temperature_positive, temperature_negative=temperature_negative)
    fits(
        logprobs,
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
    )
    high, low = like(logprobs, temperature_positive), like(logprobs, temperature_negative)
    tau = torch.where(advantages > 0, high, low)
    gate = torch.sigmoid(tau * torch.expm1(logprobs - old_logprobs))
    return -4 / tau * gate * advantages


def dro(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch #time"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """Direct reward optimisation, and Kimi k1.5's mirror descent: a squared log-ratio holds π back.

    Lₜ = −Aₜ log πₜ + ½ β (log πₜ − log π_old,ₜ)²

    Its gradient is that of (Aₜ − β log ρₜ)²/2β. Both papers mean whole answers; π_old is what the
    penalty pulls to: the reference in DRO, the last iterate in Kimi.

    Raises: ValueError unless the log-probs agree in shape, `advantages` are [*batch, time] or
    [*batch, 1] and β ≥ 0.

    Richemond et al. 2024: https://arxiv.org/abs/2405.19107; Kimi Team 2025:
    https://arxiv.org/abs/2501.12599
    """
    _check(logprobs, old_logprobs, advantages)
    non_negative(beta=beta)
    fits(logprobs, beta=beta)
    return -advantages * logprobs + beta / 2 * (logprobs - old_logprobs).square()


def _check(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> None:
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    floating(old_logprobs=old_logprobs)
    per_token(logprobs, advantages)
