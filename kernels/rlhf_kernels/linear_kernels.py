"""The kernels of `linear.py`, and their launches.

Forward is one product of matrices with the sums of `statistics.py` in its epilogue, over slabs of
the vocabulary that are merged in their order; backward computes a tile of logits again and writes
its gradient. No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

from rlhf_kernels import linear_tiles as tiles
from rlhf_kernels import rows
from rlhf_kernels.linear_cpu import kept_shape
from rlhf_kernels.linear_tiles import has, placed, recentred, tile
from rlhf_kernels.logprobs import _merge
from rlhf_kernels.statistics import LN2, LOG2E, capped, scale_of, slope, start_at

# the kernels


@triton.jit
def _chosen(h, w, b, y, out, vocab, width, h_stride, w_stride, CAP: tl.constexpr,
            BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """z_y, one program per row; NaN where y is no token of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(y + row).to(tl.int64)
    inside = (token >= 0) & (token < vocab)
    token = tl.where(inside, token, 0)
    k = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], ACC)
    for first in range(0, width, BLOCK):
        mask = first + k < width
        left = tl.load(h + row * h_stride + first + k, mask=mask, other=0.0).to(ACC)
        x += left * tl.load(w + token * w_stride + first + k, mask=mask, other=0.0).to(ACC)
    x = tl.sum(x)
    if BIAS:
        x += tl.load(b + token).to(ACC)
    tl.store(out + row, tl.where(inside, capped(x, CAP), float("nan")))


