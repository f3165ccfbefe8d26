"""The exact KL divergence between two projections of hidden states, without either's logits.

KL(π ‖ ρ) = Σᵥ (uᵥ − oᵥ) e^{uᵥ} / Σᵥ e^{uᵥ} − log Σᵥ e^{uᵥ} + log Σᵥ e^{oᵥ}

u and o are the logits of π and ρ over τ around their maxima so far. The gradients ∂KL/∂z of
`divergence.py` go on to h and W as those of `linear.py` do, of logits that are computed again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import linear_divergence_cpu as on_cpu
from rlhf_kernels import linear_tiles as tiles
from rlhf_kernels import rows
from rlhf_kernels.linear_tiles import placed, tile
from rlhf_kernels.registration import differentiable, operator
from rlhf_kernels.statistics import LN2, LOG2E, capped, scale_of, slope

# the kernels


@triton.jit
def _forward(h, w, hq, wq, scale, partial, number, vocab, width, width_q, slab, slabs, blocks,
             group, scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program per block of rows and slab of the vocabulary; `partial` is [rows, slabs, 5]."""
    BM: tl.constexpr = h.block_shape[0]
    BN: tl.constexpr = w.block_shape[0]
    block, part = placed(tl.program_id(0), blocks, slabs, group)
    rm = block * BM + tl.arange(0, BM)
    row, inside = tl.minimum(rm, number - 1).to(tl.int64), rm < number
    t = tl.zeros([BM], ACC) + scale_of(scale, row, scale_stride, SCALED, ACC) * LOG2E
    c, cq = tl.full([BM], -1e38, ACC), tl.full([BM], -1e38, ACC)
    s, r, d = tl.zeros([BM], ACC), tl.zeros([BM], ACC), tl.zeros([BM], ACC)
    for first in range(part * slab, tl.minimum(part * slab + slab, vocab), BN):
        at = block * BM
        z = capped(tile(h, w, h, at, first, vocab, width, BIAS, ACC, PRECISION, UPCAST), CAP)
        o = capped(tile(hq, wq, h, at, first, vocab, width_q, BIAS, ACC, PRECISION, UPCAST), CAP)
        top, top_q = tl.maximum(c, tl.max(z, 1)), tl.maximum(cq, tl.max(o, 1))
        step, step_q = (c - top) * t, (cq - top_q) * t
        d = tl.where(s > 0, (d + (step - step_q) * s) * tl.exp2(step), 0.0)
        s, r, c, cq = s * tl.exp2(step), r * tl.exp2(step_q), top, top_q
        u, o = (z - c[:, None]) * t[:, None], (o - cq[:, None]) * t[:, None]
        e = tl.exp2(u)
        s += tl.sum(e, 1)
        r += tl.sum(tl.exp2(o), 1)
        d += tl.sum(tl.where(e > 0, e * (u - o), 0.0), 1)
    partial += (row * slabs + part) * 5
    tl.store(partial, c, mask=inside)
    tl.store(partial + 1, s, mask=inside)
    tl.store(partial + 2, cq, mask=inside)
    tl.store(partial + 3, r, mask=inside)
    tl.store(partial + 4, d * LN2, mask=inside)


