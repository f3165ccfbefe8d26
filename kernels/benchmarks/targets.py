"""How near to the limits: each target of the project, what was predicted, what is measured.

The prediction is made before the clock runs: the smaller of the two bounds that `assembly.py` reads
off the machine code, and of `BEST`, which is as much of a copy's rate as one may hope for.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import assembly
import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from logits import Shape, made

SHAPES = ((8192, 32000), (4096, 128256), (8192, 151936))
BEST = 1.0
COLUMNS = ("target", "dtype", "wanted", "predicted", "measured", "unit", "met")
REFERENCE = 4.3e12  # bytes per second of a copy on the H200 for which milliseconds were set
both_of = rlhf_kernels.token_logprobs_and_entropy


shown = partial(bench.told, columns=COLUMNS)


def jobs(
    machine: Machine, *, shapes: Sequence[Shape] = SHAPES, whole: Shape = (8192, 128256),
    few: Shape = (64, 151936), seconds: float = 4.0,
) -> Iterator[Job]:  # fmt: skip
    """Rates of forward and backward, the price of the entropy, a whole step, a few rows."""
    for dtype in ("bf16", "fp32"):
        for shape in shapes:
            label = f"rates {shape[0]} x {shape[1]} {dtype}"
            yield label, partial(rates, machine, shape, dtype, seconds)
    yield "forward and backward", partial(together, machine, whole, seconds)
    yield "few rows", partial(in_a_graph, machine, few, seconds)


def rates(machine: Machine, shape: Shape, dtype: str, seconds: float) -> list[Row]:
    """Forward and backward as fractions of a copy of as many bytes, and H in the same pass."""
    inputs = made(machine, shape, dtype, 1)
    x = inputs[0][0]
    up = torch.rand(shape[0], device=machine.device) + 0.1
    half, whole = [z[: max(len(z) // 2, 1)] for z, _ in inputs], [z for z, _ in inputs]
    laps = {
        "copy of half": bench.copied(half),
        "copy": bench.copied(whole),
        "forward": bench.on(inputs, torch.no_grad()(rlhf_kernels.token_logprobs)),
        "with H": bench.on(inputs, torch.no_grad()(both_of)),
        "backward": _backward(inputs, up),
    }
    times = bench.medians(bench.race(laps, machine, seconds=seconds))
    at = f"{shape[0]} x {shape[1]}"
    forward = times["copy of half"] / times["forward"] * x.nbytes / (2 * half[0].nbytes)
    backward = times["copy"] / times["backward"]
    ratio = times["with H"] / times["forward"]
    guess = {name: predicted(machine, name, dtype) for name in ("_forward", "_backward", "H")}
    slower = guess["_forward"] / guess["H"] if guess["H"] else None
    return [
        _row(f"forward {at}", dtype, 0.92, guess["_forward"], forward, "of copy"),
        _row(f"backward {at}", dtype, 0.88, guess["_backward"], backward, "of copy"),
        _row(f"H in the pass {at}", dtype, 1.02, slower, ratio, "times", most=True),
    ]


def together(machine: Machine, shape: Shape, seconds: float) -> list[Row]:
    """Forward and backward in milliseconds; on another GPU the target moves with its copy."""
    inputs = made(machine, shape, "bf16", 1)
    up = torch.rand(shape[0], device=machine.device) + 0.1

    def step(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(rlhf_kernels.token_logprobs(x, y), x, up)

    laps = {"copy": bench.copied([x for x, _ in inputs]), "both": bench.on(inputs, step)}
    times = bench.medians(bench.race(laps, machine, seconds=seconds))
    rate = 2 * inputs[0][0].nbytes / times["copy"]
    h200 = machine.device == "cuda" and "H200" in torch.cuda.get_device_name()
    wanted = 1.65 if h200 else 1.65 * REFERENCE / rate
    parts = [predicted(machine, name, "bf16") for name in ("_forward", "_backward")]
    passes = zip((1, 2), parts)
    guess = sum(n * inputs[0][0].nbytes / rate / p * 1e3 for n, p in passes) if all(parts) else None
    at = f"forward + backward {shape[0]} x {shape[1]}"
    return [_row(at, "bf16", wanted, guess, times["both"] * 1e3, "ms", most=True)]


def in_a_graph(machine: Machine, shape: Shape, seconds: float) -> list[Row]:
    """A few rows, many times in one CUDA graph, on inputs that the cache does not hold."""
    inputs = made(machine, shape, "bf16", 1)
    turns = 2 * len(inputs)
    size = inputs[0][0].nbytes
    rows = []
    for name, function in {"log π": rlhf_kernels.token_logprobs, "log π, H": both_of}.items():

        def all_turns(function=function):
            with torch.no_grad():
                return [function(*inputs[i % len(inputs)]) for i in range(turns)]

        replay = machine.captured(all_turns)
        copy = bench.copied([x for x, _ in inputs])
        laps = {"ours": lambda _, replay=replay: replay(), "copy": copy}
        times = bench.medians(bench.race(laps, machine, seconds=seconds))
        taken = times["ours"] / turns * 1e6
        guess = 5.0 + size / (2 * size / times["copy"]) * 1e6  # two launches, one read
        at = f"{name} {shape[0]} x {shape[1]} in a graph"
        rows.append(_row(at, "bf16", 12.0, guess, taken, "µs", most=True))
    return rows


@cache
def predicted(machine: Machine, what: str, dtype: str) -> float | None:
    """The bound, as a fraction of a copy; None where the kernels cannot be disassembled."""
    gpu = "H100" if machine.device == "cuda" and "H100" in torch.cuda.get_device_name() else "H200"
    job, kernel = ("log π, H", "_forward") if what == "H" else ("log π", what)
    try:
        function, _ = assembly.FUNCTIONS[job]
        rows = assembly.compiled(function, (1024, 32768), dtype)
        (row,) = (row for row in rows if row["kernel"] == kernel)
        return min(BEST, row[f"issue {gpu}"], row[f"in flight {gpu}"])
    except Exception:  # it is a guess, and must not stop a measurement
        return None


def _backward(inputs: list[tuple], up: torch.Tensor) -> Callable[[int], object]:
    """Backward alone: the graphs are made once."""
    ends = []
    for x, y in inputs:
        x = x.detach().requires_grad_()
        ends.append((rlhf_kernels.token_logprobs(x, y), x))
    return bench.on(ends, lambda out, x: torch.autograd.grad(out, x, up, retain_graph=True))


def _row(
    target: str, dtype: str, wanted: float, guess: float | None, measured: float, unit: str,
    most: bool = False,
) -> Row:  # fmt: skip
    met = measured <= wanted if most else measured >= wanted
    return {
        "target": target, "dtype": dtype, "wanted": f"{'≤' if most else '≥'} {bench.shown(wanted)}",
        "predicted": "?" if guess is None else guess, "measured": measured, "unit": unit,
        "met": "yes" if met else "no",
    }  # fmt: skip
