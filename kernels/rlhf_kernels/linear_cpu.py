"""The projection's quantities in plain torch: what derivatives fall back on, and the path on a CPU.

On a CPU everything is float32 or wider, a part of W being widened at a time: that does not round
the logits, and without matrix units it is faster than a product of bfloat16
(`kernels/benchmarks/linear.py --dtype bf16` has both).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf_kernels import cpu, formulas, rows
from rlhf_kernels import linear_tiles as tiles

ELEMENTS = 2**20  # of logits at a time: a few megabytes, which stay in the cache
MARGIN = 11.0  # nats by which logits may be above the centre of what is kept, which must move too


# the formula, and its gradient


def statistics(
    h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, scale: Tensor | None, cap: float, full: bool,
    keep: bool, memory: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(log π, H, z_y/τ), the last two only if `full`."""
    x = projected(h, w, b)
    logp, entropy = formulas.logprobs(x, y, scale, cap, full)
    logit = formulas.tempered(x.gather(-1, y.long()[..., None]), scale, cap).squeeze(-1)
    return logp, entropy, logit if full else torch.zeros_like(logit)


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
    """(log π, H, z_y/τ), each row's centre, log Σ e^u and 1 − π, and e^u if it is to be kept."""
    kept = h.new_empty(kept_shape(len(h), len(w), keep))
    wide, y = h.to(rows.accumulator(h)), y.long()
    chosen = formulas.capped(_chosen(wide, w, b, y), cap)
    t = torch.ones((), dtype=wide.dtype) if scale is None else scale
    c, s, m = chosen.clamp(min=-1e38), torch.zeros_like(chosen), torch.zeros_like(chosen)
    centres = []
    for at in chunks(h, w, memory):
        x = logits(wide, w, b, at)
        put(x, y, at, -torch.inf)
        if keep:
            c, s, kept[:, at] = cpu.by_rows(_kept, x, scale, c, s, cap=cap)
            centres.append((at, c))
        elif full:
            c, s, m = cpu.by_rows(_moments, x, scale, c, s, m, cap=cap)
        else:
            c, s = cpu.by_rows(_sums, x, scale, c, s, cap=cap)
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
    return own - log_total, entropy, chosen * t, c, log_total, s / total, kept


def backward(h, w, b, y, scale, cap, full, keep, memory, *others):
    """The gradients in h, W and b, those wanted, of the rows that have an upstream gradient."""
    logp, entropy, c, total, rest, kept, g, gh, gz, *wanted = others
    read = (g != 0) | (gh != 0) | (gz != 0) if full else g != 0
    some = slice(None) if read.all() else read
    wide, y = h.to(rows.accumulator(h))[some], y.long()[some]
    scale = None if scale is None else scale[some]
    per_row = (x[some] for x in (logp, entropy, c, total, rest, g, gh, gz))
    logp, entropy, c, total, rest, g, gh, gz = per_row
    factor = None
    if keep:
        factor = -g * (-total).exp() * (1.0 if scale is None else scale)
        parts = ((at, kept[some, at].to(wide.dtype)) for at in chunks(h, w, memory))
    else:
        sums = scale, c, total, *((entropy, g, gh) if full else (None, g, None))
        own = g * rest
        if full:
            own = own + gz - gh * logp.exp() * (logp.clamp(min=-1e4) + entropy)
        parts = _parts(wide, w, b, y, cap, sums, own, chunks(h, w, memory))
    dh, *others = tiles.gradients(wide, w, b, parts, wanted, factor)
    if wanted[0]:
        dh = torch.zeros_like(h).index_put_((read,), dh.to(h.dtype))
    return dh, *others


def _parts(h, w, b, y, cap, sums, own, at_each):
    """(where, the gradient in x there), of one part of the vocabulary after the other."""
    for at in at_each:
        x = logits(h, w, b, at)
        (dx,) = cpu.by_rows(_dx, x, *sums, cap=cap)
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
    return higher, step, u if scale is None else u * scale[:, None]


def _sums(x, scale, c, s, cap):
    c, step, u = _recentred(x, scale, c, 0.0, cap)
    return c, s * step.exp() + u.exp().sum(-1)


def _kept(x, scale, c, s, cap):
    c, step, u = _recentred(x, scale, c, MARGIN, cap)
    e = u.exp()
    return c, s * step.exp() + e.sum(-1), torch.where(e < torch.inf, e, 0.0)


def _moments(x, scale, c, s, m, cap):
    c, step, u = _recentred(x, scale, c, 0.0, cap)
    e, move = u.exp(), step.exp()
    m = torch.where(s > 0, (m + step * s) * move, 0.0) + (e * u.clamp(min=-1e4)).sum(-1)
    return c, s * move + e.sum(-1), m


def _dx(x, scale, c, total, entropy, g, gh, cap):
    u = formulas.capped(x, cap) - c[:, None]
    logp = (u if scale is None else u * scale[:, None]) - total[:, None]
    p = logp.exp()
    dz = -g[:, None] * p
    if gh is not None:
        dz = dz - torch.where(p > 0, gh[:, None] * p * (logp + entropy[:, None]), 0.0)
    return (dz * formulas.slope(x, scale, cap),)
