"""Log-probabilities and entropies of rows of logits, in one read of them.

log π(y) and H are read off the sums of `statistics.py`, which need one pass.
∂ log π(y) / ∂z_v = [v = y] − π_v,   ∂H / ∂z_v = −π_v (log π_v + H)

Forward reads the logits once; backward reads them once and writes the gradient once.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from rlhf_kernels import cpu, formulas, rows
from rlhf_kernels.registration import differentiable, operator
from rlhf_kernels.statistics import (
    capped,
    finished,
    logit_of,
    row_of,
    scale_of,
    slope,
    sums,
)


class Statistics(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


# the kernels


@triton.jit
def _store(row, logp, entropy, centre, total, rest, a, h, c, z, q):
    tl.store(logp + row, a)
    tl.store(entropy + row, h)
    tl.store(centre + row, c)
    tl.store(total + row, z)
    tl.store(rest + row, q)


@triton.jit
def _forward(x, y, scale, partial, logp, entropy, centre, total, rest, vocab, slab, inner,
             outer_stride, inner_stride, stride, scale_stride, CAP: tl.constexpr,
             SCALED: tl.constexpr, ACC: tl.constexpr, ENTROPY: tl.constexpr, SLABS: tl.constexpr,
             BLOCK: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One program per slab of a row: the whole row, or what `_merge` adds up from `partial`."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = row_of(x, row, inner, outer_stride, inner_stride)
    token, t = tl.load(y + row).to(tl.int64), scale_of(scale, row, scale_stride, SCALED, ACC)
    chosen = logit_of(x, token, stride, vocab, CAP, ACC)
    start, stop = part * slab, tl.minimum(part * slab + slab, vocab)
    c, s, w = sums(x, stride, start, stop, token, chosen, t, CAP, ENTROPY, BLOCK, LANES)
    if SLABS == 1:
        a, h, z, q = finished(c, s, w, chosen, t)
        _store(row, logp, entropy, centre, total, rest, a, h, c, z, q)
    else:
        partial += (row * SLABS + part) * 5
        tl.store(partial, c)
        tl.store(partial + 1, s)
        tl.store(partial + 2, w)
        tl.store(partial + 3, chosen)
        tl.store(partial + 4, t)


@triton.jit
def _merge(partial, logp, entropy, centre, total, rest, slabs, SLABS: tl.constexpr):
    """The slabs of a row, moved to one centre and added in their order."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SLABS)
    partial += row * slabs * 5
    chosen, t = tl.load(partial + 3), tl.load(partial + 4)
    centres = tl.load(partial + i * 5, mask=i < slabs, other=-float("inf"))
    s = tl.load(partial + i * 5 + 1, mask=i < slabs, other=0.0)
    w = tl.load(partial + i * 5 + 2, mask=i < slabs, other=0.0)
    c = tl.max(centres)
    move = tl.where(s == 0, 0.0, (centres - c) * t)
    w = (w + move * s) * tl.exp(move)
    s = s * tl.exp(move)
    a, h, z, q = finished(c, tl.sum(s), tl.sum(w), chosen, t)
    _store(row, logp, entropy, centre, total, rest, a, h, c, z, q)


