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
