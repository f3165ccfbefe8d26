"""Sums over a row of logits, inside of kernels.

s = Σ_{v≠y} e^{u_v},   w = Σ_{v≠y} u_v e^{u_v},   u_v = (z_v − c)/τ,   around a centre c

log π(y) = u_y − log(s + e^{u_y}),   H = log(s + e^{u_y}) − (w + u_y e^{u_y}) / (s + e^{u_y})

The centre begins at z_y and moves up to the maximum of what was read. Where π(y) → 1 it never
moves, u_y = 0, and log π(y) = −log(1 + s) keeps the relative precision of s, where z_y − log Σ e^z
has none. z are the logits, or k tanh(x/k) of them with a softcap k.

With logits of a reference, o around c': r = Σ_{v≠y} e^{o_v}, d = Σ_{v≠y} (u_v − o_v) e^{u_v}.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    """Near 0 by a polynomial, where 1 − 2/(e²ᵃ + 1) has lost its digits; that of Cephes's tanhf."""
    b = a * a
    if a.dtype == tl.float64:
        p = -1 / 3 + b * (2 / 15 + b * (-17 / 315 + b * (62 / 2835)))
        near = tl.abs(a) < 0.02
    else:
        p = -5.70498872745e-3 * b + 2.06390887954e-2
        p = ((p * b - 5.37397155531e-2) * b + 1.33314422036e-1) * b - 3.33332819422e-1
        near = tl.abs(a) < 0.625
    return tl.where(near, a + a * b * p, 1 - 2 / (tl.exp(2 * a) + 1))


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
def start_at(chosen):
    """The first centre: finite, so that −∞ − c is never −∞ + ∞."""
    return tl.maximum(chosen, -1e38)


@triton.jit
def moved(s, w, c, top, t):
    """(s, w, c) around the higher of c and `top`; w and t in units of log 2."""
    if top > c:
        step = (c - top) * t
        w = tl.where(s > 0, (w + step * s) * tl.exp2(step), 0.0)
        s = s * tl.exp2(step)
        c = top
    return s, w, c