@triton.jit
def _backward(x, y, scale, entropy, centre, total, rest, g, gh, dx, vocab, blocks, inner,
              outer_stride, inner_stride, stride, scale_stride, CAP: tl.constexpr,
              SCALED: tl.constexpr, ACC: tl.constexpr, ENTROPY: tl.constexpr,
              OVERWRITE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program per block of a row; a row without an upstream gradient is not read."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    v = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = row_of(x, row, inner, outer_stride, inner_stride) + v.to(tl.int64) * stride
    if OVERWRITE:
        dx = at
    else:
        dx += row * vocab + v
    g, gh = tl.load(g + row), tl.load(gh + row)
    if (g == 0) & (gh == 0):
        tl.store(dx, tl.zeros([BLOCK], dx.dtype.element_ty), mask=v < vocab)
    else:
        token, t = tl.load(y + row).to(tl.int64), scale_of(scale, row, scale_stride, SCALED, ACC)
        loaded = tl.load(at, mask=v < vocab, other=-float("inf")).to(ACC)
        logp = (capped(loaded, CAP) - tl.load(centre + row)) * t - tl.load(total + row)
        p = tl.exp(logp)
        dz = tl.where(v == token, g * tl.load(rest + row), -g * p)
        if ENTROPY:
            dz -= tl.where(p > 0, gh * p * (logp + tl.load(entropy + row)), 0.0)
        tl.store(dx, dz * t * slope(loaded, CAP), mask=v < vocab)


# the launches


def _launch_forward(x, y, scale, softcap, entropy, inplace):
    outputs = [y.new_empty(y.shape, dtype=rows.accumulator(x)) for _ in range(5)]
    x, y, scale, number, strides, options = rows.arguments(x, y, scale, softcap)
    plan = rows.plan(number, x.shape[-1])
    several = plan.slabs > 1
    partial = outputs[0].new_empty(number, plan.slabs, 5) if several else outputs[0]
    options |= {"ENTROPY": entropy, "SLABS": plan.slabs, **plan.options}
    if number:
        _forward[number, plan.slabs](
            x, y, scale, partial, *outputs, x.shape[-1], plan.slab, *strides, **options
        )
    if number and several:
        slabs = triton.next_power_of_2(plan.slabs)
        _merge[number,](partial, *outputs, plan.slabs, SLABS=slabs, num_warps=1)
    return tuple(outputs)


def _launch_backward(x, y, scale, softcap, entropy, *per_row, overwrite=False):
    dx = x if overwrite else x.new_empty(x.shape)
    x, y, scale, number, strides, options = rows.arguments(x, y, scale, softcap)
    per_row = (each.contiguous() for each in per_row)
    vocab, plan = x.shape[-1], rows.plan(number, x.shape[-1])
    options |= {"ENTROPY": entropy, "OVERWRITE": overwrite}
    options |= {"BLOCK": plan.block, "num_warps": plan.warps}
    blocks = triton.cdiv(vocab, plan.block)
    if number:
        _backward[number * blocks,](x, y, scale, *per_row, dx, vocab, blocks, *strides, **options)
    return dx


# the operators

_ARGUMENTS = "Tensor x, Tensor y, Tensor? scale, float softcap, bool entropy"

_GRADIENT = differentiable(
    operator(
        f"logprobs_gradient({_ARGUMENTS}, Tensor h, Tensor centre, Tensor total, Tensor rest,"
        " Tensor g, Tensor gh) -> Tensor",
        rows.dispatch(_launch_backward, cpu.logprobs_backward),
        lambda x, *_: x.new_empty(x.shape),
    ),
    formulas.logprobs_gradient,
)

_OVERWRITE = rows.dispatch(partial(_launch_backward, overwrite=True), cpu.logprobs_overwrite)


def _gradient(args, out, upstream):
    *args, inplace = args
    if inplace and rows.disposable(args[0], *upstream):
        increment_version(args[0])  # whoever else saved the logits for a backward pass is told
        return _OVERWRITE(*args, *out[1:], *upstream)
    return _GRADIENT(*args, *out[1:], *upstream)


_STATISTICS = differentiable(
    operator(
        f"logprobs({_ARGUMENTS}, bool inplace) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        rows.dispatch(_launch_forward, cpu.logprobs_forward),
        lambda x, y, *_: tuple(y.new_empty(y.shape, dtype=rows.accumulator(x)) for _ in range(5)),
    ),
    formulas.logprobs,
    {0: _gradient},
    hints=3,
)


def _statistics(logits, tokens, temperature, softcap, entropy, inplace=False):
    rows.check(logits, tokens, softcap)
    scale = rows.per_row(temperature, logits)
    return _STATISTICS(logits, tokens, scale, softcap or 0.0, entropy, inplace)


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float | Tensor = 1.0,
    softcap: float | None = None, inplace: bool = False,
) -> Tensor:  # fmt: skip
    """The log-probability of each token under its own row of logits, in nats.

    log π(y) = z_y − log Σᵥ exp zᵥ,   z = x/τ, or c tanh(x/c)/τ with a softcap c

    `rlhf_fn.token_logprobs`, at one read of the logits, and one read and one write in the backward
    pass. Any strides. Sums, and the result, are float32 for half precision and float64 for float64;
    log π is right to about 1e-6 of itself even where π → 1. A row of which no token carries an
    upstream gradient is not read backward. Forward-mode and second derivatives are those of the
    plain formula, at its memory.

    Args:
        logits: `[*batch, vocab]`; −∞ bans a token.
        tokens: `[*batch]`, int64 or int32.
        temperature: τ, one number or one per row, `[*batch, 1]`. A tensor does not recompile.
        softcap: c, of models that cap their logits (Gemma 2: https://arxiv.org/abs/2408.00118).
        inplace: the gradient may take the place of the logits, which spares as much memory again.
            Whatever else needs the logits after that raises in its own backward pass. It does so
            in eager `backward()` of logits that a model made; a leaf, `torch.func`, a compiled
            graph and second derivatives keep the logits.

    Raises: TypeError, ValueError as `rows.check` and `rows.per_row`, before any launch. On a GPU a
    token outside of the vocabulary makes its row NaN instead: looking would be a synchronisation.
    """
    return _statistics(logits, tokens, temperature, softcap, False, inplace)[0]


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, *, temperature: float | Tensor = 1.0,
    softcap: float | None = None, inplace: bool = False,
) -> Statistics:  # fmt: skip
    """`token_logprobs` and `entropy` in the same pass, with the gradients of both."""
    return Statistics(*_statistics(logits, tokens, temperature, softcap, True, inplace)[:2])


def entropy(
    logits: Tensor, *, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> Tensor:
    """The entropy of each row of logits, in nats: H = −Σᵥ πᵥ log πᵥ,   0 log 0 = 0.

    `rlhf_fn.entropy`; arguments and errors as `token_logprobs`.
    """
    centre = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _statistics(logits, centre, temperature, softcap, True)[1]
