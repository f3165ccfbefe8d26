"""Sums over a row of logits, inside of kernels.

s = Σ_{v≠y} e^{u_v},   w = Σ_{v≠y} u_v e^{u_v},   u_v = (z_v − c)/τ,   around a centre c

With c = z_y, log π(y) = −log(1 + s) has its full relative precision however close π is to 1, where
z_y − log Σ e^z has none, and no running maximum is needed. A row whose maximum is far above z_y
(log π < −32) is summed once more around the maximum. z are the logits, or c tanh(x/c) of them.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(32.0)


@triton.jit
def row_of(x, row, inner, outer_stride, inner_stride):
    """Where a row begins (`rows.Layout`)."""
    return x + (row // inner * outer_stride + row % inner * inner_stride)


@triton.jit
def scale_of(scale, row, stride, SCALED: tl.constexpr, ACC: tl.constexpr):
    """1/τ of a row."""
    t = tl.full([], 1.0, ACC)
    if SCALED:
        t = tl.load(scale + row * stride).to(ACC)
    return t


@triton.jit
def capped(x, CAP: tl.constexpr):
    """z = x, or c tanh(x/c) where CAP is not 0; −∞ bans its token whatever the cap."""
    if CAP > 0:
        x = tl.where(x == -float("inf"), x, CAP * _tanh(x / CAP))
    return x


@triton.jit
def slope(x, CAP: tl.constexpr):
    """∂z/∂x."""
    if CAP > 0:
        a = _tanh(x / CAP)
        x = 1 - a * a
    else:
        x = tl.full(x.shape, 1.0, x.dtype)
    return x


@triton.jit
def _tanh(a):
    """A small one by its series: 1 − 2/(e²ᵃ + 1) has lost its digits."""
    small: tl.constexpr = 0.02 if a.dtype == tl.float64 else 0.15
    b = a * a
    series = a * (1 + b * (-1 / 3 + b * (2 / 15 + b * (-17 / 315 + b * (62 / 2835)))))
    return tl.where(tl.abs(a) < small, series, 1 - 2 / (tl.exp(2 * a) + 1))


@triton.jit
def log1p(s):
    """Below 1 by 2 artanh(s / (2 + s)): the GPU's logarithm has no relative precision near 1."""
    t = s / (2 + s)
    series = 0.0 * t
    for k in tl.static_range(17, -1, -1):  # float64 needs 18 terms, float32 8
        series = series * (t * t) + 1.0 / (2 * k + 1)
    return tl.where(s < 1, 2 * t * series, tl.log(1 + s))


@triton.jit
def logit_of(x, y, stride, vocab, CAP: tl.constexpr, ACC: tl.constexpr):
    """z_y; NaN where y is no token of the vocabulary."""
    inside = (y >= 0) & (y < vocab)
    loaded = tl.load(x + y * stride, mask=inside, other=float("nan"))
    return capped(loaded.to(ACC), CAP)


@triton.jit
def sums(x, stride, start, stop, y, centre, t, CAP: tl.constexpr, ENTROPY: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """(s, w, max z) of x[start:stop]; a lane adds up its own, so nothing waits inside the loop."""
    s = tl.zeros([BLOCK], centre.dtype)
    w = tl.zeros([BLOCK], centre.dtype)
    top = tl.full([BLOCK], -float("inf"), centre.dtype)
    for first in range(start, stop, BLOCK):
        v = first + tl.arange(0, BLOCK)
        loaded = tl.load(x + v.to(tl.int64) * stride, mask=v < stop, other=-float("inf"))
        z = capped(loaded.to(centre.dtype), CAP)
        top = tl.maximum(top, z)
        u = (z - centre) * t
        e = tl.where(v == y, 0.0, tl.exp(u))
        s += e
        if ENTROPY:
            w += tl.where(e > 0, e * u, 0.0)
    return tl.sum(s), tl.sum(w), tl.max(top)


@triton.jit
def centred_sums(x, stride, start, stop, y, chosen, t, CAP: tl.constexpr, ENTROPY: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """(c, s, w): around the chosen logit, or around the maximum where that is far above it."""
    centre = chosen
    s, w, top = sums(x, stride, start, stop, y, centre, t, CAP, ENTROPY, BLOCK)
    if (top - chosen) * t > FAR:
        centre = top
        s, w, top = sums(x, stride, start, stop, y, centre, t, CAP, ENTROPY, BLOCK)
    banned = top == -float("inf")  # all of it: −∞ − −∞ is no number
    return centre, tl.where(banned, 0.0, s), tl.where(banned, 0.0, w)


@triton.jit
def finished(centre, s, w, chosen, t):
    """(log π, H, log Σ e^u, 1 − π) from the sums."""
    own = (chosen - centre) * t
    one = tl.exp(own)
    total = s + one
    log_total = tl.where(centre == chosen, log1p(s), tl.log(total))
    entropy = log_total - (w + tl.where(one > 0, own * one, 0.0)) / total
    return own - log_total, entropy, log_total, s / total
