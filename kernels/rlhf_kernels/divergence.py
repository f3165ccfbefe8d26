"""The exact KL divergence between two rows of logits, with what their tokens ask of the first.

KL(π ‖ ρ) = Σᵥ πᵥ (log πᵥ − log ρᵥ)
          = Σᵥ (uᵥ − oᵥ) e^{uᵥ} / Σᵥ e^{uᵥ} − log Σᵥ e^{uᵥ} + log Σᵥ e^{oᵥ}

u and o are the logits of π and ρ around centres of their own; `statistics.py` has the sums, which
leave out the token y: its terms come last.

∂KL/∂z_v = πᵥ (log πᵥ − log ρᵥ − KL),   ∂KL/∂z'_v = ρᵥ − πᵥ
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import cpu, formulas, rows
from rlhf_kernels.registration import differentiable, operator
from rlhf_kernels.statistics import (
    capped,
    finished,
    log1p,
    logit_of,
    row_of,
    scale_of,
    slope,
    sums_of_both,
)


class Divergence(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


# the kernels


@triton.jit
def _store(row, logp, entropy, kl, centre, total, rest, centre_q, total_q, c, s, w, cq, r, d,
           chosen, chosen_q, t):  # fmt: skip
    """What the sums of a row come to, with the token's own terms."""
    a, h, z, p = finished(c, s, w, chosen, t)
    own, own_q = (chosen - c) * t, (chosen_q - cq) * t
    one, total_r = tl.exp(own), r + tl.exp(own_q)
    zq = tl.where(cq == chosen_q, log1p(r), tl.log(total_r))
    difference = (d + tl.where(one > 0, one * (own - own_q), 0.0)) / (s + one)
    tl.store(logp + row, a)
    tl.store(entropy + row, h)
    tl.store(kl + row, difference - z + zq)
    tl.store(centre + row, c)
    tl.store(total + row, z)
    tl.store(rest + row, p)
    tl.store(centre_q + row, cq)
    tl.store(total_q + row, zq)


