"""The path of the kernels on a CPU.

Large inputs go through Inductor's C++, which fuses each of these into one pass over the logits;
small ones, and machines without a C++ compiler, through eager torch a few rows at a time, so that
what is between two operations stays in the cache.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from rlhf_kernels.formulas import capped, slope

LARGE = 2**18  # elements; below this compiling does not pay
CACHED = 2**18  # elements of the rows that eager torch takes at a time
OVERWRITTEN = 2**22  # elements that are written over at a time


# log π and H


def logprobs_forward(x, y, scale, cap, entropy, inplace=False):
    """(log π, H, centre, log Σ e^u, 1 − π) by the sums of `statistics.py`."""
    if _apart(x):
        each = (logprobs_forward(*entry) for entry in _entries(x, y, scale, cap, entropy))
        return tuple(map(torch.stack, zip(*each)))
    shape, x, y, scale = y.shape, x.reshape(-1, x.shape[-1]), y.flatten().long(), _flat(scale)
    chosen = _chosen(x, y, cap)
    if entropy:
        centre, total, others, w = by_rows(_moments, x, scale, cap=cap)
    else:
        centre, total, others = _around(_sums, (x,), (chosen,), scale, cap, far=64)
    own, log_total, rest = _finished(chosen, centre, total, others, scale)
    h = log_total - w / total if entropy else torch.zeros_like(own)
    return tuple(each.reshape(shape) for each in (own - log_total, h, centre, log_total, rest))


def logprobs_overwrite(x, y, scale, cap, entropy, *per_row):
    """`logprobs_backward`, which takes the place of x, a few rows at a time."""
    tensors = (x, y, scale, *per_row)
    if x.numel() <= OVERWRITTEN or x.ndim == 1:
        return x.copy_(logprobs_backward(x, y, scale, cap, entropy, *per_row))
    if len(x) == 1:
        parts = [[each if each is None else each[0] for each in tensors]]
    else:
        size = max(1, OVERWRITTEN // x[0].numel())
        parts = zip(*(_split(each, size, len(x)) for each in tensors))
    for part, y, scale, *rest in parts:
        logprobs_overwrite(part, y, scale, cap, entropy, *rest)
    return x


def logprobs_backward(x, y, scale, cap, entropy, *hints, dx=None):
    """`logprobs_gradient`, of the hints."""
    dx = x.new_empty(x.shape) if dx is None else dx
    if _apart(x):
        for part, entry in zip(dx, _entries(x, y, scale, cap, entropy, *hints)):
            logprobs_backward(*entry, dx=part)
        return dx
    h, centre, total, rest, g, gh = hints
    h, centre, total, rest, g, gh = (each.flatten() for each in (h, centre, total, rest, g, gh))
    h, gh = (h, gh) if entropy else (None, None)
    logits, y = x.reshape(-1, x.shape[-1]), y.flatten().long()[:, None]
    per_row = _flat(scale), centre, total, h
    own = _dz(logits.gather(-1, y), *per_row, torch.zeros_like(g), gh, cap)
    own = own + _own_dz(logits.gather(-1, y), _flat(scale), g, rest, cap)
    flat = dx.view(logits.shape)
    by_rows(_write_dx, logits, *per_row, g, gh, flat, cap=cap)
    _put(flat, y, own)
    return dx


def _chosen(x, y, cap):
    """z_y, in the dtype of the sums."""
    return capped(x.gather(-1, y[:, None]), cap)[:, 0]


def _around(function, logits, chosen, scale, cap, *, far):
    """The sums around what was chosen or, where |log Σ e^u| > far, around the maxima.

    Σ e^u overflows there, or comes to nothing, or its logarithm is all of the KL's digits.
    """
    outputs = by_rows(function, *logits, scale, *chosen, cap=cap)
    astray = ~(outputs[1].log().abs() < far)
    for rows in astray.nonzero()[:, 0].split(max(1, CACHED // logits[0].shape[-1])):
        part = [x[rows] for x in logits]
        tops = [capped(x, cap).amax(-1) for x in part]
        again = function(*part, None if scale is None else scale[rows], *tops, cap)
        for whole, some in zip(outputs, again):
            whole[rows] = some
    return outputs


def _finished(chosen, centre, total, others, scale):
    """(u_y, log Σ e^u, 1 − π); `others` keep the digits of 1 − π where π → 1."""
    own = (chosen - centre) if scale is None else (chosen - centre) * scale
    one = own.exp()
    rest = others + ((total - others).round() - one)
    log_total = torch.where(centre == chosen, rest.log1p(), total.log())
    return own, log_total, rest / (rest + one)


def centred(x, scale, centre, cap):
    """u."""
    u = capped(x, cap) - centre[:, None]
    return u if scale is None else u * scale[:, None]


def _sums(x, scale, chosen, cap):
    """(centre, Σ e^u, the same without the terms that are 1)."""
    centre = chosen.clamp(min=-1e38)
    u = centred(x, scale, centre, cap)
    e = u.exp()
    return centre, e.sum(-1), torch.where(u == 0, 0.0, e).sum(-1)


def _moments(x, scale, cap):
    """`_sums` around the maximum, and Σ u e^u, which keeps the digits of H there alone."""
    centre = capped(x, cap).amax(-1)
    u = centred(x, scale, centre, cap)
    e = u.exp()
    moment = e * u.clamp(min=-1e4)  # e is 0 long before, and 0 · −∞ is no number
    return centre, e.sum(-1), torch.where(u == 0, 0.0, e).sum(-1), moment.sum(-1)


def _write_dx(x, scale, centre, total, h, g, gh, dx, cap):
    dx.copy_(_dz(x, scale, centre, total, h, g, gh, cap))
    return ()


def _dz(x, scale, centre, total, h, g, gh, cap):
    """The gradient, as if no token were chosen; h and gh are None where H is not asked for."""
    logp = centred(x, scale, centre, cap) - total[:, None]
    p = logp.exp()
    dz = -g[:, None] * p
    if gh is not None:
        dz = dz - torch.where(p > 0, gh[:, None] * p * (logp + h[:, None]), 0.0)
    return _read(dz * slope(x.to(dz.dtype), scale, cap), g, gh)


def _own_dz(x, scale, g, rest, cap):
    """What the chosen token has in place of −g π: g (1 − π)."""
    return _read((g * rest)[:, None] * slope(x.to(g.dtype), scale, cap), g)


def _put(dx, y, own):
    """dx[i, yᵢ] = ownᵢ; of half precision, `scatter_` would convert all of dx and back."""
    return dx.index_put_((torch.arange(len(y)), y[:, 0]), own[:, 0].to(dx.dtype))


def _read(dx: Tensor, *upstream: Tensor | None) -> Tensor:
    """`dx`, and 0 in the rows that no upstream gradient asks for, whatever they hold."""
    asked = torch.stack([each for each in upstream if each is not None]).any(0)
    return torch.where(asked[:, None], dx, 0.0)


# with the KL to a reference


def divergence_forward(x, q, y, scale, cap):
    """(log π, H, KL) and the hints: each row's centre and log Σ e^u, 1 − π, and those of ρ."""
    if _apart(x) or _apart(q):
        each = (divergence_forward(*entry) for entry in _entries(x, q, y, scale, cap))
        return tuple(map(torch.stack, zip(*each)))
    shape, y, scale = y.shape, y.flatten().long(), _flat(scale)
    logits = x.reshape(-1, x.shape[-1]), q.reshape(-1, q.shape[-1])
    chosen = [_chosen(each, y, cap) for each in logits]
    sums = _around(_divergences, logits, chosen, scale, cap, far=16)
    cq, total_q, others_q, c, total, others, w, d = sums
    own, log_total, rest = _finished(chosen[0], c, total, others, scale)
    _, log_q, _ = _finished(chosen[1], cq, total_q, others_q, scale)
    h, kl = log_total - w / total, d / total - (log_total - log_q)
    outputs = own - log_total, h, kl, c, log_total, rest, cq, log_q
    return tuple(each.reshape(shape) for each in outputs)


