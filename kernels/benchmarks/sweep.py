"""Which `rows.plan` is fastest for which shape, and how far the default is from it.

A lane holds 4 to 32 numbers: fewer make narrow loads, more do not fit the registers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from logits import Shape, made
from rlhf_kernels import rows as kernel_rows

SHAPES = ((8192, 32000), (4096, 128256), (8192, 151936), (32, 151936))
BLOCKS, WARPS = (1024, 2048, 4096, 8192, 16384), (4, 8, 16)
COLUMNS = ("shape", "dtype", "what", "best", "GB/s", "of copy", "default", "default / best")
Choice = tuple[int, int, int]  # block, warps, slabs


shown = partial(bench.told, columns=COLUMNS)


def jobs(
    machine: Machine, *, shapes: Sequence[Shape] = SHAPES, blocks: Sequence[int] = BLOCKS,
    warps: Sequence[int] = WARPS, seconds: float = 3.0,
) -> Iterator[Job]:  # fmt: skip
    """Forward, forward with H, backward and KL for every shape; bf16 first."""
    for dtype in ("bf16", "fp32"):
        for shape in shapes:
            for what in ("forward", "backward", "forward, H", "KL"):
                if what in ("forward", "backward") or dtype == "bf16":
                    label = f"{what} {shape[0]} x {shape[1]} {dtype}"
                    args = machine, what, shape, dtype, choices(shape, blocks, warps), seconds
                    yield label, partial(swept, *args)


def choices(shape: Shape, blocks: Sequence[int], warps: Sequence[int]) -> list[Choice]:
    """Few rows are also cut into slabs, at least one for each two multiprocessors' worth."""
    rows, vocab = shape
    pairs = [(b, w) for b in blocks for w in warps if 4 <= b / (32 * w) <= 32]
    slabs = (1,) if rows >= 1024 else (2, 4, 8, 16, 32)
    return [(b, w, s) for b, w in pairs for s in slabs if b * s < 2 * vocab]


def swept(
    machine: Machine, what: str, shape: Shape, dtype: str, tried: list[Choice], seconds: float
) -> list[Row]:
    """All choices in one race, with the default and a copy; their times are in the JSON."""
    inputs = made(machine, shape, dtype, 2 if what == "KL" else 1)
    run, least = action(what, inputs)
    laps = {"default": run} | {str(c): planned(c, run) for c in tried}
    laps["copy"] = bench.copied([x for x, *_ in inputs])
    times = bench.race(laps, machine, rounds=15, seconds=seconds, warm=1)
    good = {name: t.median for name, t in times.items() if not isinstance(t, str)}
    copy = 2 * inputs[0][0].nbytes / good.pop("copy")
    best = min(good, key=good.__getitem__)
    return [
        {
            "shape": f"{shape[0]} x {shape[1]}", "dtype": dtype, "what": what,
            "best": best, "GB/s": least / good[best] / 1e9, "of copy": least / good[best] / copy,
            "default": str(default(shape)), "default / best": good["default"] / good[best],
            "ms": {name: t * 1e3 for name, t in sorted(good.items(), key=lambda kv: kv[1])},
            "errors": {name: t for name, t in times.items() if isinstance(t, str)},
        }
    ]  # fmt: skip


def action(what: str, inputs: list[tuple]) -> tuple[Callable[[int], object], int]:
    """What runs in a round, and the least bytes that it moves."""
    size = inputs[0][0].nbytes
    functions = {
        "forward": rlhf_kernels.token_logprobs,
        "forward, H": rlhf_kernels.token_logprobs_and_entropy,
        "KL": rlhf_kernels.token_logprobs_and_kl,
    }
    if what in functions:
        return bench.on(inputs, torch.no_grad()(functions[what])), size * (len(inputs[0]) - 1)
    up = torch.rand(len(inputs[0][0]), device=inputs[0][0].device) + 0.1
    ends = []
    for x, y in inputs:
        x = x.detach().requires_grad_()
        ends.append((rlhf_kernels.token_logprobs(x, y), x))
    return bench.on(
        ends, lambda out, x: torch.autograd.grad(out, x, up, retain_graph=True)
    ), 2 * size


def planned(choice: Choice, run: Callable[[int], object]) -> Callable[[int], object]:
    """`run` under another plan."""

    def under(i: int) -> object:
        with plan(choice):
            return run(i)

    return under


@contextmanager
def plan(choice: Choice) -> Iterator[None]:
    """`rows.plan` answers with this choice."""
    block, warps, slabs = choice
    usual = kernel_rows.plan

    def chosen(rows: int, vocab: int, *more):
        slab = -(-vocab // (slabs * block)) * block
        cut = {"slab": slab, "slabs": -(-vocab // slab)}
        return usual(rows, vocab, *more)._replace(block=block, warps=warps, **cut)

    kernel_rows.plan = chosen
    try:
        yield
    finally:
        kernel_rows.plan = usual


def default(shape: Shape) -> Choice:
    """What `rows.plan` chooses by itself."""
    plan = kernel_rows.plan(*shape)
    return plan.block, plan.warps, plan.slabs
