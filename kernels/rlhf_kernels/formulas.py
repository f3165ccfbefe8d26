"""The quantities of the kernels in plain torch: what every other derivative is derived from."""

import torch
from torch import Tensor


def capped(x: Tensor, cap: float) -> Tensor:
    """z = x in float32 or wider, or c tanh(x/c) with a cap; −∞ stays −∞."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(x == -torch.inf, x, cap * torch.tanh(x / cap)) if cap else x


def tempered(x: Tensor, scale: Tensor | None, cap: float) -> Tensor:
    """z/τ; what is −∞ passes no gradient on."""
    banned = x == -torch.inf
    z = capped(torch.where(banned, 0.0, x), cap)
    return torch.where(banned, -torch.inf, z if scale is None else z * scale[..., None])


def slope(x: Tensor, scale: Tensor | None, cap: float) -> Tensor | float:
    """∂(z/τ)/∂x."""
    t = 1.0 if scale is None else scale[..., None]
    return t * (1 - torch.tanh(x / cap).square()) if cap else t


def logprobs(
    x: Tensor, y: Tensor, scale: Tensor | None, cap: float, entropy: bool, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """(log π(y), H), H = 0 unless asked for."""
    logq = tempered(x, scale, cap).log_softmax(-1)
    chosen = logq.gather(-1, y.long()[..., None]).squeeze(-1)
    return chosen, _entropy(logq) if entropy else torch.zeros_like(chosen)


def _entropy(logq: Tensor) -> Tensor:
    p = logq.exp()
    return -(p * torch.where(p > 0, logq, 0.0)).sum(-1)


def logprobs_gradient(
    x: Tensor, y: Tensor, scale: Tensor | None, cap: float, entropy: bool,
    h: Tensor, centre: Tensor, total: Tensor, rest: Tensor, g: Tensor, gh: Tensor,
) -> Tensor:  # fmt: skip
    """∂(g log π + gh H)/∂x, of x itself: the hints h, centre, total and rest are not read."""
    return _logprobs_gradient(x, y, scale, cap, entropy, g, gh).to(x.dtype)


def _logprobs_gradient(x, y, scale, cap, entropy, g, gh):
    logq = tempered(x, scale, cap).log_softmax(-1)
    p = logq.exp()
    dz = -g[..., None] * p
    if entropy:
        log_ratio = torch.where(p > 0, logq, 0.0) + _entropy(logq)[..., None]
        dz = dz - gh[..., None] * p * log_ratio
    dz = dz.scatter_add(-1, y.long()[..., None], g[..., None].to(dz.dtype))
    return dz * slope(x.to(dz.dtype), scale, cap)


def divergence(
    x: Tensor, q: Tensor, y: Tensor, scale: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log π(y), H, KL(π ‖ ρ)) for logits x of π and q of ρ."""
    logp, logq = (tempered(each, scale, cap).log_softmax(-1) for each in (x, q))
    p = logp.exp()
    kl = (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)
    return logp.gather(-1, y.long()[..., None]).squeeze(-1), _entropy(logp), kl


def divergence_gradient(x, q, y, scale, cap, h, kl, c, total, rest, cq, total_q, g, gh, gk):
    """∂(g log π + gh H + gk KL)/∂x; the hints h to total_q are not read."""
    logp, logq = (tempered(each, scale, cap).log_softmax(-1) for each in (x, q))
    p = logp.exp()
    ratio = torch.where(p > 0, logp - logq, 0.0)
    kl = (p * ratio).sum(-1, keepdim=True)
    dx = gk[..., None] * p * (ratio - kl) * slope(x.to(p.dtype), scale, cap)
    return (dx + _logprobs_gradient(x, y, scale, cap, True, g, gh)).to(x.dtype)


def reference_gradient(x, q, y, scale, cap, h, kl, c, total, rest, cq, total_q, g, gh, gk):
    """∂(gk KL)/∂q; the hints h to total_q are not read."""
    p, r = (tempered(each, scale, cap).softmax(-1) for each in (x, q))
    return (gk[..., None] * (r - p) * slope(q.to(r.dtype), scale, cap)).to(q.dtype)