def divergence_backward(x, q, y, scale, cap, *per_row, dx=None):
    """`divergence_gradient`, of the hints."""
    dx = x.new_empty(x.shape) if dx is None else dx
    if _apart(x) or _apart(q):
        for part, entry in zip(dx, _entries(x, q, y, scale, cap, *per_row)):
            divergence_backward(*entry, dx=part)
        return dx
    h, kl, c, total, rest, cq, total_q, g, gh, gk = (each.flatten() for each in per_row)
    scale, y = _flat(scale), y.flatten().long()[:, None]
    logits = x.reshape(-1, x.shape[-1]), q.reshape(-1, q.shape[-1])
    per_row = scale, c, total, cq, total_q, h, kl
    at = [each.gather(-1, y) for each in logits]
    own = _divergence_dz(*at, *per_row, torch.zeros_like(g), gh, gk, cap)
    own = own + _own_dz(at[0], scale, g, rest, cap)
    flat = dx.view(logits[0].shape)
    by_rows(_write_divergence_dx, *logits, *per_row, g, gh, gk, flat, cap=cap)
    _put(flat, y, own)
    return dx


def reference_backward(x, q, y, scale, cap, *per_row, dq=None):
    """`reference_gradient`, of the hints."""
    dq = q.new_empty(q.shape) if dq is None else dq
    if _apart(x) or _apart(q):
        for part, entry in zip(dq, _entries(x, q, y, scale, cap, *per_row)):
            reference_backward(*entry, dq=part)
        return dq
    _, _, c, total, _, cq, total_q, _, _, gk = (each.flatten() for each in per_row)
    flat = (each.reshape(-1, q.shape[-1]) for each in (x, q))
    per_row = _flat(scale), c, total, cq, total_q, gk
    by_rows(_write_dq, *flat, *per_row, dq.view(-1, q.shape[-1]), cap=cap)
    return dq


