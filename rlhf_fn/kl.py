"""Estimates of KL(π ‖ π_ref) from the log-probs of sampled tokens, and what steers them.

k1, k2 and k3 are three functions of x = log π(y) − log π_ref(y) at a token y drawn from π. Their
values are means to one end, the KL; as losses, differentiated through log π at tokens that are
held fixed, they do three different things, which each docstring says. Half precision is computed
and returned in float32.

Schulman 2020: http://joschu.net/blog/kl-approx.html; Tang and Munos 2025 on the gradients:
https://arxiv.org/abs/2506.09477
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn.checks import fits, floating, positive, same_shape, unit_interval


def k1(
    logprobs: Float[Tensor, "*batch time"], ref_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The unbiased, high-variance estimate; may be negative. In nats.

    k1 = x,   x = log π − log π_ref,   E[k1] = KL(π ‖ π_ref)

    Belongs in the reward. As a loss it does nothing on average: ∇k1 = ∇log π and E[∇log π] = 0.

    Raises: ValueError unless the shapes agree.

    Schulman 2020: http://joschu.net/blog/kl-approx.html
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return _wide(logprobs) - _wide(ref_logprobs)


def k2(
    logprobs: Float[Tensor, "*batch time"], ref_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The biased estimate with the right gradient; never negative. In nats.

    k2 = ½ x²,   x = log π − log π_ref

    Belongs in the loss: ∇k2 = x ∇log π and E[x ∇log π] = ∇KL(π ‖ π_ref), on tokens drawn from π.

    Raises: ValueError unless the shapes agree.

    Schulman 2020: http://joschu.net/blog/kl-approx.html
    """
    return k1(logprobs, ref_logprobs).square() / 2


