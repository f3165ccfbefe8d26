"""`python kernels/benchmarks/logits.py`: log-probs, entropy, KL and sampling from logits, raced.

Rates count the least bytes: forward reads each logit once, backward reads it again and writes its
gradient. The yardstick is a copy of as many bytes, in the same rounds.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bench
import contenders
import torch
from bench import Machine, Row, Times
from torch import Tensor

from rlhf_fn import random

Shape = tuple[int, int]
ON_GPU = ((8192, 128256), (8192, 32000), (4096, 128256), (8192, 151936), (32, 151936))
ON_CPU = ((1024, 32000), (256, 128256), (16, 151936))
DRAWS_ON_GPU = ((64, 151936), (512, 151936), (64, 50257))
DRAWS_ON_CPU = ((16, 32000), (64, 50257))
AT = ("shape", "dtype", "quantity", "who")
TOLD = ("ms", "quartiles", "GB/s", "of copy", "extra MB")
FORWARD, BOTH = "fwd ", "fwd+bwd "


class Quantity(NamedTuple):
    tensors: int  # of logits that it reads
    contenders: Callable[[Machine], contenders.Contenders]


QUANTITIES = {
    "log π": Quantity(1, contenders.logprobs),
    "log π, H": Quantity(1, contenders.logprobs_and_entropy),
    "KL": Quantity(2, contenders.kl),
}


def jobs(
    machine: Machine, *, shapes: Sequence[Shape] = ON_GPU, draws: Sequence[Shape] = DRAWS_ON_GPU,
    dtypes: Sequence[str] = ("bf16", "fp32"), seconds: float = 1.5,
) -> Iterator[bench.Job]:  # fmt: skip
    """Sampling, then every dtype, shape and quantity; each race takes up to `seconds`."""
    for shape in draws:
        at = {"shape": f"{shape[0]} x {shape[1]}", "dtype": "fp32", "quantity": "a token"}
        yield _job(at, draw, machine, shape, seconds)
    for dtype in dtypes:
        for shape in shapes:
            for name in QUANTITIES:
                at = {"shape": f"{shape[0]} x {shape[1]}", "dtype": dtype, "quantity": name}
                yield _job(at, race, machine, name, shape, dtype, seconds)


def _job(at: Row, function: Callable, *args) -> bench.Job:
    return " ".join(at.values()), lambda: [at | row for row in function(*args)]


def race(machine: Machine, name: str, shape: Shape, dtype: str, seconds: float) -> list[Row]:
    """Forward, then forward and backward, of all contenders for one quantity."""
    tensors, field = QUANTITIES[name]
    inputs = made(machine, shape, dtype, tensors)
    bench.compiled_anew()
    racers = field(machine)
    running = {who: f for who, f in racers.items() if callable(f)}
    logits = [x for x, *_ in inputs]
    half = [x[: max(len(x) // 2, 1)] for x in logits]
    with torch.no_grad():
        laps = {who: bench.on(inputs, f) for who, f in running.items()}
        forward = lap(machine, laps, half, tensors * logits[0].nbytes, seconds, FORWARD)
    upstream = torch.rand(shape[0], device=machine.device) - 0.5
    laps = {
        who: bench.on(_own(who, inputs), contenders.gradient_of(f, upstream))
        for who, f in running.items()
    }
    least = (2 * tensors + 1) * logits[0].nbytes
    both = lap(machine, laps, logits, least, seconds, BOTH)
    return [{"who": who} | forward[who] | both[who] for who in forward] + _skipped(racers)


def draw(machine: Machine, shape: Shape, seconds: float) -> list[Row]:
    """A token of each row of float32 logits, which is what a decoder hands on."""
    inputs = made(machine, shape, "fp32", 1)
    keys = random.split(random.key(0, device=machine.device), shape[0])
    inputs = [(x, keys) for x, *_ in inputs]
    bench.compiled_anew()
    racers = contenders.sampling(machine)
    laps = {who: bench.on(inputs, f) for who, f in racers.items() if callable(f)}
    half = [x[: max(len(x) // 2, 1)] for x, _ in inputs]
    with torch.no_grad():
        forward = lap(machine, laps, half, inputs[0][0].nbytes, seconds, FORWARD)
    return [{"who": who} | forward[who] for who in forward] + _skipped(racers)


def lap(
    machine: Machine, laps: dict[str, Callable], copied: list[Tensor], least: int, seconds: float,
    prefix: str,
) -> dict[str, Row]:  # fmt: skip
    """What each contender is told to have taken."""
    times = bench.race({"copy": bench.copied(copied)} | laps, machine, seconds=seconds)
    moved = 2 * copied[0].nbytes
    rate = moved / bench.medians({"copy": times["copy"]})["copy"]
    rows = {
        who: told(t, moved if who == "copy" else least, rate, prefix) for who, t in times.items()
    }
    return {who: rows[who] for who in ("copy", *laps)}


def told(times: Times | str, least: int, rate: float, prefix: str) -> Row:
    """Milliseconds, rate of the least bytes, its fraction of the copy's, and megabytes."""
    if isinstance(times, str):
        return {prefix + "ms": times.split(":")[0], prefix + "why": times}
    spread = f"{times.low * 1e3:.4g}–{times.high * 1e3:.4g}"
    speed = least / times.median
    values = times.median * 1e3, spread, speed / 1e9, speed / rate, times.peak / 1e6
    return {prefix + name: value for name, value in zip(TOLD, values)}


