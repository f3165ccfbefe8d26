"""The projection's quantities in plain torch: what derivatives fall back on, and the path on a CPU.

On a CPU everything is float32 or wider, a part of W being widened at a time: that does not round
the logits, and without units for bfloat16 it is faster than a product of it
(`kernels/benchmarks/linear.py --dtype bf16` has both). With such units gradients are products of
e^u as it is kept, each a sum in float32 that is rounded once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf_kernels import cpu, formulas, rows
from rlhf_kernels import linear_tiles as tiles

ELEMENTS = 2**20  # of logits at a time: a few megabytes, which stay in the cache
MARGIN = 11.0  # nats by which logits may be above the centre of what is kept, which must move too
CLOSE = 2.0  # the same where H is asked for, whose digits are lost far from the maximum


# the formula, and its gradient


def statistics(
    h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, scale: Tensor | None, cap: float, full: bool,
    keep: bool, memory: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log π, H, z_y/τ, 1 if z_y ≥ max z): the two in the middle if `full`, the last if not."""
    x = projected(h, w, b)
    logp, entropy = formulas.logprobs(x, y, scale, cap, full)
    z = formulas.tempered(x, scale, cap)
    logit = z.gather(-1, y.long()[..., None]).squeeze(-1)
    none = torch.zeros_like(logit)
    if full:
        return logp, entropy, logit, none
    return logp, entropy, none, ((logit >= z.amax(-1)) & ~logp.isnan()).to(logp.dtype)