def k3(
    logprobs: Float[Tensor, "*batch time"], ref_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The unbiased, low-variance estimate; never negative. In nats.

    k3 = e⁻ˣ − 1 + x,   x = log π − log π_ref,   E[k3] = KL(π ‖ π_ref)

    Belongs in the metrics. As a loss (GRPO's) it descends another divergence: E[∇k3] =
    E[(1 − e⁻ˣ) ∇log π] = ∇KL(π_ref ‖ π), the forward KL's gradient.

    Nothing is clamped: it overflows where π_ref/π does.

    Raises: ValueError unless the shapes agree.

    Schulman 2020: http://joschu.net/blog/kl-approx.html
    """
    x = k1(logprobs, ref_logprobs)
    near = x.abs() < 1e-2  # there the terms cancel; Taylor is exact to rounding, and ≥ 0
    s = torch.where(near, x, 0.0)
    taylor = s * s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6 * (1 - s / 7)))))
    return torch.where(near, taylor, torch.expm1(-x) + x)


def binary_tv(
    logprobs: Float[Tensor, "*batch time"], old_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The total variation between "this token" and "another one" under two policies.

    Dₜ = |πₜ − π_old,ₜ|, at most the total variation over the vocabulary

    Raises: ValueError unless the shapes agree.

    Qi et al. 2026: https://arxiv.org/abs/2602.04879
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    floating(logprobs=logprobs, old_logprobs=old_logprobs)
    return (logprobs.exp() - old_logprobs.exp()).abs()


def binary_kl(
    logprobs: Float[Tensor, "*batch time"], old_logprobs: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The KL divergence between "this token" and "another one" under two policies, in nats.

    Dₜ = μ log(μ/π) + (1 − μ) log((1 − μ)/(1 − π)),   μ = π_old,ₜ, at most KL(π_old ‖ π)

    Infinite where π = 1 and μ < 1. float32 from half precision.

    Raises: ValueError unless the shapes agree.

    Qi et al. 2026: https://arxiv.org/abs/2602.04879
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    floating(logprobs=logprobs, old_logprobs=old_logprobs)
    new, old = _wide(logprobs), _wide(old_logprobs)
    certain = old == 0
    rest = torch.where(certain, 0.0, log1mexp(torch.where(certain, -1.0, old)) - log1mexp(new))
    return old.exp() * (old - new) - torch.expm1(old) * rest


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − eˣ) for x ≤ 0, to the last digit near 0 and far from it; −∞ at 0.

    Mächler 2012: https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    floating(x=x)
    near = x > -0.6931471805599453  # log ½
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, close, torch.log1p(-torch.where(near, -1.0, x).exp()))


def fixed_kl(
    coef: float | Tensor, kl: float | Tensor, *, tokens: int | float | Tensor
) -> float | Tensor:
    """The KL coefficient that nothing changes: β ← β. For where `adaptive_kl` could stand."""
    return coef


def adaptive_kl(
    coef: float | Tensor,
    kl: float | Tensor,
    *,
    target: float | Tensor,
    horizon: float | Tensor,
    tokens: int | float | Tensor,
) -> Tensor:
    """The next KL coefficient of a proportional controller in log space; its state is β alone.

    β ← β (1 + clip(KL/KL_target − 1, −0.2, 0.2) · n/horizon),   n = tokens

    Args:
        coef: β, ≥ 0.
        kl: measured on the last batch, in the unit of `target` (nats, per token or per sequence).
        horizon: in the unit of `tokens`: how much data it takes to move β by the clipped error.
        tokens: how much data was seen since the last update.

    Raises: ValueError unless target and horizon are > 0.

    Ziegler et al. 2019, §2.2: https://arxiv.org/abs/1909.08593
    """
    positive(target=target, horizon=horizon)
    error = torch.as_tensor(kl / target - 1).clamp(-0.2, 0.2)
    return coef * (1 + error * tokens / horizon)


def doubling_kl(
    coef: float | Tensor,
    kl: float | Tensor,
    *,
    target: float | Tensor,
    tokens: int | float | Tensor,
) -> Tensor:
    """The next KL coefficient by the rule of PPO's penalty: double or halve outside of a band.

    β ← 2β where KL > 1.5 KL_target, β/2 where KL < KL_target/1.5, else β

    `tokens` is not read: it is for where `adaptive_kl` could stand.

    Raises: ValueError unless the target is > 0.

    Schulman et al. 2017, §4: https://arxiv.org/abs/1707.06347
    """
    positive(target=target)
    error = torch.as_tensor(kl / target)
    factor = torch.where(error > 1.5, 2.0, torch.where(error < 1 / 1.5, 0.5, 1.0))
    return coef * factor.to(error.dtype)


def straight_through(
    value: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The value of one function with the gradient of another.

    sg[value] + (gradient − sg[gradient])

    `straight_through(k3(π, π_ref), k2(π, π_ref))` reports the low-variance estimate and descends
    the reverse KL (verl's `low_var_kl+`). A clamp of the value then takes no gradient away.

    Raises: ValueError unless the shapes agree.
    """
    same_shape(value=value, gradient=gradient)
    floating(value=value, gradient=gradient)
    return value.detach() + (gradient - gradient.detach())


def off_policy_kl(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """The unbiased estimate from tokens of an older policy, with the right gradient. In nats.

    ρ k3(π, π_ref),   ρ = π/π_old,   E_old = KL(π ‖ π_ref) and so is its gradient

    With π_old = π, held fixed, the value is k3 and the gradient, unlike k3's, the reverse KL's.

    Raises: ValueError unless the shapes agree.

    DeepSeek-AI 2025, §3.1: https://arxiv.org/abs/2512.02556
    """
    return k1(logprobs, old_logprobs).exp() * k3(logprobs, ref_logprobs)


def mixture_logprobs(
    logprobs_a: Float[Tensor, "*shape"],
    logprobs_b: Float[Tensor, "*shape"],
    *,
    weight: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """The log-probs of a mixture of two policies, as a reference for example.

    log((1 − w) π_a + w π_b)

    At chosen tokens or over the whole vocabulary. w = 0 is a, w = 1 is b; a tensor w has its
    gradient between them.

    Raises: ValueError unless the shapes agree and 0 ≤ w ≤ 1.
    """
    same_shape(logprobs_a=logprobs_a, logprobs_b=logprobs_b)
    floating(logprobs_a=logprobs_a, logprobs_b=logprobs_b)
    fits(logprobs_a, weight=weight)
    unit_interval(weight=weight)
    a, b = _wide(logprobs_a), _wide(logprobs_b)
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    return torch.logaddexp(torch.log1p(-w) + a, w.log() + b)


def geometric_mixture_logprobs(
    logprobs_a: Float[Tensor, "*batch vocab"],
    logprobs_b: Float[Tensor, "*batch vocab"],
    *,
    weight: float | Tensor,
) -> Float[Tensor, "*batch vocab"]:
    """The log-probs of the normalised geometric mixture of two policies, over the vocabulary.

    log π = (1 − w) log π_a + w log π_b − log Z,   from log-probs or logits of a and b

    Raises: ValueError unless the shapes agree.

    Munos et al. 2023 (Nash-MD): https://arxiv.org/abs/2312.00886
    """
    same_shape(logprobs_a=logprobs_a, logprobs_b=logprobs_b)
    floating(logprobs_a=logprobs_a, logprobs_b=logprobs_b)
    fits(logprobs_a, weight=weight)
    return ((1 - weight) * _wide(logprobs_a) + weight * _wide(logprobs_b)).log_softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