def made(machine: Machine, shape: Shape, dtype: str, tensors: int) -> list[tuple[Tensor, ...]]:
    """(logits, ..., tokens) to take turns with: more of small ones, so that no cache holds all."""
    generator = torch.Generator(machine.device).manual_seed(0)
    options = {"device": machine.device, "dtype": bench.DTYPES[dtype]}
    rows, vocab = shape
    count = min(8, max(2, bench.CACHE // (rows * vocab * 4)))

    def logits():
        return torch.randn(shape, generator=generator, **options).mul_(2)

    def tokens():
        return torch.randint(vocab, (rows,), generator=generator, device=machine.device)

    return [(*(logits() for _ in range(tensors)), tokens()) for _ in range(count)]


def _own(who: str, inputs: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Copies for a contender that overwrites what it is given."""
    return [(x.clone(), *rest) for x, *rest in inputs] if who in contenders.OVERWRITES else inputs


def _skipped(racers: contenders.Contenders) -> list[Row]:
    missing = {who: why for who, why in racers.items() if isinstance(why, str)}
    return [{"who": who, "status": "skipped", "why": why} for who, why in missing.items()]


def shown(rows: list[Row]) -> str:
    """The tables: with a backward pass, and without."""
    ran = [row for row in rows if row["status"] == "ok"]
    columns = [*AT, *(FORWARD + c for c in TOLD), *(BOTH + c for c in TOLD)]
    both = [row for row in ran if BOTH + "ms" in row]
    alone = [row for row in ran if BOTH + "ms" not in row]
    tables = [bench.table(both, columns), bench.table(alone, columns[: len(AT) + len(TOLD)])]
    whys = {
        f"- {row.get('who', row['job'])}: {row[key]}": None
        for row in rows
        for key in ("why", FORWARD + "why", BOTH + "why")
        if key in row
    }
    return "\n\n".join([t for t, r in zip(tables, (both, alone)) if r] + ["\n".join(whys)])


def main() -> None:
    """All shapes that suit this machine, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", help="ROWSxVOCAB, for instance 1024x32000")
    parser.add_argument("--draws", nargs="*", help="the same, of the sampling")
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp32"], choices=bench.DTYPES)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each race")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    machine = bench.here()
    on_gpu = machine.device == "cuda"
    shapes = _shapes(asked.shape, ON_GPU if on_gpu else ON_CPU)
    draws = _shapes(asked.draws, DRAWS_ON_GPU if on_gpu else DRAWS_ON_CPU)
    sizes = {"shapes": shapes, "draws": draws, "dtypes": asked.dtype, "seconds": asked.seconds}
    todo = jobs(machine, **sizes)
    rows = bench.run(todo, 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    print(
        ", ".join(f"{k} {v}" for k, v in bench.versions(machine).items()), shown(rows), sep="\n\n"
    )


def _shapes(asked: list[str] | None, default: Sequence[Shape]) -> Sequence[Shape]:
    if asked is None:
        return default
    return [(int(rows), int(vocab)) for rows, vocab in (text.split("x") for text in asked)]


if __name__ == "__main__":
    main()