@triton.jit
def _backward(h, w, hq, wq, scale, kl, centre, total, centre_q, total_q, g, dz, first, number,
              vocab, width, width_q, slabs, blocks, group, scale_stride, CAP: tl.constexpr,
              SCALED: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr, UPCAST: tl.constexpr,
              OF_REFERENCE: tl.constexpr):  # fmt: skip
    """The gradient in x[:, first:] or q[:, first:], a tile per program."""
    BM: tl.constexpr = h.block_shape[0]
    BN: tl.constexpr = w.block_shape[0]
    block, part = placed(tl.program_id(0), blocks, slabs, group)
    rm, token = block * BM + tl.arange(0, BM), first + part * BN
    row = tl.minimum(rm, number - 1).to(tl.int64)
    g = tl.load(g + row)
    if tl.max((g != 0).to(tl.int32), 0) == 0:
        dz.store([block * BM, part * BN], tl.zeros([BM, BN], dz.dtype))
    else:
        t = tl.zeros([BM], ACC) + scale_of(scale, row, scale_stride, SCALED, ACC)
        at = block * BM
        x = tile(h, w, h, at, token, vocab, width, BIAS, ACC, PRECISION, UPCAST)
        q = tile(hq, wq, h, at, token, vocab, width_q, BIAS, ACC, PRECISION, UPCAST)
        u = (capped(x, CAP) - tl.load(centre + row)[:, None]) * t[:, None]
        o = (capped(q, CAP) - tl.load(centre_q + row)[:, None]) * t[:, None]
        s, r = tl.load(total + row), tl.load(total_q + row)
        p = tl.exp(u - s[:, None])
        if OF_REFERENCE:
            d = (tl.exp(o - r[:, None]) - p) * slope(q, CAP)
        else:  # rounded as the KL is, so that p → 1 cancels
            log_ratio = (u - o) - (s - r)[:, None]
            d = tl.where(p > 0, p * (log_ratio - tl.load(kl + row)[:, None]), 0.0) * slope(x, CAP)
        d = tl.where((g != 0)[:, None], d * (g * t)[:, None], 0.0)
        dz.store([block * BM, part * BN], d.to(dz.dtype))


# the launches


def _arguments(h, w, hq, wq, scale, softcap):
    """(plan, operands, widths, (blocks, group), scale's stride, options)."""
    plan = tiles.plan(len(h), h.dtype, lean=False)
    widths = h.shape[1], hq.shape[1]
    h, w, hq, wq = (tiles.operand(x) for x in (h, w, hq, wq))
    _, scale, step, flags = tiles.options(h, None, scale, softcap)
    given = *plan.of(h, w), *plan.of(hq, wq), scale
    return plan, given, widths, (triton.cdiv(len(h), plan.rows), tiles.group(plan, h)), step, flags


def _launch_forward(h, w, hq, wq, scale, softcap, memory):
    number, vocab, wide = len(h), len(w), rows.accumulator(h)
    if not number:
        return tuple(h.new_empty(0, dtype=wide) for _ in range(5))
    plan, given, widths, (blocks, group), step, flags = _arguments(h, w, hq, wq, scale, softcap)
    tall = triton.cdiv(vocab, plan.tokens)
    slab = triton.cdiv(tall, tiles.slabs(blocks, tall))
    slabs = triton.cdiv(tall, slab)
    partial = h.new_empty(number, slabs, 5, dtype=wide)
    _forward[blocks * slabs,](
        *given, partial, number, vocab, *widths, slab * plan.tokens, slabs, blocks, group, step,
        **flags, **plan.options,
    )  # fmt: skip
    return on_cpu.merged(*partial.unbind(-1), None if scale is None else scale[:, None])


def _launch_backward(h, w, hq, wq, scale, softcap, memory, *others):
    *per_row, g, of_reference, of_h, of_w = others
    read = (g != 0)[:, None]
    h, hq = torch.where(read, h, 0), torch.where(read, hq, 0)
    left, right = (hq, wq) if of_reference else (h, w)
    per_row = [x.contiguous() for x in (*per_row, g)]
    parts = _parts(h, w, hq, wq, scale, softcap, memory, per_row, of_reference)
    return tiles.gradients(left, right, None, parts, (of_h, of_w, False))[:2]


