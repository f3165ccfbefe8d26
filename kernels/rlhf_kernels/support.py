"""Which tokens may be drawn: the top-k and top-p support of a row of logits, inside of kernels.

S = {v: z_v > c} and, of those with z_v = c, the m of the lowest index: stored as the cut c and the
index of the last of the m

c is the lowest number above which less than a goal weighs: w_v = 1 and the goal k for top-k, or
w_v = e^{(z_v − max z)/τ} and p Σ w for top-p. Bisection over the ordered integers that floats are
finds it, from one logit of the row to another: some log₂ of the vocabulary reads of a row, 32 at
most. One program walks a row, which stays in the L2 cache of a GPU; nothing is sorted or written.

Holtzman et al. 2020 (top-p): https://arxiv.org/abs/1904.09751
"""

import triton
import triton.language as tl

from rlhf_kernels.statistics import capped, row_of, scale_of


@triton.jit
def loaded(x, v, stride, vocab, CAP: tl.constexpr, ACC: tl.constexpr):
    """z_v; −∞ beyond the vocabulary."""
    z = tl.load(x + v.to(tl.int64) * stride, mask=v < vocab, other=-float("inf"))
    return capped(z.to(ACC), CAP)


@triton.jit
def weight(z, top, t):
    """e^{(z − top)/τ}; 0 for −∞, also where that is all there is."""
    return tl.exp((z - tl.where(top == -float("inf"), 0.0, top)) * t)


@triton.jit
def _integer(x):
    """The integer that floats are, in their order: −0 is one below 0."""
    small: tl.constexpr = x.dtype == tl.float32
    i = x.to(tl.int32 if small else tl.int64, bitcast=True)
    return i ^ ((i >> (31 if small else 63)) & (0x7FFFFFFF if small else 0x7FFFFFFFFFFFFFFF))


@triton.jit
def _float(i):
    small: tl.constexpr = i.dtype == tl.int32
    i = i ^ ((i >> (31 if small else 63)) & (0x7FFFFFFF if small else 0x7FFFFFFFFFFFFFFF))
    return i.to(tl.float32 if small else tl.float64, bitcast=True)


@triton.jit
def _maximum(x, stride, vocab, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    top = tl.full([BLOCK], -float("inf"), ACC)
    for first in range(0, vocab, BLOCK):
        top = tl.maximum(top, loaded(x, first + tl.arange(0, BLOCK), stride, vocab, CAP, ACC))
    return tl.max(top)


@triton.jit
def _parted(x, stride, vocab, cut, top, t, MASS: tl.constexpr, CAP: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """(Σ w_v over z_v > cut, the largest logit that is not above the cut, the smallest that is)."""
    total = tl.zeros([BLOCK], tl.float64 if MASS else tl.int32)
    under = tl.full([BLOCK], -float("inf"), cut.dtype)
    over = tl.full([BLOCK], float("inf"), cut.dtype)
    for first in range(0, vocab, BLOCK):
        z = loaded(x, first + tl.arange(0, BLOCK), stride, vocab, CAP, cut.dtype)
        if MASS:
            total += tl.where(z > cut, weight(z, top, t).to(tl.float64), 0.0)
        else:
            total += (z > cut).to(tl.int32)
        under = tl.maximum(under, tl.where(z > cut, -float("inf"), z))
        over = tl.minimum(over, tl.where(z > cut, z, float("inf")))
    return tl.sum(total).to(tl.float64), tl.max(under), tl.min(over)


@triton.jit
def _lowest(x, stride, vocab, low, top, goal, t, MASS: tl.constexpr, CAP: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """(c, Σ_{z_v > c} w_v) for the lowest c ≥ low with the sum below the goal, or equal to it."""
    above = tl.zeros_like(goal)
    lo, hi = _integer(low), _integer(top)
    while lo < hi:
        middle = (lo & hi) + ((lo ^ hi) >> 1)  # lo + hi may not fit
        w, under, over = _parted(x, stride, vocab, _float(middle), top, t, MASS, CAP, BLOCK)
        above = tl.where(w <= goal, w, above)
        down = tl.maximum(tl.minimum(_integer(under), middle), lo)  # equal floats, 0 and −0, may
        up = tl.maximum(_integer(over), middle + 1)  # be two integers
        hi = tl.where(w <= goal, down, hi)
        lo = tl.where(w < goal, lo, tl.where(w == goal, down, up))
    return _float(hi), above


@triton.jit
def _last_of(x, stride, vocab, cut, ties, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """The index of the token that is number `ties` of those at the cut; −1 for none."""
    first, seen, last = tl.zeros_like(vocab), tl.zeros_like(ties), tl.zeros_like(vocab) - 1
    while (first < vocab) & (seen < ties):
        v = first + tl.arange(0, BLOCK)
        at = loaded(x, v, stride, vocab, CAP, cut.dtype) == cut
        number = seen + tl.cumsum(at.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(at & (number <= ties), v, -1)))
        seen = tl.max(number)
        first += BLOCK
    return last


@triton.jit
def support(x, scale, p, cut, last, vocab, k, inner, outer_stride, inner_stride, stride,
            scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
            TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The cut of each row and the last token at it; top-p of what top-k leaves."""
    row = tl.program_id(0).to(tl.int64)
    x = row_of(x, row, inner, outer_stride, inner_stride)
    t = scale_of(scale, row, scale_stride, SCALED, ACC)
    vocab = tl.full([], 0, tl.int32) + vocab
    top = _maximum(x, stride, vocab, CAP, ACC, BLOCK)
    c, ties = tl.full([], -float("inf"), ACC), vocab.to(tl.float64)
    if TOP_K:
        goal = tl.full([], 0.0, tl.float64) + k
        c, above = _lowest(x, stride, vocab, c, top, goal, t, False, CAP, BLOCK)
        ties = goal - above
    if TOP_P:
        own = weight(c, top, t).to(tl.float64)
        total, _, _ = _parted(x, stride, vocab, c, top, t, True, CAP, BLOCK)
        goal = tl.load(p) * (total + ties * own)
        c, above = _lowest(x, stride, vocab, c, top, goal, t, True, CAP, BLOCK)
        ties = tl.ceil((goal - above) / weight(c, top, t).to(tl.float64))
    tl.store(cut + row, c)
    tl.store(last + row, _last_of(x, stride, vocab, c, ties, CAP, BLOCK))