@triton.jit
def fold(a, LANES: tl.constexpr):
    """A block added up to one number per thread: what the loop carries stays in few registers."""
    return tl.sum(tl.reshape(a, LANES, a.shape[0] // LANES), 1)


@triton.jit
def blocks_of(start, stop, y, BLOCK: tl.constexpr):
    """(where the whole blocks end, the first token of y's block)."""
    return start + (stop - start) // BLOCK * BLOCK, start + (y - start) // BLOCK * BLOCK


@triton.jit
def left_over(i, v, start, stop, whole, home, y):
    """(tokens, which of them count) of what the loop over whole blocks leaves: y's and the last."""
    at = tl.where(i == 0, home, whole) + v
    once = (i == 1) | ((home >= start) & (home < whole))
    return at, (at < stop) & (at != y) & once


@triton.jit
def sums(x, stride, start, stop, y, chosen, t, CAP: tl.constexpr, ENTROPY: tl.constexpr,
         BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(c, s, w) of x[start:stop]. The loop has no mask: y's block counts for nothing in it."""
    c, t = start_at(chosen), t * LOG2E
    s, w = tl.zeros([LANES], c.dtype), tl.zeros([LANES], c.dtype)
    v = tl.arange(0, BLOCK)
    whole, home = blocks_of(start, stop, y, BLOCK)
    for first in range(start, whole, BLOCK):
        z = capped(tl.load(x + (first + v).to(tl.int64) * stride).to(c.dtype), CAP)
        s, w, c = added(z, first == home, s, w, c, t, ENTROPY, LANES)
    for i in range(2):
        at, inside = left_over(i, v, start, stop, whole, home, y)
        z = tl.load(x + at.to(tl.int64) * stride, mask=inside, other=-float("inf"))
        s, w, c = added(capped(z.to(c.dtype), CAP), False, s, w, c, t, ENTROPY, LANES)
    return c, tl.sum(s), tl.sum(w) * LN2


@triton.jit
def added(z, skipped, s, w, c, t, ENTROPY: tl.constexpr, LANES: tl.constexpr):
    """(s, w, c) with a block of logits more, unless it is `skipped`."""
    s, w, c = moved(s, w, c, tl.max(z), t)
    u = (z - tl.where(skipped, float("inf"), c)) * t
    e = tl.exp2(u)
    s += fold(e, LANES)
    if ENTROPY:
        w += fold(e * tl.maximum(u, -1e4), LANES)  # e is 0 long before, and 0 · −∞ is no number
    return s, w, c


@triton.jit
def finished(centre, s, w, chosen, t):
    """(log π, H, log Σ e^u, 1 − π) from the sums."""
    own = (chosen - centre) * t
    one = tl.exp(own)
    total = s + one
    log_total = tl.where(centre == chosen, log1p(s), tl.log(total))
    entropy = log_total - (w + tl.where(one > 0, own * one, 0.0)) / total
    return own - log_total, entropy, log_total, s / total


@triton.jit
def added_of_both(z, o, skipped, s, w, d, r, c, cq, t, LANES: tl.constexpr):
    """The sums with a block of both more, unless it is `skipped`; w, d and t in units of log 2."""
    # Σ (u − o) e^u moves with both centres: up with that of o, and like w with that of u
    top, top_q = tl.maximum(tl.max(z), c), tl.maximum(tl.max(o), cq)
    d = tl.where(s > 0, d + (top_q - cq) * t * s, 0.0)
    r, _, cq = moved(r, r, cq, top_q, t)
    _, d, _ = moved(s, d, c, top, t)
    s, w, c = moved(s, w, c, top, t)
    u = (z - tl.where(skipped, float("inf"), c)) * t
    o = (o - tl.where(skipped, float("inf"), cq)) * t
    e = tl.exp2(u)
    s += fold(e, LANES)
    w += fold(e * tl.maximum(u, -1e4), LANES)
    d += fold(tl.where(e > 0, e * (u - o), 0.0), LANES)
    r += fold(tl.exp2(o), LANES)
    return s, w, d, r, c, cq


@triton.jit
def sums_of_both(x, x_stride, q, q_stride, start, stop, y, chosen, chosen_q, t, CAP: tl.constexpr,
          BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(c, s, w, c', r, d) of x[start:stop] and q[start:stop], in one read of both; like `sums`."""
    c, cq, t = start_at(chosen), start_at(chosen_q), t * LOG2E
    s, w = tl.zeros([LANES], c.dtype), tl.zeros([LANES], c.dtype)
    r, d = tl.zeros([LANES], c.dtype), tl.zeros([LANES], c.dtype)
    v = tl.arange(0, BLOCK)
    whole, home = blocks_of(start, stop, y, BLOCK)
    for first in range(start, whole, BLOCK):
        at = (first + v).to(tl.int64)
        z = capped(tl.load(x + at * x_stride).to(c.dtype), CAP)
        o = capped(tl.load(q + at * q_stride).to(c.dtype), CAP)
        s, w, d, r, c, cq = added_of_both(z, o, first == home, s, w, d, r, c, cq, t, LANES)
    for i in range(2):
        at, inside = left_over(i, v, start, stop, whole, home, y)
        at = at.to(tl.int64)
        z = capped(tl.load(x + at * x_stride, mask=inside, other=-float("inf")).to(c.dtype), CAP)
        o = capped(tl.load(q + at * q_stride, mask=inside, other=-float("inf")).to(c.dtype), CAP)
        s, w, d, r, c, cq = added_of_both(z, o, False, s, w, d, r, c, cq, t, LANES)
    return c, tl.sum(s), tl.sum(w) * LN2, cq, tl.sum(r), tl.sum(d) * LN2
