"""Clocks, memory, tables and files: what every benchmark here shares.

Contenders take turns, so that a machine that slows down slows all of them; told are the median and
the quartiles. On a GPU the cache is emptied before each call and the clock is the device's own.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # scripts run from a checkout as it is

Row = dict[str, Any]
Call = Callable[[], Any]
Job = tuple[str, Callable[[], list[Row]]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE = 2**28  # bytes, several times what a GPU caches
AHEAD = 2_000_000  # cycles of the GPU, in which the host queues the launches


class Skipped(Exception):
    """Why a job cannot run here; it has not failed."""


class Machine(NamedTuple):
    """What a GPU and a CPU do differently."""

    device: str
    seconds: Callable[[Call], float]  # of one call
    peak: Callable[[Call], int]  # bytes that one call holds at most, its outputs included
    captured: Callable[[Call], Call]  # the call as a CUDA graph
    backend: str  # of torch.compile

    def compiled(self, function: Callable) -> Callable:
        """One graph, of this shape alone."""
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.backend)


class Times(NamedTuple):
    """Seconds and bytes."""

    median: float
    low: float
    high: float
    peak: int


def here() -> Machine:
    """The GPU if there is one."""
    return gpu() if torch.cuda.is_available() else cpu()


def gpu() -> Machine:
    """Device events, with a cold cache and the launches queued ahead."""
    other = torch.ones(CACHE // 4, device="cuda")

    def seconds(call: Call) -> float:
        other.sum()  # read, not written: nothing is left to be written back while the clock runs
        torch.cuda._sleep(AHEAD)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return Machine("cuda", seconds, _peak_on_gpu, _captured_on_gpu, "inductor")


def cpu(backend: str = "inductor") -> Machine:
    """The wall clock."""

    def seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return Machine("cpu", seconds, _peak_on_cpu, lambda call: call, backend)


def _peak_on_gpu(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Call) -> int:
    cpu_only = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu_only, profile_memory=True) as profile:
        out = call()
    del out
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _captured_on_gpu(call: Call) -> Call:
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def race(
    contenders: Mapping[str, Callable[[int], Any]],
    machine: Machine,
    *,
    rounds: int = 20,
    least: int = 5,
    seconds: float = 10.0,
    warm: int = 2,
) -> dict[str, Times | str]:
    """Interleaved rounds of `contender(round)`, at least `least`, then until `seconds` are over.

    A contender that raises is out of the race: its error stands in for its times.
    """
    results: dict[str, Times | str] = {}
    peaks: dict[str, int] = {}
    for name, contender in contenders.items():
        try:
            for i in range(warm):
                contender(i)
            peaks[name] = machine.peak(lambda f=contender: f(0))
        except Exception as error:
            results[name] = said(error)
            if machine.device == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in peaks}
    start = time.perf_counter()
    for i in range(rounds if times else 0):
        if i >= least and time.perf_counter() - start > seconds:
            break
        names = [*times][i % len(times) :] + [*times][: i % len(times)]
        for name in names:
            times[name].append(machine.seconds(lambda f=contenders[name], i=i: f(i)))
    return results | {name: Times(*quartiles(taken), peaks[name]) for name, taken in times.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def medians(results: Mapping[str, Times | str]) -> dict[str, float]:
    """Seconds of each contender of a race that all must finish."""
    for name, result in results.items():
        if isinstance(result, str):
            raise RuntimeError(f"{name}: {result}")
    return {name: result.median for name, result in results.items()}


def on(inputs: Sequence[tuple], function: Callable) -> Callable[[int], Any]:
    """`function` of the next inputs in every round: none is in the cache from the last one."""
    return lambda i: function(*inputs[i % len(inputs)])


def copied(inputs: Sequence[Tensor]) -> Callable[[int], Any]:
    """The yardstick: each input copied to a buffer, one read and one write."""
    buffer = torch.empty_like(inputs[0])
    return lambda i: buffer.copy_(inputs[i % len(inputs)])


def compiled_anew() -> None:
    """Forget compiled graphs, so that shapes do not pile up against the recompilation limit."""
    torch._dynamo.reset()


def said(error: BaseException) -> str:
    """An error in one line: its first cause, of which a compiler's last line tells most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('at ') else 0]}"[:200]


def run(jobs: Iterable[Job], seconds: float, saved: Callable[[list[Row]], Any]) -> list[Row]:
    """The rows of all jobs; one that fails is a row, and those after `seconds` are not begun.

    `saved` is called with what there is after every job.
    """
    rows, stop = [], time.monotonic() + seconds
    for name, job in jobs:
        start = time.monotonic()
        try:
            if start > stop:
                raise Skipped(f"the section's {seconds:.0f} s were over")
            new = [{"job": name, "status": "ok"} | row for row in job()]
        except Skipped as why:
            new = [{"job": name, "status": "skipped", "why": str(why)}]
        except Exception as error:
            new = [{"job": name, "status": "FAILED", "why": said(error)}]
        rows += new
        bad = "; ".join(f"{r['status']}, {r['why']}" for r in new if "why" in r and "who" not in r)
        print(f"  {name}: {bad or 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)
        saved(rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def failed(rows: Iterable[Row]) -> list[Row]:
    """What went wrong among the rows."""
    return [row for row in rows if row.get("status") == "FAILED"]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of some columns of the rows."""
    cells = [[shown(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(f"{c:{w}}" for c, w in zip(x, widths)) + " |" for x in lines)


def told(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The table of the rows that have what it is about, and what went wrong or was left out."""
    bad = dict.fromkeys(f"- {r['job']}: {r['status']}, {r['why']}" for r in rows if "why" in r)
    return "\n".join([table([row for row in rows if columns[0] in row], columns), "", *bad])


def shown(value: Any) -> str:
    """Three digits of a number, more where it is an integer; any other value as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if 0 < abs(value) < 100 else f"{value:.0f}"


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def versions(machine: Machine) -> Row:
    """The machine and the libraries, by name."""
    import triton

    if machine.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
