"""Scans along time: sums of what is still to come, discounted step by step, in one read of it.

yₜ = xₜ + aₜ yₜ₊₁ composes maps y ↦ a y + x, which is associative. As a linear map of x it is the
transpose of the scan the other way, zₜ = xₜ + aₜ₋₁ zₜ₋₁: each is the other's backward pass, in
which ∂aₜ = zₜ yₜ₊₁, so derivatives of any order are scans. Time is walked in blocks, which hand on
the y that they end with.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import checks, cpu_scans, rows
from rlhf_kernels.registration import differentiable, operator

# the kernel, and what kernels of scans share


@triton.jit
def then(a, x, b, y):
    """s ↦ a s + x, and after it s ↦ b s + y."""
    return a * b, b * x + y


@triton.jit
def carried_on(state, BLOCK: tl.constexpr):
    """The state at the end of a block, for the next one."""
    last = tl.arange(0, BLOCK)[None, :] == BLOCK - 1
    return tl.sum(tl.where(last, state, 0.0), 1)[:, None]


@triton.jit
def _scan(x, x_row, x_step, a, a_row, a_step, y, rows, time, SUFFIX: tl.constexpr,
          ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Some rows per program. The suffix is scanned forward over reversed indices: reverse=True
    is wrong on some GPUs, https://github.com/triton-lang/triton/issues/4362"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    y_before = tl.zeros([ROWS, 1], ACC)
    for start in range(0, time, BLOCK):
        i = (start + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
        there = (row < rows) & (i < time)
        t = time - 1 - i if SUFFIX else i
        s = t if SUFFIX else t - 1
        u = tl.load(x + row * x_row + t * x_step, mask=there, other=0.0).to(ACC)
        decay = tl.load(a + row * a_row + s * a_step, mask=there & (s >= 0), other=0.0).to(ACC)
        decay, u = tl.associative_scan((decay, u), 1, then)
        out = u + decay * y_before
        tl.store(y + row * time + t, out, mask=there)
        y_before = carried_on(out, BLOCK)


# the launches


def plan(number: int, time: int) -> dict[str, int]:
    """A tile of rows and time: all of a short row and several of them, or a block of a long one.

    4 elements per thread leave registers for 8 programs of 4 warps on each of 132 multiprocessors,
    which want about 4 before a program takes a second row.
    """
    block = min(triton.next_power_of_2(time), 512)
    share = triton.next_power_of_2(number // 528 + 1) // 2
    chosen = max(min(share, 512 // block), 1)
    return {"ROWS": chosen, "BLOCK": block, "num_warps": max(chosen * block // 128, 1)}


def options(x: Tensor) -> tuple[tuple[int, int], tuple[int], dict]:
    """((rows, time), grid, options) of a kernel over `x`."""
    shape = x.shape[:-1].numel(), x.shape[-1]
    chosen = plan(*shape)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return shape, (triton.cdiv(shape[0], chosen["ROWS"]),), chosen | {"ACC": acc}


def strided(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(x as rows, from row to row, from step to step), copied where no two strides walk it."""
    if x is None:
        return None, 0, 0
    x = x.reshape(-1, x.shape[-1])
    return x, *x.stride()


def _launch(suffix: bool):
    def launch(x: Tensor, a: Tensor) -> Tensor:
        y = _like(x, a)
        if y.numel():
            shape, grid, chosen = options(x)
            _scan[grid](*strided(x), *strided(a), y, *shape, SUFFIX=suffix, **chosen)
        return y

    return launch


def _like(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# the operators

_PREFIX = operator(
    "prefix_scan(Tensor x, Tensor a) -> Tensor",
    rows.dispatch(_launch(False), cpu_scans.prefix_forward),
    _like,
)
_SUFFIX = operator(
    "suffix_scan(Tensor x, Tensor a) -> Tensor",
    rows.dispatch(_launch(True), cpu_scans.suffix_forward),
    _like,
)


def _suffix_gradients(args, y, g, wanted):
    z = _PREFIX(g[0], args[1])
    return z, z * _after(y[0]) if 1 in wanted else None


def _prefix_gradients(args, z, g, wanted):
    y = _SUFFIX(g[0], args[1])
    return y, _after(y) * z[0] if 1 in wanted else None


def _after(y: Tensor) -> Tensor:
    """yₜ₊₁, and 0 past the end."""
    return F.pad(y[..., 1:], (0, 1))


differentiable(_PREFIX, cpu_scans.prefix_scan, {(0, 1): _prefix_gradients})
differentiable(_SUFFIX, cpu_scans.suffix_scan, {(0, 1): _suffix_gradients})


def suffix_scan(x: Tensor, decay: Tensor) -> Tensor:
    """Solve yₜ = xₜ + decayₜ yₜ₊₁, with y = 0 past the end, in one read of x and decay.

    `rlhf_fn.suffix_scan`, summed in float32 or wider. Derivatives of any order in reverse mode are
    scans too; forward mode is that of the plain formula.

    Args:
        x, decay: `[*batch, time]`, any strides.

    Raises: ValueError where the shapes or devices differ; TypeError for what is not floating point.
    """
    checks.same_shape(x=x, decay=decay)
    checks.same_device(x=x, decay=decay)
    checks.floating(x=x, decay=decay)
    dtype = torch.promote_types(x.dtype, decay.dtype)
    return _SUFFIX(x.to(dtype), decay.to(dtype))
