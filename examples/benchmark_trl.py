"""A step of TRL and a step of ours: the same Llama, tokens and lengths, in turns on one machine.

    python examples/benchmark_trl.py --python TRL/bin/python --ppo-python TRL_1.12/bin/python

Each side is a process of its own that steps when it is asked to, first one, then the other. The
interpreters are those of environments with TRL (`pip install trl`; its PPO trainer was dropped
after 1.12), and default to this one. Prints a table of seconds per step, the ratio of TRL's to
ours in each turn (median, quartiles), peak memory, the first step with all compilation, and how far
the losses of the same step are apart. "floor" is the share of our time that the products of
matrices and the bytes of weights, gradients and moments need at this machine's measured rates.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from race_setting import (
    ANSWER,
    PAIRS,
    PROMPT,
    PROMPTS,
    ROLLOUTS,
    SFT_LENGTH,
    SFT_ROWS,
    Job,
    llama,
)  # fmt: skip

from rlhf_fn.products import linear

ALLOCATOR = {  # large tensors stay mapped: the same for both sides
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}  # fmt: skip
COLUMNS = (
    "job", "vocabulary", "dtype", "ours ms", "TRL ms", "TRL / ours", "quartiles", "ours MB",
    "TRL MB", "ours first s", "TRL first s", "losses differ", "floor",
)  # fmt: skip


class Side:
    """A process that makes a step when it is asked to."""

    def __init__(self, python: str, script: str, job: Job):
        self.errors = tempfile.TemporaryFile("w+")
        command = [python, str(Path(__file__).parent / script), *map(str, job)]
        self.process = subprocess.Popen(
            command, env={**os.environ, **ALLOCATOR, "HF_HUB_OFFLINE": "1"}, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def lap(self) -> dict[str, float]:
        """Seconds, loss and peak bytes of one step.

        Raises: RuntimeError with the last line of its errors where it has ended.
        """
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("LAP "):
                return json.loads(line[4:])
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        raise RuntimeError(said[-1] if said else "it ended without a word")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Rates(NamedTuple):
    """What this machine does: floating-point operations of a product and bytes of a copy, /s."""

    flops: dict[str, float]
    bytes: float


def raced(job: Job, python: str, laps: int, rates: Rates) -> dict[str, Any]:
    """A row of the table."""
    sides = Side(sys.executable, "race_ours.py", job), Side(python, "race_trl.py", job)
    try:
        first, *pairs = [tuple(side.lap() for side in sides) for _ in range(laps + 2)]
    finally:
        for side in sides:
            side.end()
    warm = pairs[1:]  # the second may compile or allocate what the first did not
    ours, theirs = ([lap["seconds"] for lap in side] for side in zip(*warm))
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    low, _, high = quantiles(ratios, n=4)
    gaps = [abs(a["loss"] - b["loss"]) for a, b in (first, *pairs)]
    same = job.name in ("sft", "dpo", "reward")  # the others draw their own samples
    values = (
        *job, median(ours) * 1e3, median(theirs) * 1e3, median(ratios), f"{low:.2f}–{high:.2f}",
        pairs[-1][0]["peak"] / 1e6, pairs[-1][1]["peak"] / 1e6, first[0]["seconds"],
        first[1]["seconds"], f"{max(gaps):.1e}" if same else "",
        f"{floor(job, rates) / median(ours):.0%}",
    )  # fmt: skip
    return dict(zip(COLUMNS, values))


def floor(job: Job, rates: Rates) -> float:
    """Seconds that the step needs: its products, and its bytes of weights.

    A product with a weight of n numbers is 2n operations per token forward and 4n backward; only
    what is predicted is multiplied with the head, and a prompt is read once for its answers. A
    sampling step reads all weights; AdamW reads four numbers of each parameter and writes three.
    """
    weights = [p.numel() for n, p in llama("policy", job.vocab).named_parameters() if p.ndim > 1]
    table, body = job.vocab * 256, sum(weights) - 2 * job.vocab * 256
    rows, both = ROLLOUTS, PROMPT + ANSWER
    answered, read = rows * ANSWER * (body + table), both * body + ANSWER * table
    scored = PAIRS * (PROMPT + 2 * ANSWER) * body
    pairs = scored + PAIRS * 2 * ANSWER * table
    groups = PROMPTS * PROMPT * body + answered
    forward, trained, steps = {  # weight uses per step of: forward alone, forward and backward
        "sft": (0, SFT_ROWS * SFT_LENGTH * (body + table), 0),
        "dpo": (pairs, pairs, 0),
        "reward": (0, scored, 0),
        "grpo": (groups, groups, ANSWER),
        "ppo": (
            answered + rows * PROMPT * body + rows * (2 * both * body + read),
            rows * (both * body + read), ANSWER,
        ),
    }[job.name]  # fmt: skip
    models = {"ppo": 2 * body + 3 * table, "reward": body + table}.get(job.name, body + 2 * table)
    moved = 4 * (7 * models + steps * (body + table))
    return (2 * forward + 6 * trained) / rates.flops[job.dtype] + moved / rates.bytes


def measured(dtypes: list[str]) -> Rates:
    """The rates, each the best of a few tries."""
    flops = {}
    for dtype in dtypes:
        a, b = (torch.randn(2048, 2048, dtype=getattr(torch, dtype)) for _ in range(2))
        flops[dtype] = 2 * 2048**3 / min(_seconds(lambda a=a, b=b: linear(a, b)) for _ in range(10))
    source, target = torch.randn(2, 2**25)
    taken = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    return Rates(flops, 2 * source.nbytes / taken)


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for dtype in options.dtypes:
        for vocab in options.vocabs:
            yield from (Job(name, vocab, dtype) for name in options.jobs)


def shown(row: dict[str, Any]) -> str:
    cells = (row.get(name, "") for name in COLUMNS)
    numbers = (f"{x:.3g}" if isinstance(x, float) and x < 100 else x for x in cells)
    return "| " + " | ".join(f"{x:.0f}" if isinstance(x, float) else str(x) for x in numbers) + " |"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter with TRL")
    parser.add_argument("--ppo-python", default=sys.executable, help="one with TRL 1.12 or older")
    parser.add_argument("--jobs", nargs="+", default=["sft", "reward", "dpo", "grpo", "ppo"])
    parser.add_argument("--vocabs", nargs="+", type=int, default=[512, 32000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--laps", type=int, default=15, help="turns that count")
    options = parser.parse_args()
    rates = measured(options.dtypes)
    told = ", ".join(f"{name} {x / 1e9:.0f} GFLOP/s" for name, x in rates.flops.items())
    print(f"{torch.get_num_threads()} threads, {told}, copies {rates.bytes / 1e9:.0f} GB/s\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for job in jobs(options):
        python = options.ppo_python if job.name == "ppo" else options.python
        try:
            print(shown(raced(job, python, options.laps, rates)), flush=True)
        except RuntimeError as error:
            print(f"| {job.name} | {job.vocab} | {job.dtype} | does not run: {error} |", flush=True)


if __name__ == "__main__":
    main()
