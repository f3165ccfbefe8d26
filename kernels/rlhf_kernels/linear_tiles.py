"""Tiles of x = h Wᵀ + b that are never written: what kernels over a projection share.

A product of [tokens, width] with [vocab, width] takes 2·N·D·V FLOPs. The least is one of them
forward and two backward (6·N·D·V) if what backward needs of the logits is kept, and one more
(8·N·D·V) if it is computed again. Bytes do not count: reading W once takes as long as the product
at about 190 tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlhf_kernels import rows

LEAST = 256  # tokens of the vocabulary that are taken at a time, or all if they are fewer
PROCESSORS = 132  # of a Hopper GPU
CACHED = 2**24  # bytes of h that stay in its L2 cache while W goes by


# in the kernels


@triton.jit
def placed(program, blocks, slabs, group):
    """(block of rows, slab of the vocabulary): programs at work at once share few of both."""
    first = program // (group * slabs) * group
    width = tl.minimum(blocks - first, group)
    within = program % (group * slabs)
    return first + within % width, within // width


@triton.jit
def tile(h, w, b, row, token, vocab, width, BIAS: tl.constexpr, ACC: tl.constexpr,
         PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """x of the block of rows from `row` and of tokens from `token`; −∞ beyond the vocabulary."""
    BM: tl.constexpr = h.block_shape[0]
    BN: tl.constexpr = w.block_shape[0]
    x = tl.zeros([BM, BN], ACC)
    for k in range(0, width, h.block_shape[1]):
        left, right = h.load([row, k]), w.load([token, k])  # 0 beyond the edges
        if UPCAST:  # the interpreter multiplies the bits of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        x = tl.dot(left, right.T, x, input_precision=PRECISION, out_dtype=ACC)
    rn = token + tl.arange(0, BN)
    if BIAS:
        x += tl.load(b + rn, mask=rn < vocab, other=0.0).to(ACC)[None, :]
    if token + BN > vocab:
        x = tl.where((rn < vocab)[None, :], x, -float("inf"))
    return x


@triton.jit
def has(y, token, BN: tl.constexpr):
    """Whether some of the tokens y are among the BN from `token`: in one tile of five."""
    return tl.max(((y >= token) & (y < token + BN)).to(tl.int32), 0) > 0


@triton.jit
def recentred(z, top, c, s, w, t, MARGIN: tl.constexpr):
    """(c, s, w) where a row's centre moves to its `top`, if that is more than 2^MARGIN above."""
    higher = tl.where((top - c) * t > MARGIN, top, c)
    step = (c - higher) * t
    w = tl.where(s > 0, (w + step * s) * tl.exp2(step), 0.0)
    return higher, s * tl.exp2(step), w


# the launches


class Plan(NamedTuple):
    """A tile: `rows` of h and `tokens` of the vocabulary, `width` numbers of each at a time."""

    rows: int
    tokens: int
    width: int
    warps: int
    stages: int

    def of(self, h: Tensor, w: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        """h and W, to be read in blocks."""
        return (
            TensorDescriptor.from_tensor(h, [self.rows, self.width]),
            TensorDescriptor.from_tensor(w, [self.tokens, self.width]),
        )

    def on(self, x: Tensor) -> TensorDescriptor:
        """Something of [rows, vocab], to be written in tiles."""
        return TensorDescriptor.from_tensor(x, [self.rows, self.tokens])

    @property
    def options(self) -> dict[str, int]:
        """Of a kernel over such tiles."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def plan(number: int, dtype: torch.dtype, lean: bool) -> Plan:
    """The largest tile whose sums, in float32, stay in registers beside what is made of them.

    That is `lean` if it is little. Only half precision is multiplied by tensor cores.
    """
    if dtype.itemsize > 2:
        return Plan(64, 32, 16, 4, 2)
    if number <= 64:
        return Plan(64, 128, 64, 4, 4)
    return Plan(128, 256 if lean else 128, 64, 8, 3)


def slabs(blocks: int, tiles: int) -> int:
    """Into how many the vocabulary is cut, so that all multiprocessors are done together."""

    def rounds(n: int) -> int:
        return -(-blocks * n // PROCESSORS) * -(-tiles // n)

    return min(range(1, min(tiles, 64) + 1), key=rounds)


def group(p: Plan, h: Tensor) -> int:
    """Blocks of rows that are walked together."""
    return max(CACHED // (p.rows * h.shape[1] * h.itemsize), 1)


def operand(x: Tensor) -> Tensor:
    """`x` if hardware can read blocks of it, in lines of 16 bytes; else a copy."""
    aligned = x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
    if aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    return padded(x.new_empty, *x.shape).copy_(x)


def padded(empty: Callable[..., Tensor], number: int, width: int) -> Tensor:
    """[number, width], each row at a multiple of 16 bytes."""
    return empty(number, -(-width // 16) * 16)[:, :width]


def options(
    h: Tensor, b: Tensor | None, scale: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """(bias, scale, its stride, options) as kernels take them."""
    flags = {
        "CAP": softcap, "SCALED": scale is not None, "BIAS": b is not None,
        "ACC": tl.float64 if h.dtype == torch.float64 else tl.float32,
        "PRECISION": "ieee" if h.itemsize == 4 else "tf32",  # of float32 alone: 23 bits, not 10
        "UPCAST": rows.interpreted() and h.itemsize < 4,
    }  # fmt: skip
    scale = h if scale is None else scale
    return h if b is None else b.contiguous(), scale, scale.stride(0), flags


def chunks(vocab: int, most: int, step: int = 1) -> Iterator[slice]:
    """The vocabulary in equal parts of at most `most` tokens, a multiple of `step` but the last."""
    count = -(-vocab // max(most // step * step, step))
    size = -(-vocab // (count * step)) * step
    return (slice(first, min(first + size, vocab)) for first in range(0, vocab, size))


def gradients(
    h: Tensor, w: Tensor, b: Tensor | None, parts: Iterable[tuple[slice, Tensor]],
    wanted: Sequence[bool], factor: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(f dx W, (f dx)ᵀ h, Σ f dx), of parts (where, dx there) of the vocabulary; f per row, or 1.

    Sums are float32 or wider; each row of the second is written once. Empty if not wanted.
    """
    wide = rows.accumulator(w)
    of_h, of_w, of_b = wanted
    dh = torch.zeros(h.shape, dtype=wide, device=h.device) if of_h else h.new_empty(0)
    dw = w.new_empty(w.shape) if of_w else w.new_empty(0)
    db = b.new_empty(b.shape) if of_b else h.new_empty(0)
    left = h if factor is None else (factor[:, None] * h).to(h.dtype)
    for at, dx in parts:
        if of_h:
            _add_product(dh, dx, w[at])
        if of_w:
            _write_product(dw[at], dx.mT, left)
        if of_b:
            db[at] = dx.sum(0, dtype=wide) if factor is None else dx.mT @ factor.to(dx.dtype)
    if of_h and factor is not None:
        dh *= factor[:, None]
    return dh.to(w.dtype), dw, db


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """In float32 on a CPU without units for less, whose product is slow, or rounds on the way."""
    wide = rows.accumulator(out)
    if a.is_cuda or a.dtype == out.dtype and (out.dtype == wide or rows.has_units(out)):
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.to(wide) @ b.to(wide))