def _divergences(x, q, scale, chosen, chosen_q, cap):
    """`_sums` of q, `_moments` of x, and Σ e^u (u − o) around centres where u_y − o_y = 0."""
    p = _moments(x, scale, cap)
    centre = torch.where(p[0] == chosen, chosen_q, p[0] + (chosen_q - chosen))
    r = _sums(q, scale, centre, cap)
    u, o = centred(x, scale, p[0], cap), centred(q, scale, r[0], cap)
    e = u.exp()
    return *r, *p, torch.where(e > 0, e * (u - o), 0.0).sum(-1)


def _write_divergence_dx(x, q, scale, c, total, cq, total_q, h, kl, g, gh, gk, dx, cap):
    dx.copy_(_divergence_dz(x, q, scale, c, total, cq, total_q, h, kl, g, gh, gk, cap))
    return ()


def _divergence_dz(x, q, scale, c, total, cq, total_q, h, kl, g, gh, gk, cap):
    p, log_ratio = ratio(x, q, scale, c, total, cq, total_q, cap)
    dz = torch.where(p > 0, gk[:, None] * p * (log_ratio - kl[:, None]), 0.0)
    dz = _read(dz * slope(x.to(dz.dtype), scale, cap), gk)
    return dz + _dz(x, scale, c, total, h, g, gh, cap)


def ratio(x, q, scale, c, total, cq, total_q, cap):
    """(p, log p − log q), the latter rounded as the KL is, so that they cancel where p → 1."""
    u, o = centred(x, scale, c, cap), centred(q, scale, cq, cap)
    return (u - total[:, None]).exp(), (u - o) - (total - total_q)[:, None]


def _write_dq(x, q, scale, c, total, cq, total_q, gk, dq, cap):
    p = (centred(x, scale, c, cap) - total[:, None]).exp()
    r = (centred(q, scale, cq, cap) - total_q[:, None]).exp()
    dz = gk[:, None] * (r - p) * slope(q.to(r.dtype), scale, cap)
    dq.copy_(_read(dz, gk))
    return ()


def _flat(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.flatten()


# how rows are run


def _apart(x: Tensor) -> bool:
    """Whether rows would be copied to lie together, as of x[:, :-1], and entries are large."""
    strides = (x.stride(i) != x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    return len(x) > 0 and x[0].numel() >= LARGE and any(strides)


def _entries(*args):
    """The arguments of each entry of the first axis."""
    return zip(*(x if isinstance(x, Tensor) else repeat(x) for x in args))


def by_rows(
    function: Callable, x: Tensor, *others: Tensor | None, cap: float, into: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """`function(x, *others, *into, cap)` of rows, in C++ where that pays, else a few at a time."""
    if x.numel() >= LARGE and _compiles():
        return _compiled(function)(x, *others, *into, cap)
    size, given = max(1, CACHED // x.shape[-1]), (x, *others, *into)
    parts = zip(*(_split(each, size, len(x)) for each in given))
    read = 1 + len(others)  # in one layout: all layouts give the same bits
    outputs = [function(*map(_whole, part[:read]), *part[read:], cap) for part in parts]
    return outputs[0] if len(outputs) == 1 else tuple(torch.cat(each) for each in zip(*outputs))


def _split(x: Tensor | None, size: int, rows: int) -> Sequence[Tensor | None]:
    return [None] * max(1, -(-rows // size)) if x is None else x.split(size)


def _whole(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


@cache
def _compiles() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
