"""What every kernel over rows of logits shares: where rows lie, who walks them, what is checked."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack

from rlhf_kernels.checks import readable


class Layout(NamedTuple):
    """Row i of a tensor begins at (i // inner) * outer_stride + (i % inner) * inner_stride."""

    rows: int
    inner: int
    outer_stride: int
    inner_stride: int
    vocab_stride: int


def layout(x: Tensor) -> tuple[Tensor, Layout]:
    """`x` [*batch, vocab] as rows, copied only if no two strides can walk its leading axes."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = axes[-1][0] * size, stride
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return layout(x.contiguous())
    (outer, outer_stride), (inner, inner_stride) = ([(1, 0)] * 2 + axes)[-2:]
    return x, Layout(outer * inner, inner, outer_stride, inner_stride, x.stride(-1))


class Plan(NamedTuple):
    """How a row is walked: in blocks of `block`, by `slabs` programs of `slab` tokens each."""

    block: int
    slab: int
    slabs: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """Of a kernel that sums: a number for each thread, or for each token of a small block."""
        lanes = min(32 * self.warps, self.block)
        return {"BLOCK": self.block, "LANES": lanes, "num_warps": self.warps}


def plan(rows: int, vocab: int) -> Plan:
    """One program for a row, or several where there are too few rows to fill a GPU.

    132 multiprocessors want about 4 programs each, and a program 4 blocks or more.
    """
    block = min(triton.next_power_of_2(vocab), 4096)
    slabs = min(-(-528 // max(rows, 1)), -(-vocab // (4 * block)), 64)
    slab = -(-vocab // (slabs * block)) * block
    return Plan(block, slab, -(-vocab // slab), 8 if block > 1024 else 4)


def accumulator(x: Tensor) -> torch.dtype:
    """float64 stays; everything else is summed, and answered, in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_units(x: Tensor) -> bool:
    """Whether x is of bfloat16 on a CPU that multiplies it, and sums the products in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    known = getattr(torch.cpu, "get_capabilities", dict)()  # by the names of x86 and of ARM
    return any(known.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def arguments(
    x: Tensor, y: Tensor, scale: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor, int, tuple[int, ...], dict[str, Any]]:
    """(x, y, scale, number of rows, strides, options) as kernels take them."""
    x, at = layout(x)
    options = {
        "CAP": softcap,
        "SCALED": scale is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
    scales, step = (x, 0) if scale is None else (scale.reshape(-1), 1)
    if scale is not None and not any(scale.stride()):
        scales, step = scale, 0  # one number for all rows
    strides = (at.inner, at.outer_stride, at.inner_stride, at.vocab_stride, step)
    return x, y.reshape(-1).contiguous(), scales, at.rows, strides, options


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dispatch(kernel: Callable, on_cpu: Callable) -> Callable:
    """`kernel` where Triton runs, on the tensors' device; else `on_cpu`."""

    def run(*args: Any) -> Any:
        device = args[0].device
        if device.type == "cpu" and not interpreted():
            return on_cpu(*args)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel(*args)

    return run


def per_row(temperature: float | Tensor, logits: Tensor) -> Tensor | None:
    """1/τ for each row; None where τ is 1.

    Raises:
        ValueError: τ ≤ 0, or neither one number nor `[*batch, 1]`. On a GPU a tensor is not looked
            at.
    """
    batch = logits.shape[:-1]
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
        if temperature == 1:
            return None
        dtype = accumulator(logits)
        return torch.full((), 1 / temperature, dtype=dtype, device=logits.device).expand(batch)
    if temperature.ndim and temperature.shape[-1] != 1:
        raise ValueError(
            f"temperature must be one number or one per row, {(*batch, 1)}, got "
            f"{tuple(temperature.shape)}; add the last axis with temperature[..., None]"
        )
    if readable(temperature) and not (temperature > 0).all():
        worst = float(temperature.detach().min())
        raise ValueError(f"temperature must be > 0 in every row, got {worst}; clamp it from below")
    return temperature.to(accumulator(logits)).reciprocal().expand(*batch, 1).squeeze(-1)


def check(logits: Tensor, tokens: Tensor, softcap: float | None, **others: Tensor) -> None:
    """What can be wrong with the arguments and costs no synchronisation to see.

    Raises:
        TypeError: a dtype that cannot be what was meant.
        ValueError: shapes or devices that differ, an empty vocabulary, a softcap ≤ 0, and on a CPU
            a token outside of the vocabulary. On a GPU such a token makes its row NaN.
    """
    check_logits(logits, softcap, **others)
    for name, x in others.items():
        if x.shape != logits.shape:
            raise ValueError(
                f"{name} must have the shape of logits {tuple(logits.shape)}, got {tuple(x.shape)}"
            )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}; convert with .long()")
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits and tokens: got logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)},"
            " expected [*batch, vocab] and [*batch]"
        )
    if devices := {x.device for x in (tokens, *others.values())} - {logits.device}:
        raise ValueError(
            f"all tensors must be on the device of logits, {logits.device}, got "
            f"{', '.join(map(str, devices))}; move them with .to(logits.device)"
        )
    _check_ids(tokens, logits.shape[-1])


def check_logits(logits: Tensor, softcap: float | None, **others: Tensor) -> None:
    """What can be wrong with logits alone; the errors of `check`."""
    for name, x in {"logits": logits, **others}.items():
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert with .float()")
    if logits.ndim == 0 or not logits.shape[-1]:
        raise ValueError(
            f"logits must be [*batch, vocab] with a vocabulary, got {tuple(logits.shape)}"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be None or a finite number > 0, got {softcap}")


def _check_ids(tokens: Tensor, vocab: int) -> None:
    if not readable(tokens):
        return
    outside = (tokens < 0) | (tokens >= vocab)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"tokens{list(where)} is {int(tokens[where])}, expected an id in [0, {vocab}); check "
            "that tokenizer and model have one vocabulary; padding needs a valid id too"
        )


def disposable(x: Tensor, *upstream: Tensor) -> bool:
    """Whether a backward pass may write over `x`: a plain intermediate result, its rows apart."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    transformed = peek_interpreter_stack() is not None
    batched = any(map(is_legacy_batchedtensor, upstream))  # by is_grads_batched=True
    plain = type(x) is Tensor and not transformed and not batched  # a compiler traces a subclass
    return plain and not x.is_leaf and not torch.is_grad_enabled()