@triton.jit
def _forward(h, w, b, y, scale, chosen, partial, kept, centres, tops, number, vocab, width, slab,
             slabs, blocks, group, scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr,
             BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
             FULL: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """One program per block of rows and slab of the vocabulary; `partial` is [rows, slabs, 5]."""
    BM: tl.constexpr = h.block_shape[0]
    BN: tl.constexpr = w.block_shape[0]
    block, part = placed(tl.program_id(0), blocks, slabs, group)
    rm = block * BM + tl.arange(0, BM)
    row, inside = tl.minimum(rm, number - 1).to(tl.int64), rm < number
    t = tl.zeros([BM], ACC) + scale_of(scale, row, scale_stride, SCALED, ACC) * LOG2E
    c = start_at(tl.load(chosen + row))
    s, moment, highest = tl.zeros([BM], ACC), tl.zeros([BM], ACC), c
    for first in range(part * slab, tl.minimum(part * slab + slab, vocab), BN):
        rn = first + tl.arange(0, BN)
        x = tile(h, w, b, block * BM, first, vocab, width, BIAS, ACC, PRECISION, UPCAST)
        z = capped(x, CAP)
        if has(tl.load(y + row), first, BN):
            z = tl.where(rn[None, :] == tl.load(y + row)[:, None], -float("inf"), z)
        # sums, H's above all, are best around the maximum, but what is kept moves with the centre
        top = tl.max(z, 1)
        c, s, moment = recentred(z, top, c, s, moment, t, (3 if FULL else 16) if KEEP else 0)
        u = (z - c[:, None]) * t[:, None]
        e = tl.exp2(u)
        s += tl.sum(e, 1)
        if FULL:
            moment += tl.sum(e * tl.maximum(u, -1e4), 1)
        if KEEP:
            e = tl.where(e < float("inf"), e, 0.0)  # of a row that is no number, nothing is kept
            kept.store([block * BM, first], e.to(kept.dtype))
            tl.store(centres + first // BN * number + row, c, mask=inside)
        if KEEP and not FULL:
            highest = tl.maximum(highest, top)
    if KEEP and not FULL:
        tl.store(tops + row * slabs + part, highest, mask=inside)
    partial += (row * slabs + part) * 5
    tl.store(partial, c, mask=inside)
    tl.store(partial + 1, s, mask=inside)
    tl.store(partial + 2, moment * LN2, mask=inside)
    tl.store(partial + 3, tl.load(chosen + row), mask=inside)
    tl.store(partial + 4, t * LN2, mask=inside)


@triton.jit
def _settle(kept, centres, y, scale, centre, total, rest, number, vocab, stride, scale_stride,
            SCALED: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    """What is kept, around the row's last centre; and −Σ_{v≠y} e^u for the token itself."""
    part = tl.program_id(1)
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), part * BN + tl.arange(0, BN)
    row = tl.minimum(rm, number - 1).to(tl.int64)
    token, c = tl.load(y + row), tl.load(centre + row)
    before = tl.load(centres + part * number + row)
    if tl.max(((before != c) | (token // BN == part)).to(tl.int32), 0) > 0:
        t = scale_of(scale, row, scale_stride, SCALED, ACC)
        others = tl.load(rest + row) * tl.exp(tl.load(total + row))
        others = tl.where(others < float("inf"), others, 0.0)
        at = kept + row[:, None] * stride + rn[None, :]
        mask = (rm < number)[:, None] & (rn < vocab)[None, :]
        e = tl.load(at, mask=mask, other=0.0).to(ACC) * tl.exp((before - c) * t)[:, None]
        e = tl.where(rn[None, :] == token[:, None], -others[:, None], e)
        tl.store(at, e.to(kept.dtype.element_ty), mask=mask)


@triton.jit
def _backward(h, w, b, y, scale, chosen, entropy, centre, total, rest, g, gh, gz, dz, kept, first,
              number, vocab, width, slabs, blocks, group, scale_stride, CAP: tl.constexpr,
              SCALED: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr, UPCAST: tl.constexpr, FULL: tl.constexpr,
              KEPT: tl.constexpr):  # fmt: skip
    """The gradient in x[:, first:last], a tile per program; rows without upstream are not read."""
    BM: tl.constexpr = h.block_shape[0]
    BN: tl.constexpr = w.block_shape[0]
    block, part = placed(tl.program_id(0), blocks, slabs, group)
    token = first + part * BN
    rn = token + tl.arange(0, BN)
    row = tl.minimum(block * BM + tl.arange(0, BM), number - 1).to(tl.int64)
    g = tl.load(g + row)
    read = g != 0
    if FULL:
        gh, gz = tl.load(gh + row), tl.load(gz + row)
        read = read | (gh != 0) | (gz != 0)
    if tl.max(read.to(tl.int32), 0) == 0:
        dz.store([block * BM, part * BN], tl.zeros([BM, BN], dz.dtype))
    else:
        t = tl.zeros([BM], ACC) + scale_of(scale, row, scale_stride, SCALED, ACC)
        if KEPT:
            u = tl.log2(tl.maximum(kept.load([block * BM, token]).to(ACC), 0.0))
        else:
            c = tl.where(read, tl.load(centre + row), 0.0)
            x = tile(h, w, b, block * BM, token, vocab, width, BIAS, ACC, PRECISION, UPCAST)
            u = (capped(x, CAP) - c[:, None]) * (t * LOG2E)[:, None]
        # of a row that is not read π = 0, whatever its numbers are
        logp = u - (tl.where(read, tl.load(total + row), float("inf")) * LOG2E)[:, None]
        d = -(g * t)[:, None] * tl.exp2(logp)
        if FULL:
            mean = tl.where(read, tl.load(entropy + row), 0.0)
            # π log π = 0 where π = 0
            d -= (gh * t)[:, None] * tl.exp2(logp) * (tl.maximum(logp, -1e4) * LN2 + mean[:, None])
        if has(tl.load(y + row), token, BN):
            own = g * tl.where(read, tl.load(rest + row), 0.0) * t
            if FULL:  # of its own log π: that of the tile is of another rounding
                a = tl.where(read, tl.load(chosen + row), 0.0)
                own += gz * t - gh * t * tl.exp(a) * (tl.maximum(a, -1e4) + mean)
            d = tl.where(rn[None, :] == tl.load(y + row)[:, None], own[:, None], d)
        if CAP > 0:
            d *= slope(x, CAP)
        dz.store([block * BM, part * BN], d.to(dz.dtype))


# the launches


def forward(h, w, b, y, scale, softcap, full, keep, memory):
    """(log π, H, z_y/τ, z_y ≥ max z), the row's c, log Σ e^u and 1 − π, and e^u if it is kept."""
    (number, width), vocab, wide = h.shape, len(w), rows.accumulator(h)
    outputs = [h.new_empty(number, dtype=wide) for _ in range(5)]
    chosen = h.new_empty(number, dtype=wide)
    kept = h.new_empty(kept_shape(number, vocab, keep))
    if not number:
        return *outputs[:2], chosen, chosen.clone(), *outputs[2:], kept
    plan, y = tiles.plan(number, h.dtype, lean=not (keep or softcap)), y.contiguous()
    if keep and full:  # what is kept and H's moment want registers at once
        plan = plan._replace(tokens=min(plan.tokens, 64))
    h, w = tiles.operand(h), tiles.operand(w)
    b, scale, step, flags = tiles.options(h, b, scale, softcap)
    _chosen[number,](
        h, w, b, y, chosen, vocab, width, h.stride(0), w.stride(0), CAP=softcap,
        BIAS=flags["BIAS"], ACC=flags["ACC"], BLOCK=min(triton.next_power_of_2(width), 1024),
    )  # fmt: skip
    blocks, tall = triton.cdiv(number, plan.rows), triton.cdiv(vocab, plan.tokens)
    slab = triton.cdiv(tall, tiles.slabs(blocks, tall))
    slabs = triton.cdiv(tall, slab)
    partial = chosen.new_empty(number, slabs, 5)
    centres = chosen.new_empty(tall, number) if keep else chosen
    tops = chosen.new_empty(number, slabs) if keep else chosen
    _forward[blocks * slabs,](
        *plan.of(h, w), b, y, scale, chosen, partial, plan.on(kept) if keep else kept, centres,
        tops, number, vocab, width, slab * plan.tokens, slabs, blocks, tiles.group(plan, h), step,
        FULL=full, KEEP=keep, **flags, **plan.options,
    )  # fmt: skip
    _merge[number,](partial, *outputs, slabs, SLABS=triton.next_power_of_2(slabs), num_warps=1)
    if keep:
        few = {name: flags[name] for name in ("SCALED", "ACC")}
        _settle[blocks, tall](
            kept, centres, y, scale, *outputs[2:], number, vocab, kept.stride(0), step,
            **few, BM=plan.rows, BN=plan.tokens, num_warps=plan.warps,
        )  # fmt: skip
    logit = chosen if not flags["SCALED"] else chosen * scale
    logp, entropy, centre, *others = outputs
    highest = tops.amax(-1) if keep and not full else centre
    hits = (chosen == highest) & ~logp.isnan() & (not full)
    return logp, entropy, logit, hits.to(logp.dtype), centre, *others, kept


def backward(
    h, w, b, y, scale, softcap, full, keep, memory, logp, entropy, centre, total, rest, kept, g, gh,
    gz, *wanted,
):  # fmt: skip
    """The gradients in h, W and b, those wanted."""
    number, vocab = len(h), len(w)
    read = (g != 0) | (gh != 0) | (gz != 0) if full else g != 0
    h, factor = torch.where(read[:, None], h, 0), None
    if keep and not full:
        factor = torch.where(read, -g * torch.exp(-total), 0)
        factor = factor if scale is None else factor * scale
        parts = [(slice(0, vocab), kept[:, :vocab])]
    else:
        per_row = [x.contiguous() for x in (logp, entropy, centre, total, rest, g, gh, gz)]
        most = memory // (max(number, 1) * h.itemsize) - vocab * keep
        parts = _parts(h, w, b, y, scale, softcap, full, most, per_row, kept if keep else None)
    return tiles.gradients(h, w, b, parts, wanted, factor)


def _parts(h, w, b, y, scale, softcap, full, most, per_row, kept):
    """(where, the gradient in x there), of one part of the vocabulary after the other."""
    (number, width), vocab = h.shape, len(w)
    plan, y = tiles.plan(number, h.dtype, lean=not (full or softcap)), y.contiguous()
    h, w = tiles.operand(h), tiles.operand(w)
    b, scale, step, flags = tiles.options(h, b, scale, softcap)
    blocks, group = triton.cdiv(number, plan.rows), tiles.group(plan, h)
    for at in tiles.chunks(vocab, most, plan.tokens):
        dz = tiles.padded(h.new_empty, number, at.stop - at.start)
        slabs = triton.cdiv(dz.shape[1], plan.tokens)
        if number:
            _backward[blocks * slabs,](
                *plan.of(h, w), b, y, scale, *per_row, plan.on(dz),
                plan.on(dz if kept is None else kept), at.start, number, vocab, width, slabs,
                blocks, group, step, FULL=full, KEPT=kept is not None, **flags, **plan.options,
            )  # fmt: skip
        yield at, dz
