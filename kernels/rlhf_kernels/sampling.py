"""Tokens drawn from rows of logits, and the likeliest ones, with their log-probabilities.

y = the first token with Σ_{v≤y} p_v > u,   p = softmax(z) on the support,   u of the row's key

One kernel sums each block of a row, float64, around the block's own maximum; another, one program
per row, finds the block that holds u Σ p and walks that one: one read of the row and a block. The
blocks do not depend on how many rows there are, so neither does what is drawn, to the bit. Top-k
and top-p find their support first (`support.py`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import cpu_sampling, rows
from rlhf_kernels.registration import operator
from rlhf_kernels.statistics import logit_of, row_of, scale_of
from rlhf_kernels.support import loaded, support, weight
from rlhf_kernels.threefry import unit


class Sample(NamedTuple):
    tokens: Tensor
    logprobs: Tensor


# the kernels


@triton.jit
def _kept(x, v, stride, vocab, cut, last, CAP: tl.constexpr, CUT: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """z_v on the support, −∞ elsewhere; NaN stays, and makes its row NaN."""
    z = loaded(x, v, stride, vocab, CAP, ACC)
    if CUT:
        c = tl.load(cut)
        z = tl.where((z < c) | ((z == c) & (v > tl.load(last))), -float("inf"), z)
    return z


@triton.jit
def _block_sums(x, scale, cut, last, partial, vocab, inner, outer_stride, inner_stride, stride,
                scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
                CUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(max z, Σ e^{(z − max z)/τ}) of each block of each row: `partial` is [rows, blocks, 2]."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = row_of(x, row, inner, outer_stride, inner_stride)
    t = scale_of(scale, row, scale_stride, SCALED, ACC)
    v = block * BLOCK + tl.arange(0, BLOCK)
    z = _kept(x, v, stride, vocab, cut + row, last + row, CAP, CUT, ACC)
    top = tl.max(z)
    partial += (row * tl.num_programs(1) + block) * 2
    tl.store(partial, top.to(tl.float64))
    tl.store(partial + 1, tl.sum(weight(z, top, t).to(tl.float64)))


@triton.jit
def _draw(x, keys, scale, cut, last, partial, tokens, logp, vocab, blocks, inner, outer_stride,
          inner_stride, stride, scale_stride, CAP: tl.constexpr, SCALED: tl.constexpr,
          ACC: tl.constexpr, CUT: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    """One program per row: which block, then which of its tokens."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    x = row_of(x, row, inner, outer_stride, inner_stride)
    t = scale_of(scale, row, scale_stride, SCALED, ACC)
    partial += (row * blocks + i) * 2
    tops = tl.load(partial, mask=i < blocks, other=-float("inf"))
    top = tl.max(tops)
    move = tl.exp((tops - top) * t.to(tl.float64))
    p = move * tl.load(partial + 1, mask=i < blocks, other=0.0)
    total = tl.sum(p)
    if GREEDY:
        block = tl.min(tl.where(tops == top, i, blocks))
    else:
        # rounding, and a scan in a tree, may leave a sum at the goal: then the last possible one
        goal, last_block = unit(keys + row * 2) * total, tl.max(tl.where(p > 0, i, 0))
        block = tl.min(tl.where((tl.cumsum(p, 0) > goal) & (p > 0), i, last_block))
    block = tl.minimum(block, blocks - 1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    z = _kept(x, v, stride, vocab, cut + row, last + row, CAP, CUT, ACC)
    if GREEDY:
        token = tl.min(tl.where(z == top, v, vocab))
    else:
        e = weight(z, tl.sum(tl.where(i == block, tops, 0.0)).to(ACC), t).to(tl.float64)
        below = tl.sum(tl.where(i < block, p, 0.0))
        upto = below + tl.cumsum(e, 0) * tl.sum(tl.where(i == block, move, 0.0))
        token = tl.min(tl.where((upto > goal) & (e > 0), v, tl.max(tl.where(e > 0, v, 0))))
    token = tl.where(total == total, token, 0).to(tl.int64)
    own = (logit_of(x, token, stride, vocab, CAP, ACC) - top.to(ACC)) * t
    tl.store(tokens + row, token)
    tl.store(logp + row, own.to(tl.float64) - tl.log(total))


# the launches


def _launch_support(x, scales, number, strides, options, top_k, top_p):
    """(cut, last) of each row for the other kernels."""
    cut = x.new_empty(number, dtype=rows.accumulator(x))
    last = x.new_empty(number, dtype=torch.int32)
    p = torch.full((), top_p, dtype=torch.float64, device=x.device)  # an argument would be float32
    support[number,](
        x, scales, p, cut, last, x.shape[-1], top_k, *strides, **options,
        TOP_K=top_k > 0, TOP_P=top_p < 1,
    )  # fmt: skip
    return cut, last


def _launch_sample(x, keys, scale, softcap, top_k, top_p):
    return _launch(x, keys, scale, softcap, top_k if top_k < x.shape[-1] else 0, top_p, False)


def _launch_greedy(x, scale, softcap):
    return _launch(x, x, scale, softcap, 0, 1.0, True)


def _launch(x, keys, scale, softcap, top_k, top_p, greedy):
    batch, vocab = x.shape[:-1], x.shape[-1]
    tokens = x.new_empty(batch, dtype=torch.int64)
    logp = x.new_empty(batch, dtype=rows.accumulator(x))
    x, keys, scales, number, strides, options = rows.arguments(x, keys, scale, softcap)
    plan = rows.plan(number, vocab)
    options |= {"BLOCK": plan.block, "num_warps": plan.warps}
    if number:
        blocks, cuts = -(-vocab // plan.block), top_k > 0 or top_p < 1
        partial = x.new_empty(number, blocks, 2, dtype=torch.float64)
        limits = (partial, partial)
        if cuts:
            limits = _launch_support(x, scales, number, strides, options, top_k, top_p)
        options["CUT"] = cuts
        _block_sums[number, blocks](x, scales, *limits, partial, vocab, *strides, **options)
        _draw[number,](
            x, keys, scales, *limits, partial, tokens, logp, vocab, blocks, *strides, **options,
            GREEDY=greedy, BLOCKS=triton.next_power_of_2(blocks),
        )  # fmt: skip
    return tokens, logp


# the operators


def _fake(x, *_):
    tokens = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return tokens, x.new_empty(x.shape[:-1], dtype=rows.accumulator(x))


_SAMPLE = operator(
    "sample(Tensor x, Tensor keys, Tensor? scale, float softcap, int top_k, float top_p)"
    " -> (Tensor, Tensor)",
    rows.dispatch(_launch_sample, cpu_sampling.sample),
    _fake,
)

_GREEDY = operator(
    "greedy(Tensor x, Tensor? scale, float softcap) -> (Tensor, Tensor)",
    rows.dispatch(_launch_greedy, cpu_sampling.greedy),
    _fake,
)


def sample(
    logits: Tensor, keys: Tensor, *, temperature: float | Tensor, top_k: int | None = None,
    top_p: float | None = None, softcap: float | None = None,
) -> Sample:  # fmt: skip
    """One token of each row, drawn by inversion, and its log-probability where it was drawn.

    y = min {v: Σ_{w≤v} p_w > u},   p = softmax(z) on S,   z = x/τ, or c tanh(x/c)/τ

    `rlhf_fn.categorical_sample(sampling_logits(logits, ...), keys)`: the same tokens, unless u
    falls within rounding (some 10⁻⁷) of a boundary. Inversion takes one random number and no
    logarithm per row, where Gumbel noise takes both for each of the vocabulary; the sums are
    float64. What a row draws is a function of its logits and its key, not of its batch.

    S is the `top_k` likeliest tokens, and of these the fewest that hold `top_p` of their
    probability; of tokens that are equally likely at its edge, the ones of lowest index, where
    floor 0's top-k, `torch.topk`, keeps any. log p is float32 from half precision, and normalised
    over S. Neither output is differentiable: a trainer's log-probs are `token_logprobs` of its own
    logits.

    A row that holds NaN, or +∞ and no softcap, or nothing but −∞, has no distribution: token 0,
    log-prob NaN.

    Args:
        logits: `[*batch, vocab]`, any strides; −∞ bans a token.
        keys: `[*batch, 2]` int64, a key per row, as `rlhf_fn.random.split` makes them.
        temperature: τ, one number or one per row, `[*batch, 1]`. A tensor does not recompile.
        softcap: c, of models that cap their logits (Gemma 2: https://arxiv.org/abs/2408.00118).

    Raises, before any launch:
        TypeError: a dtype that cannot be what was meant, or `top_k` is not an int.
        ValueError: τ ≤ 0, `top_k` < 1, `top_p` outside of (0, 1], softcap ≤ 0, keys of another
            shape or device, an empty vocabulary.
    """
    rows.check_logits(logits, softcap)
    _check_keys(logits, keys)
    _check_support(top_k, top_p)
    scale = _constant(rows.per_row(temperature, logits))
    k, p = top_k or 0, 1.0 if top_p is None else float(top_p)
    return Sample(*_SAMPLE(logits.detach(), keys, scale, softcap or 0.0, k, p))


def greedy(
    logits: Tensor, *, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> Sample:
    """The likeliest token of each row, the first of equals, and its log-probability, in one read.

    y = argmax z,   log p(y) = −log Σ_v e^{z_v − z_y},   z = x/τ, or c tanh(x/c)/τ

    Arguments, errors and rows without a distribution as `sample`; not differentiable.
    """
    rows.check_logits(logits, softcap)
    scale = _constant(rows.per_row(temperature, logits))
    return Sample(*_GREEDY(logits.detach(), scale, softcap or 0.0))


def _constant(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach()


def _check_keys(logits: Tensor, keys: Tensor) -> None:
    if keys.dtype != torch.int64:
        raise TypeError(f"keys must be int64, got {keys.dtype}; make them with random.split")
    if keys.shape != (*logits.shape[:-1], 2):
        raise ValueError(
            f"keys must be one per row, {(*logits.shape[:-1], 2)}, got {tuple(keys.shape)}; make "
            "them with random.split"
        )
    if keys.device != logits.device:
        raise ValueError(
            f"keys must be on the device of logits, {logits.device}, got {keys.device}; move them "
            "with .to(logits.device)"
        )


def _check_support(top_k: int | None, top_p: float | None) -> None:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"top_k must be an int, got {top_k!r} of type {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number in (0, 1], got {top_p}; None keeps every token")
