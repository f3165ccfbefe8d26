"""The same quantities in plain torch: what every derivative falls back on, and the path on a CPU.

Large inputs go through Inductor's C++, which fuses each of these into one pass over the logits;
small ones, and machines without a C++ compiler, through eager torch a few rows at a time, so that
what is between two operations stays in the cache.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LARGE = 2**18  # elements; below this compiling does not pay
CACHED = 2**18  # elements of the rows that eager torch takes at a time


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


# log π and H: the formula, and its gradient


def logprobs(
    x: Tensor, y: Tensor, scale: Tensor | None, cap: float, entropy: bool
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


# log π and H: the path on a CPU


def logprobs_forward(x, y, scale, cap, entropy):
    """(log π, H, centre, log Σ e^u, 1 − π) by the sums of `statistics.py`, around the maximum."""
    shape, x, y, scale = y.shape, x.flatten(0, -2), y.flatten().long(), _flat(scale)
    t = torch.ones(()) if scale is None else scale
    chosen = capped(x.gather(-1, y[:, None]), cap)[:, 0]
    centre, s, w = by_rows(_sums, x, y, scale, cap=cap)
    own = (chosen - centre) * t
    one = own.exp()
    total = s + one
    log_total = torch.where(centre == chosen, s.log1p(), total.log())
    entropies = log_total - (w + torch.where(one > 0, own * one, 0.0)) / total
    outputs = own - log_total, entropies, centre, log_total, s / total
    return tuple(each.reshape(shape).clone() for each in outputs)


def logprobs_backward(x, y, scale, cap, entropy, h, centre, total, rest, g, gh):
    """`logprobs_gradient`, of the hints."""
    flat = (each.flatten() for each in (h, centre, total, rest, g, gh))
    rows = x.flatten(0, -2), y.flatten(), _flat(scale), *flat
    return by_rows(_logprobs_backward, *rows, cap=cap)[0].view(x.shape)


def _centred(x, scale, centre, cap):
    u = capped(x, cap) - centre[:, None]
    return u if scale is None else u * scale[:, None]


def _sums(x, y, scale, cap):
    centre = capped(x, cap).amax(-1)
    u = _centred(x, scale, centre, cap)
    e = torch.where(_is(y, x), 0.0, u.exp())
    return centre, e.sum(-1), torch.where(e > 0, e * u, 0.0).sum(-1)


def _logprobs_backward(x, y, scale, h, centre, total, rest, g, gh, cap):
    return (_dx(x, y, scale, h, centre, total, rest, g, gh, cap).to(x.dtype),)


def _dx(x, y, scale, h, centre, total, rest, g, gh, cap):
    logp = _centred(x, scale, centre, cap) - total[:, None]
    p = logp.exp()
    dz = torch.where(_is(y, x), (g * rest)[:, None], -g[:, None] * p)
    dz = dz - torch.where(p > 0, gh[:, None] * p * (logp + h[:, None]), 0.0)
    return _read(dz * slope(x.to(dz.dtype), scale, cap), g, gh)


def _read(dx: Tensor, *upstream: Tensor) -> Tensor:
    """`dx`, and 0 in the rows that no upstream gradient asks for, whatever they hold."""
    return torch.where(torch.stack(upstream).any(0)[:, None], dx, 0.0)


# with the KL to a reference: the formula, its gradients, and the path on a CPU


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


def divergence_forward(x, q, y, scale, cap):
    """(log π, H, KL) and the hints: each row's centre and log Σ e^u, 1 − π, and those of ρ."""
    logp, h, c, total, rest = logprobs_forward(x, y, scale, cap, True)
    _, _, cq, total_q, _ = logprobs_forward(q, y, scale, cap, False)
    per_row = (each.flatten() for each in (c, total, cq, total_q))
    flat = x.flatten(0, -2), q.flatten(0, -2), _flat(scale), *per_row
    kl = by_rows(_kl, *flat, cap=cap)[0].view(y.shape)
    return logp, h, kl, c, total, rest, cq, total_q


def divergence_backward(x, q, y, scale, cap, *per_row):
    """`divergence_gradient`, of the hints."""
    flat = x.flatten(0, -2), q.flatten(0, -2), y.flatten(), _flat(scale)
    per_row = (each.flatten() for each in per_row)
    return by_rows(_divergence_backward, *flat, *per_row, cap=cap)[0].view(x.shape)


def reference_backward(x, q, y, scale, cap, h, kl, c, total, rest, cq, total_q, g, gh, gk):
    """`reference_gradient`, of the hints."""
    flat = x.flatten(0, -2), q.flatten(0, -2), _flat(scale)
    per_row = (each.flatten() for each in (c, total, cq, total_q, gk))
    return by_rows(_reference_backward, *flat, *per_row, cap=cap)[0].view(x.shape)


def _log_ratio(x, q, scale, c, total, cq, total_q, cap):
    logp = _centred(x, scale, c, cap) - total[:, None]
    logq = _centred(q, scale, cq, cap) - total_q[:, None]
    return logp, logp.exp(), logq


def _kl(x, q, scale, c, total, cq, total_q, cap):
    logp, p, logq = _log_ratio(x, q, scale, c, total, cq, total_q, cap)
    return (torch.where(p > 0, p * (logp - logq), 0.0).sum(-1),)


def _divergence_backward(x, q, y, scale, h, kl, c, total, rest, cq, total_q, g, gh, gk, cap):
    logp, p, logq = _log_ratio(x, q, scale, c, total, cq, total_q, cap)
    dz = torch.where(p > 0, gk[:, None] * p * (logp - logq - kl[:, None]), 0.0)
    dx = _read(dz * slope(x.to(dz.dtype), scale, cap), gk)
    return ((dx + _dx(x, y, scale, h, c, total, rest, g, gh, cap)).to(x.dtype),)


def _reference_backward(x, q, scale, c, total, cq, total_q, gk, cap):
    _, p, logq = _log_ratio(x, q, scale, c, total, cq, total_q, cap)
    dz = gk[:, None] * (logq.exp() - p) * slope(q.to(p.dtype), scale, cap)
    return (_read(dz, gk).to(q.dtype),)


def _is(y: Tensor, x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1], dtype=torch.float32) == y.float()[:, None]  # exact to 2²⁴


def _flat(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.flatten()


# how rows are run


def by_rows(
    function: Callable, x: Tensor, *others: Tensor | None, cap: float
) -> tuple[Tensor, ...]:
    """`function(x, *others, cap)` of rows, in C++ where that pays, else a few rows at a time."""
    if x.numel() >= LARGE and _compiles():
        return _compiled(function)(x, *others, cap)
    size = max(1, CACHED // x.shape[-1])
    parts = zip(*(_split(each, size, len(x)) for each in (x, *others)))
    outputs = [function(*part, cap) for part in parts] or [function(x, *others, cap)]
    return outputs[0] if len(outputs) == 1 else tuple(torch.cat(each) for each in zip(*outputs))


def _split(x: Tensor | None, size: int, rows: int):
    if x is None:
        return [None] * -(-rows // size)
    return [part.contiguous() for part in x.split(size)] if rows else []


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


@cache
def _compiles() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