def _parts(h, w, hq, wq, scale, softcap, memory, per_row, of_reference):
    """(where, the gradient in the logits there), of one part of the vocabulary after the other."""
    number, vocab = len(h), len(w)
    if not number:
        yield slice(0, vocab), h.new_empty(0, vocab)
        return
    plan, given, widths, (blocks, group), step, flags = _arguments(h, w, hq, wq, scale, softcap)
    for at in tiles.chunks(vocab, memory // (number * h.itemsize), plan.tokens):
        dz = tiles.padded(h.new_empty, number, at.stop - at.start)
        slabs = triton.cdiv(dz.shape[1], plan.tokens)
        _backward[blocks * slabs,](
            *given, *per_row, plan.on(dz), at.start, number, vocab, *widths, slabs, blocks, group,
            step, OF_REFERENCE=of_reference, **flags, **plan.options,
        )  # fmt: skip
        yield at, dz


# the operators

_ARGUMENTS = "Tensor h, Tensor w, Tensor hq, Tensor wq, Tensor? scale, float softcap, int memory"
_PER_ROW = "Tensor kl, Tensor centre, Tensor total, Tensor centre_q, Tensor total_q"
_WEIGHTS = (1, 3)


def _fake_backward(h, w, hq, wq, *others):
    *_, of_reference, of_h, of_w = others
    each = zip((hq, wq) if of_reference else (h, w), (of_h, of_w))
    return tuple(x.new_empty(x.shape) if of else h.new_empty(*h.shape[:-2], 0) for x, of in each)


_GRADIENT = differentiable(
    operator(
        f"linear_kl_gradient({_ARGUMENTS}, {_PER_ROW}, Tensor g, bool of_reference, bool of_h,"
        " bool of_w) -> (Tensor, Tensor)",
        tiles.over_leads(
            rows.dispatch(_launch_backward, on_cpu.backward),
            _WEIGHTS,
            lambda *args: not args[-1],  # each has a weight's gradient of its own
        ),
        _fake_backward,
    ),
    on_cpu.gradient,
)


def _gradients(of_reference):
    def gradients(args, outputs, upstream, wanted):
        first = 2 * of_reference
        asked = first in wanted, first + 1 in wanted
        return _GRADIENT(*args, *outputs, *upstream, of_reference, *asked)

    return gradients


_DIVERGENCE = differentiable(
    operator(
        f"linear_kl({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})",
        tiles.over_leads(rows.dispatch(_launch_forward, on_cpu.forward), _WEIGHTS),
        lambda h, *_: tuple(h.new_empty(h.shape[:-1], dtype=rows.accumulator(h)) for _ in range(5)),
    ),
    on_cpu.divergence,
    {(0, 1): _gradients(False), (2, 3): _gradients(True)},
    hints=4,
)


def linear_full_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *,
    temperature: float | Tensor = 1.0, softcap: float | None = None, memory: int = 2**28,
) -> Tensor:  # fmt: skip
    """The exact KL divergence from a reference, over the whole vocabulary, of two linear layers.

    KL(π ‖ π_ref) = Σᵥ πᵥ (log πᵥ − log π_ref,ᵥ),   π = softmax(h Wᵀ/τ),   in nats

    `full_kl(hidden @ weight.T, ref_hidden @ ref_weight.T)`, and neither logits are ever held.
    Differentiable in all four, each gradient only if asked. `[*batch, width]` and `[vocab, width]`
    twice, with one vocabulary and one dtype; widths may differ. `memory`, dtypes and errors as
    `linear_token_logprobs`; nothing is kept.
    """
    logits = tiles.checked(hidden, weight, None, memory)
    others = tiles.checked(ref_hidden, ref_weight, None, memory, of="ref_")
    for what, a, b in (
        ("shape", others.shape, logits.shape),
        ("dtype", others.dtype, logits.dtype),
    ):
        if a != b:
            raise (ValueError if what == "shape" else TypeError)(
                f"the {what} of ref_hidden @ ref_weight.T must be that of hidden @ weight.T, "
                f"{tuple(b) if what == 'shape' else b}, got {tuple(a) if what == 'shape' else a}"
            )
    rows.check_logits(logits, softcap)
    scale = rows.per_row(temperature, logits)
    flat = (x.reshape(-1, x.shape[-1]) for x in (hidden, ref_hidden))
    outputs = _DIVERGENCE(
        next(flat), weight, next(flat), ref_weight, None if scale is None else scale.reshape(-1),
        softcap or 0.0, memory,
    )  # fmt: skip
    return outputs[0].view(hidden.shape[:-1])