@triton.jit
def _forward(x, q, y, scale, partial, logp, entropy, kl, centre, total, rest, centre_q, total_q,
             vocab, slab, x_inner, x_outer_stride, x_inner_stride, x_stride, q_inner,
             q_outer_stride, q_inner_stride, q_stride, scale_stride, CAP: tl.constexpr,
             SCALED: tl.constexpr, ACC: tl.constexpr, SLABS: tl.constexpr, BLOCK: tl.constexpr,
             LANES: tl.constexpr):  # fmt: skip
    """One program per slab of a row: the whole row, or what `_merge` adds up from `partial`."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = row_of(x, row, x_inner, x_outer_stride, x_inner_stride)
    q = row_of(q, row, q_inner, q_outer_stride, q_inner_stride)
    token, t = tl.load(y + row).to(tl.int64), scale_of(scale, row, scale_stride, SCALED, ACC)
    chosen = logit_of(x, token, x_stride, vocab, CAP, ACC)
    chosen_q = logit_of(q, token, q_stride, vocab, CAP, ACC)
    start, stop = part * slab, tl.minimum(part * slab + slab, vocab)
    c, s, w, cq, r, d = sums_of_both(
        x, x_stride, q, q_stride, start, stop, token, chosen, chosen_q, t, CAP, BLOCK, LANES
    )
    if SLABS == 1:
        _store(row, logp, entropy, kl, centre, total, rest, centre_q, total_q, c, s, w, cq, r, d,
               chosen, chosen_q, t)  # fmt: skip
    else:
        partial += (row * SLABS + part) * 9
        tl.store(partial, c)
        tl.store(partial + 1, s)
        tl.store(partial + 2, w)
        tl.store(partial + 3, cq)
        tl.store(partial + 4, r)
        tl.store(partial + 5, d)
        tl.store(partial + 6, chosen)
        tl.store(partial + 7, chosen_q)
        tl.store(partial + 8, t)


@triton.jit
def _merge(partial, logp, entropy, kl, centre, total, rest, centre_q, total_q, slabs,
           SLABS: tl.constexpr):  # fmt: skip
    """The slabs of a row, moved to common centres and added in their order."""
    row = tl.program_id(0).to(tl.int64)
    partial += row * slabs * 9
    i = tl.arange(0, SLABS)
    at, inside = partial + i * 9, i < slabs
    chosen, chosen_q, t = tl.load(partial + 6), tl.load(partial + 7), tl.load(partial + 8)
    centres = tl.load(at, mask=inside, other=-float("inf"))
    centres_q = tl.load(at + 3, mask=inside, other=-float("inf"))
    s = tl.load(at + 1, mask=inside, other=0.0)
    w = tl.load(at + 2, mask=inside, other=0.0)
    r = tl.load(at + 4, mask=inside, other=0.0)
    d = tl.load(at + 5, mask=inside, other=0.0)
    c, cq = tl.max(centres), tl.max(centres_q)
    move = tl.where(s > 0, (centres - c) * t, 0.0)
    move_q = tl.where(inside, (centres_q - cq) * t, 0.0)
    w = (w + move * s) * tl.exp(move)
    d = tl.where(s > 0, (d + (move - move_q) * s) * tl.exp(move), 0.0)
    s, r = s * tl.exp(move), r * tl.exp(move_q)
    _store(row, logp, entropy, kl, centre, total, rest, centre_q, total_q, c, tl.sum(s), tl.sum(w),
           cq, tl.sum(r), tl.sum(d), chosen, chosen_q, t)  # fmt: skip


@triton.jit
def _backward(x, q, y, scale, entropy, kl, centre, total, rest, centre_q, total_q, g, gh, gk, out,
              vocab, blocks, x_inner, x_outer_stride, x_inner_stride, x_stride, q_inner,
              q_outer_stride, q_inner_stride, q_stride, scale_stride, CAP: tl.constexpr,
              SCALED: tl.constexpr, ACC: tl.constexpr, OF_REFERENCE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """One program per block of a row; a row without an upstream gradient is not read."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at, inside = v.to(tl.int64), v < vocab
    out += row * vocab + v
    g, gh, gk = tl.load(g + row), tl.load(gh + row), tl.load(gk + row)
    if (g == 0) & (gh == 0) & (gk == 0):
        tl.store(out, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)
    else:
        at_x = row_of(x, row, x_inner, x_outer_stride, x_inner_stride) + at * x_stride
        at_q = row_of(q, row, q_inner, q_outer_stride, q_inner_stride) + at * q_stride
        token, t = tl.load(y + row).to(tl.int64), scale_of(scale, row, scale_stride, SCALED, ACC)
        a = tl.load(at_x, mask=inside, other=-float("inf")).to(ACC)
        b = tl.load(at_q, mask=inside, other=-float("inf")).to(ACC)
        logp = (capped(a, CAP) - tl.load(centre + row)) * t - tl.load(total + row)
        logq = (capped(b, CAP) - tl.load(centre_q + row)) * t - tl.load(total_q + row)
        p = tl.exp(logp)
        if OF_REFERENCE:
            dz = gk * (tl.exp(logq) - p) * slope(b, CAP)
        else:
            dz = tl.where(v == token, g * tl.load(rest + row), -g * p)
            dz -= tl.where(p > 0, gh * p * (logp + tl.load(entropy + row)), 0.0)
            dz += tl.where(p > 0, gk * p * (logp - logq - tl.load(kl + row)), 0.0)
            dz *= slope(a, CAP)
        tl.store(out, dz * t, mask=inside)


# the launches


def _arguments(x, q, y, scale, softcap):
    """(x, q, y, scale, number of rows, strides, options) as the kernels take them."""
    q, at = rows.layout(q)
    x, y, scale, number, strides, options = rows.arguments(x, y, scale, softcap)
    walk = at.inner, at.outer_stride, at.inner_stride, at.vocab_stride
    return x, q, y, scale, number, (*strides[:4], *walk, strides[4]), options


