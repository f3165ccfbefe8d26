"""The exact KL divergence between two rows of logits, with what their tokens ask of the first.

KL(π ‖ ρ) = Σᵥ πᵥ (log πᵥ − log ρᵥ)
          = Σᵥ (uᵥ − oᵥ) e^{uᵥ} / Σᵥ e^{uᵥ} − log Σᵥ e^{uᵥ} + log Σᵥ e^{oᵥ}

u and o are the logits of π and ρ around centres of their own; the sums leave out the token y, whose
terms come last: s, w as in `statistics.py`, r = Σ_{v≠y} e^{oᵥ}, d = Σ_{v≠y} (uᵥ − oᵥ) e^{uᵥ}.

∂KL/∂z_v = πᵥ (log πᵥ − log ρᵥ − KL),   ∂KL/∂z'_v = ρᵥ − πᵥ
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import cpu, rows
from rlhf_kernels.registration import differentiable, operator
from rlhf_kernels.statistics import (
    LN2,
    LOG2E,
    blocks_of,
    capped,
    finished,
    fold,
    left_over,
    log1p,
    logit_of,
    moved,
    row_of,
    scale_of,
    slope,
    start_at,
)


class Divergence(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


# the kernels


@triton.jit
def _added(z, o, skipped, s, w, d, r, c, cq, t, LANES: tl.constexpr):
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
def _sums(x, x_stride, q, q_stride, vocab, y, chosen, chosen_q, t, CAP: tl.constexpr,
          BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(c, s, w, c', r, d) of a row of each, in one read of both; `statistics.sums` of two."""
    c, cq, t = start_at(chosen), start_at(chosen_q), t * LOG2E
    s, w = tl.zeros([LANES], c.dtype), tl.zeros([LANES], c.dtype)
    r, d = tl.zeros([LANES], c.dtype), tl.zeros([LANES], c.dtype)
    v = tl.arange(0, BLOCK)
    whole, home = blocks_of(0, vocab, y, BLOCK)
    for first in range(0, whole, BLOCK):
        at = (first + v).to(tl.int64)
        z = capped(tl.load(x + at * x_stride).to(c.dtype), CAP)
        o = capped(tl.load(q + at * q_stride).to(c.dtype), CAP)
        s, w, d, r, c, cq = _added(z, o, first == home, s, w, d, r, c, cq, t, LANES)
    for i in range(2):
        at, inside = left_over(i, v, 0, vocab, whole, home, y)
        at = at.to(tl.int64)
        z = capped(tl.load(x + at * x_stride, mask=inside, other=-float("inf")).to(c.dtype), CAP)
        o = capped(tl.load(q + at * q_stride, mask=inside, other=-float("inf")).to(c.dtype), CAP)
        s, w, d, r, c, cq = _added(z, o, False, s, w, d, r, c, cq, t, LANES)
    return c, tl.sum(s), tl.sum(w) * LN2, cq, tl.sum(r), tl.sum(d) * LN2


@triton.jit
def _forward(x, q, y, scale, logp, entropy, kl, centre, total, rest, centre_q, total_q, vocab,
             x_inner, x_outer_stride, x_inner_stride, x_stride, q_inner, q_outer_stride,
             q_inner_stride, q_stride, scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr,
             ACC: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    x = row_of(x, row, x_inner, x_outer_stride, x_inner_stride)
    q = row_of(q, row, q_inner, q_outer_stride, q_inner_stride)
    token, t = tl.load(y + row).to(tl.int64), scale_of(scale, row, scale_stride, SCALED, ACC)
    chosen = logit_of(x, token, x_stride, vocab, CAP, ACC)
    chosen_q = logit_of(q, token, q_stride, vocab, CAP, ACC)
    c, s, w, cq, r, d = _sums(
        x, x_stride, q, q_stride, vocab, token, chosen, chosen_q, t, CAP, BLOCK, LANES
    )
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
    options |= rows.plan(number, x.shape[-1]).options
    if number:
        _forward[number,](x, q, y, scale, *outputs, x.shape[-1], *strides, **options)
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
    cpu.divergence,
    {
        0: _gradient("kl_gradient", False, cpu.divergence_backward, cpu.divergence_gradient),
        1: _gradient("kl_ref_gradient", True, cpu.reference_backward, cpu.reference_gradient),
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