# leading axes


def over_leads(
    launch: Callable, weights: Sequence[int], folds: Callable[..., bool] = lambda *args: True
) -> Callable:
    """`launch(h [N, D], w [V, D], ...)` for arguments that all have the same axes before those.

    Where `folds` and one weight, expanded, serves all of them, their rows are its rows: one launch.
    Otherwise they are gone through. `weights`: which arguments have no rows.
    """

    def run(*args: Any) -> tuple[Tensor, ...]:
        lead = args[0].shape[:-2]
        if not lead:
            return launch(*args)
        strides = (args[i].stride()[: len(lead)] for i in weights if args[i] is not None)
        if folds(*args) and not any(map(any, strides)):
            return _folded(launch, weights, lead, args)
        each = [
            launch(*(x[at] if isinstance(x, Tensor) else x for x in args))
            for at in product(*map(range, lead))
        ]
        return tuple(torch.stack(outs).unflatten(0, lead) for outs in zip(*each))

    return run


def _folded(launch: Callable, weights: Sequence[int], lead: torch.Size, args: tuple) -> tuple:
    def flat(i: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x[(0,) * len(lead)] if i in weights else x.flatten(0, len(lead))

    outputs = launch(*(flat(i, x) for i, x in enumerate(args)))
    return tuple(x.view(*lead, len(x) // prod(lead), *x.shape[1:]) for x in outputs)


# what can be wrong


def checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, memory: int, of: str = ""
) -> Tensor:
    """The logits as far as they have a shape, a dtype and a device; they take no memory.

    Raises:
        TypeError: a dtype that cannot be what was meant.
        ValueError: shapes or devices that differ, or too little `memory`.
    """
    names = f"{of}hidden", f"{of}weight"
    given = dict(zip((*names, "bias"), (hidden, weight, bias)))
    for name, x in given.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert with .float()")
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of {names[0]}, {hidden.device}, got {x.device}; "
                f"move it with .to({names[0]}.device)"
            )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{names[0]} and {names[1]} must have one dtype, got {hidden.dtype} and "
            f"{weight.dtype}; convert one with .to"
        )
    if weight.ndim != 2 or not all(weight.shape) or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"{names[0]} and {names[1]}: got {tuple(hidden.shape)} and {tuple(weight.shape)}, "
            "expected [*batch, width] and [vocab, width]; the weight is that of torch.nn.Linear"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [vocab], {tuple(weight.shape[:1])} as {names[1]} has it, got "
            f"{tuple(bias.shape)}"
        )
    least = hidden.shape[:-1].numel() * min(len(weight), LEAST) * hidden.itemsize
    if memory < least:
        raise ValueError(
            f"memory must have room for {min(len(weight), LEAST)} logits of each row, {least} "
            f"bytes, got {memory}; raise it or split the batch"
        )
    return hidden.detach()[..., :1].expand(*hidden.shape[:-1], len(weight))