def _launch_forward(x, q, y, scale, softcap):
    outputs = [y.new_empty(y.shape, dtype=rows.accumulator(x)) for _ in range(8)]
    x, q, y, scale, number, strides, options = _arguments(x, q, y, scale, softcap)
    plan = rows.plan(number, x.shape[-1])
    several = plan.slabs > 1
    partial = outputs[0].new_empty(number, plan.slabs, 9) if several else outputs[0]
    options |= {"SLABS": plan.slabs, **plan.options}
    if number:
        _forward[number, plan.slabs](
            x, q, y, scale, partial, *outputs, x.shape[-1], plan.slab, *strides, **options
        )
    if number and several:
        slabs = triton.next_power_of_2(plan.slabs)
        _merge[number,](partial, *outputs, plan.slabs, SLABS=slabs, num_warps=1)
    return tuple(outputs)


def _launch_backward(of_reference):
    def launch(x, q, y, scale, softcap, *per_row):
        out = (q if of_reference else x).new_empty(x.shape)
        x, q, y, scale, number, strides, options = _arguments(x, q, y, scale, softcap)
        per_row = [each.contiguous() for each in per_row]
        plan = rows.plan(number, x.shape[-1])
        options |= {"BLOCK": plan.block, "num_warps": plan.warps, "OF_REFERENCE": of_reference}
        blocks = triton.cdiv(x.shape[-1], plan.block)
        if number:
            _backward[number * blocks,](
                x, q, y, scale, *per_row, out, x.shape[-1], blocks, *strides, **options
            )
        return out

    return launch


# the operators

_ARGUMENTS = "Tensor x, Tensor q, Tensor y, Tensor? scale, float softcap"
_PER_ROW = "h kl centre total rest centre_q total_q g gh gk"


def _gradient(name, of_reference, on_cpu, reference):
    more = ", ".join(f"Tensor {each}" for each in _PER_ROW.split())
    op = operator(
        f"{name}({_ARGUMENTS}, {more}) -> Tensor",
        rows.dispatch(_launch_backward(of_reference), on_cpu),
        lambda x, q, *_: (q if of_reference else x).new_empty(x.shape),
    )
    differentiable(op, reference)
    return lambda args, out, upstream: op(*args, *out[1:], *upstream)


_DIVERGENCE = differentiable(
    operator(
        f"kl({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
        rows.dispatch(_launch_forward, cpu.divergence_forward),
        lambda x, q, y, *_: tuple(
            y.new_empty(y.shape, dtype=rows.accumulator(x)) for _ in range(8)
        ),
    ),
    formulas.divergence,
    {
        0: _gradient("kl_gradient", False, cpu.divergence_backward, formulas.divergence_gradient),
        1: _gradient("kl_ref_gradient", True, cpu.reference_backward, formulas.reference_gradient),
    },
    hints=5,
)


def token_logprobs_and_kl(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, *, temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Divergence:  # fmt: skip
    """The tokens' log-probs and the entropy under `logits`, and KL(π ‖ π_ref), in one pass of both.

    KL = Σᵥ πᵥ (log πᵥ − log π_ref,ᵥ), over the whole vocabulary, in nats; 0 (log 0 − x) = 0

    Differentiable in all three, in `logits` and in `ref_logits`; a gradient is computed only where
    it is asked for. Both are divided by `temperature`. Arguments, dtypes and errors as
    `token_logprobs`; `ref_logits` have the shape of `logits`, and their own dtype and strides.
    """
    rows.check(logits, tokens, softcap, ref_logits=ref_logits)
    scale = rows.per_row(temperature, logits)
    return Divergence(*_DIVERGENCE(logits, ref_logits, tokens, scale, softcap or 0.0)[:3])


def full_kl(
    logits: Tensor, ref_logits: Tensor, *, temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The exact KL divergence from the reference, over the whole vocabulary, in nats.

    KL(π ‖ π_ref) = Σᵥ πᵥ (log πᵥ − log π_ref,ᵥ),   0 (log 0 − x) = 0

    `rlhf_fn.full_kl`, at one read of both; arguments and errors as `token_logprobs_and_kl`.
    """
    centre = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs_and_kl(
        logits, ref_logits, centre, temperature=temperature, softcap=softcap
    ).kl