def projected(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x = h Wᵀ + b in float32 or wider."""
    wide = rows.accumulator(h)
    x = h.to(wide) @ w.to(wide).mT
    return x if b is None else x + b.to(wide)[..., None, :]


def gradient(h, w, b, y, scale, cap, full, keep, memory, *others):
    """The gradients in h, W and b, those wanted; the hints among the arguments are not read."""
    *_, g, gh, gz, of_h, of_w, of_b = others
    x = projected(h, w, b)
    dx = formulas.logprobs_gradient(x, y, scale, cap, full, None, None, None, None, g, gh)
    if full:
        dx = dx + gz[..., None] * formulas.slope(x, scale, cap) * _one_hot(y, x)
    return through(dx, h, w, b, (of_h, of_w, of_b))


def through(
    dx: Tensor, h: Tensor, w: Tensor, b: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of x = h Wᵀ + b in h, W and b, those wanted, from that in x; else empty."""
    none = h.new_empty(*h.shape[:-2], 0)
    return (
        (dx @ w.to(dx.dtype)).to(h.dtype) if wanted[0] else none,
        (dx.mT @ h.to(dx.dtype)).to(w.dtype) if wanted[1] else none,
        none if b is None or not wanted[2] else dx.sum(-2).to(b.dtype),
    )


def _one_hot(y: Tensor, x: Tensor) -> Tensor:
    return y[..., None] == torch.arange(x.shape[-1], device=x.device)


# the path on a CPU


def kept_shape(number: int, vocab: int, keep: bool) -> tuple[int, int]:
    """Of what is kept: rows that begin at a multiple of 16 bytes."""
    return (number, -(-vocab // 16) * 16) if keep else (0, 0)


def forward(h, w, b, y, scale, cap, full, keep, memory):
    """(log π, H, z_y/τ, z_y ≥ max z), the row's c, log Σ e^u and 1 − π, and e^u if it is kept."""
    kept = h.new_empty(kept_shape(len(h), len(w), keep))
    wide, y = h.to(rows.accumulator(h)), y.long()
    chosen = formulas.capped(_chosen(wide, w, b, y), cap)
    t = torch.ones((), dtype=wide.dtype) if scale is None else scale
    c, none = chosen.clamp(min=-1e38), torch.zeros_like(chosen)
    sums, centres = (c, none, *([none] if full else [c] * keep)), []  # and Σ u e^u or max z
    for at in chunks(h, w, memory):
        x = logits(wide, w, b, at)
        put(x, y, at, -torch.inf)
        into = [kept[:, at]] if keep else []
        sums = cpu.by_rows(_MORE[full, keep], x, scale, *sums, cap=cap, into=into)
        if keep:
            centres.append((at, sums[0]))
    c, s, *last = sums
    m, top = (last[0], c) if full else (none, last[0] if keep else c)
    own = (chosen - c) * t
    one = own.exp()
    total = s + one
    log_total = torch.where(c == chosen, s.log1p(), total.log())
    if keep:
        for at, before in centres:
            moved = (before != c).nonzero()[:, 0]
            kept[moved, at] *= ((before - c) * t).exp()[moved, None]
        put(kept, y, slice(0, len(w)), -s.nan_to_num(0, 0))
        kept[:, len(w) :] = 0
    entropy = log_total - (m + torch.where(one > 0, own * one, 0.0)) / total
    logp = own - log_total
    hits = (chosen == top) & ~logp.isnan() & (not full)
    return logp, entropy, chosen * t, hits.to(logp.dtype), c, log_total, s / total, kept


def backward(h, w, b, y, scale, cap, full, keep, memory, *others):
    """The gradients in h, W and b, those wanted, of the rows that have an upstream gradient."""
    logp, entropy, c, total, rest, kept, g, gh, gz, *wanted = others
    of_others = (gh != 0) | (gz != 0)
    full = full and bool(of_others.any())
    read = (g != 0) | of_others if full else g != 0
    some = slice(None) if read.all() else read
    wide, y = h.to(rows.accumulator(h))[some], y.long()[some]
    scale = None if scale is None else scale[some]
    per_row = (x[some] for x in (logp, entropy, c, total, rest, g, gh, gz))
    logp, entropy, c, total, rest, g, gh, gz = per_row
    units = keep and not full and not wanted[2] and rows.has_units(h)
    if keep:
        dtype = kept.dtype if units else wide.dtype
        parts = ((at, kept[some, at].to(dtype)) for at in chunks(h, w, memory))
    else:
        parts = ((at, logits(wide, w, b, at)) for at in chunks(h, w, memory))
    if keep and not full:
        factor = -g * (-total).exp() * (1.0 if scale is None else scale)
        if units:
            dh = (kept[:, : len(w)] @ w)[some] * factor[:, None] if wanted[0] else h.new_empty(0)
            of_w = False, wanted[1], False
            _, *others = tiles.gradients(h[some], w, b, parts, of_w, factor)
        else:
            dh, *others = tiles.gradients(wide, w, b, parts, wanted, factor)
    else:
        sums = scale, c, total, *((entropy, g, gh) if full else (None, g, None))
        own = g * rest
        if full:
            own = own + gz - gh * logp.exp() * (logp.clamp(min=-1e4) + entropy)
        parts = _parts(parts, _dx_of_kept if keep else _dx, y, cap, sums, own)
        dh, *others = tiles.gradients(wide, w, b, parts, wanted)
    if wanted[0]:
        dh = torch.zeros_like(h).index_put_((read,), dh.to(h.dtype))
    return dh, *others


def _parts(parts, function, y, cap, sums, own):
    """(where, the gradient in x there), of parts (where, x or what is kept there)."""
    for at, x in parts:
        (dx,) = cpu.by_rows(function, x, *sums, cap=cap)
        mine = x.gather(-1, (y - at.start).clamp(0, x.shape[-1] - 1)[:, None])
        put(dx, y, at, (own[:, None] * formulas.slope(mine, sums[0], cap))[:, 0])
        yield at, dx


def _chosen(h, w, b, y):
    size = max(1, ELEMENTS // max(h.shape[-1], 1))
    parts = [(a * w[i].to(a.dtype)).sum(-1) for a, i in zip(h.split(size), y.split(size))]
    x = torch.cat(parts) if parts else h[:, 0]
    return x if b is None else x + b[y].to(x.dtype)


def logits(h: Tensor, w: Tensor, b: Tensor | None, at: slice) -> Tensor:
    """x of a part of the vocabulary."""
    return linear(h, w[at].to(h.dtype), None if b is None else b[at].to(h.dtype))


def chunks(h: Tensor, w: Tensor, memory: int) -> Iterator[slice]:
    """Of a few megabytes: logits, what is made of them, a part of W; and within the `memory`."""
    number = max(*h.shape, 1)
    fitting = memory // (3 * rows.accumulator(h).itemsize * number)
    return tiles.chunks(len(w), max(min(ELEMENTS // number, fitting), tiles.LEAST))


def put(x: Tensor, y: Tensor, at: slice, value: Tensor | float) -> None:
    """x[i, y_i] = value_i, for tokens of this part of the vocabulary."""
    inside = ((y >= at.start) & (y < at.stop)).nonzero()[:, 0]
    value = value[inside].to(x.dtype) if isinstance(value, Tensor) else value
    x[inside, y[inside] - at.start] = value


# a part of the vocabulary more, of some rows


def _recentred(x, scale, c, margin, cap):
    z = formulas.capped(x, cap)
    t = 1.0 if scale is None else scale
    top = z.amax(-1)
    higher = torch.where((top - c) * t > margin, top, c)
    step, u = (c - higher) * t, z - higher[:, None]
    return top, higher, step, u if scale is None else u * scale[:, None]


def _sums(x, scale, c, s, cap):
    _, c, step, u = _recentred(x, scale, c, 0.0, cap)
    return c, s * step.exp() + u.exp().sum(-1)


def _moments(x, scale, c, s, m, cap):
    _, c, step, u = _recentred(x, scale, c, 0.0, cap)
    e = u.exp()
    return c, s * step.exp() + e.sum(-1), _moment(s, m, step, u, e)


def _kept(x, scale, c, s, top, into, cap):
    higher, c, step, u = _recentred(x, scale, c, MARGIN, cap)
    e = u.exp()
    into.copy_(_finite(e))
    return c, s * step.exp() + e.sum(-1), top.maximum(higher)


def _kept_moments(x, scale, c, s, m, into, cap):
    _, c, step, u = _recentred(x, scale, c, CLOSE, cap)
    e = u.exp()
    into.copy_(_finite(e))
    return c, s * step.exp() + e.sum(-1), _moment(s, m, step, u, e)


_MORE = {  # full, keep
    (False, False): _sums, (True, False): _moments,
    (False, True): _kept, (True, True): _kept_moments,
}  # fmt: skip


def _moment(s, m, step, u, e):
    before = torch.where(s > 0, (m + step * s) * step.exp(), 0.0)
    return before + (e * u.clamp(min=-1e4)).sum(-1)


def _finite(e):
    return torch.where(e < torch.inf, e, 0.0)


def _dx(x, scale, c, total, entropy, g, gh, cap):
    u = formulas.capped(x, cap) - c[:, None]
    logp = (u if scale is None else u * scale[:, None]) - total[:, None]
    return (_dz(logp, entropy, g, gh) * formulas.slope(x, scale, cap),)


def _dx_of_kept(e, scale, c, total, entropy, g, gh, cap):
    logp = e.clamp(min=0.0).log() - total[:, None]  # the token's own is not e^u
    return (_dz(logp, entropy, g, gh) * formulas.slope(e, scale, cap),)


def _dz(logp, entropy, g, gh):
    p = logp.exp()
    dz = -g[:, None] * p
    if gh is None:
        return dz
    return dz - torch.where(p > 0, gh[:, None] * p * (logp + entropy[:, None]), 0.0)
