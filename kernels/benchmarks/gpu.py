"""`python kernels/benchmarks/gpu.py [--out FOLDER]`: everything that needs a GPU, in nine minutes.

Each section is a process of its own with a budget, so that none stops another, whatever it does to
the device. Those that compile large models begin with that at once, beside the sections that time
nothing, and wait for their turn to use the clock. `results.json` has every row, `RESULTS.md` the
tables. The exit status is 1 if a section found something wrong, 2 without a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import bench
import torch
from bench import Job, Machine, Row

GRACE = 30.0  # seconds more to begin, and for the job that runs when a section's time is up
LATE = 90.0  # seconds more for one that still compiles when its turn comes
ALL = 535.0  # seconds for all sections; the last one has what the others leave


class Section(NamedTuple):
    title: str
    seconds: float  # after which no job of it begins
    modules: tuple[str, ...]  # each with `jobs(machine)`, the first with `shown(rows)`


CORRECT = ("hard", "commands", "correctness", "linear_correctness")
SECTIONS = {  # those that time nothing come first
    "correctness": Section("Are they right?", 90, CORRECT),
    "peers": Section("Peers", 10, ("peers",)),
    "assembly": Section("Machine code", 20, ("assembly",)),
    "large_sampling": Section("Sampling from half a billion parameters", 60, ("large_sampling",)),
    "large_training": Section("Training half a billion parameters", 60, ("large_training",)),
    "large_grpo": Section("GRPO with half a billion parameters", 35, ("large_grpo",)),
    "linear": Section("Without logits", 80, ("linear",)),
    "targets": Section("Targets", 45, ("targets",)),
    "sweep": Section("The best way to walk a row", 40, ("sweep",)),
    "step": Section("A training step", 20, ("step",)),
    "scans": Section("Scans over time", 20, ("scans",)),
    "logits": Section("Against others", 30, ("logits",)),
    "growth": Section("How cost grows", ALL, ("growth",)),
}
EARLY = ("large_sampling", "large_training", "large_grpo")  # whose first job compiles


def jobs(name: str, machine: Machine) -> Iterator[Job]:
    """Of a section; its modules are imported here, and one that fails stops no other section."""
    for module in SECTIONS[name].modules:
        yield from import_module(module).jobs(machine)


def shown(name: str, rows: list[Row]) -> str:
    """A section's rows for people."""
    try:
        return import_module(SECTIONS[name].modules[0]).shown(rows)
    except Exception as error:
        return bench.said(error)


def run_section(
    name: str, machine: Machine, folder: Path, seconds: float, turn: Path | None = None
) -> list[Row]:
    """One section, here; its rows are in `folder/name.json` as they come.

    Its first job does not wait for the `turn`, a file that will appear; the others do.
    """
    path, rows = folder / f"{name}.json", []
    try:
        todo = jobs(name, machine)
        if turn:
            rows = bench.run(islice(todo, 1), ALL, partial(bench.write, path))
            wait(turn)
        before = rows
        rows = before + bench.run(todo, seconds, lambda new: bench.write(path, before + new))
    except Exception as error:
        rows.append({"job": name, "status": "FAILED", "why": bench.said(error)})
    bench.write(path, rows)
    return rows


def wait(turn: Path) -> None:
    """Until the file is there; whoever is to make it may have ended."""
    stop = time.monotonic() + ALL
    while not turn.exists():
        if time.monotonic() > stop:
            raise TimeoutError(f"{turn.name} did not come in {ALL:.0f} s")
        time.sleep(0.1)


def begin(name: str, folder: Path, seconds: float, turn: Path | None = None) -> subprocess.Popen:
    """The section in a process of its own."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", str(folder)]
    command += ["--seconds", str(seconds), *(["--turn", str(turn)] if turn else [])]
    return subprocess.Popen(command)


def end(name: str, process: subprocess.Popen, folder: Path, limit: float) -> list[Row]:
    """Its rows, and what it left behind if it did not end well, or in `limit` seconds."""
    ended = None
    try:
        ended = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    path.unlink(missing_ok=True)
    if ended != 0:
        why = f"stopped after {limit:.0f} s" if ended is None else f"ended with status {ended}"
        rows.append({"job": name, "status": "FAILED", "why": why})
    return rows


def run_all(folder: Path) -> dict[str, list[Row]]:
    """Every section in turn, while the early ones compile."""
    start, results = time.monotonic(), {}
    turns = {name: folder / f"{name}.turn" for name in EARLY}
    for turn in turns.values():
        turn.unlink(missing_ok=True)
    early = {n: begin(n, folder, SECTIONS[n].seconds, turn) for n, turn in turns.items()}
    try:
        for name, section in SECTIONS.items():
            now = time.monotonic() - start
            print(f"{name} (at {now:.0f} s)", flush=True)
            seconds = min(section.seconds, ALL - GRACE - now)
            if seconds <= 0:
                why = f"the {ALL:.0f} s of all sections were over"
                results[name] = [{"job": name, "status": "skipped", "why": why}]
                continue
            if name in early:
                turns[name].touch()
            limit = min(seconds + GRACE + LATE * (name in early), ALL - now)
            process = early.pop(name, None) or begin(name, folder, seconds)
            results[name] = end(name, process, folder, limit)
    finally:
        for process in early.values():
            process.kill()
        for turn in turns.values():
            turn.unlink(missing_ok=True)
    return results


def report(machine: Machine, results: dict[str, list[Row]]) -> str:
    """RESULTS.md."""
    about = ", ".join(f"{value}" for value in bench.versions(machine).values())
    parts = [f"# Results\n\n`kernels/benchmarks/gpu.py`; date, device, torch, triton: {about}."]
    for name, rows in results.items():
        parts.append(f"## {SECTIONS[name].title}\n\n{shown(name, rows)}")
    return "\n\n".join(parts) + "\n"


def summary(results: dict[str, list[Row]]) -> str:
    """One line for each section."""
    lines = []
    for name, rows in results.items():
        bad = bench.failed(rows)
        skipped = sum(row["status"] == "skipped" for row in rows)
        whys = " | ".join(dict.fromkeys(f"{r['job']}: {r['why']}" for r in bad))[:300]
        line = {"section": name, "rows": len(rows), "skipped": skipped, "FAILED": len(bad)}
        lines.append(line | {"why": whys})
    return bench.table(lines, ("section", "rows", "skipped", "FAILED", "why"))


def finish(machine: Machine, results: dict[str, list[Row]], folder: Path) -> int:
    """Write both files, print the tables, the short ones last; 1 if a claim failed."""
    bench.write(folder / "results.json", {"about": bench.versions(machine), "rows": results})
    (folder / "RESULTS.md").write_text(report(machine, results))
    for name in ("sweep", "step", *EARLY, "linear", "targets"):
        if name in results:
            print(f"\n{name}\n{shown(name, results[name])}")
    print(f"\n{summary(results)}")
    return 1 if any(bench.failed(rows) for rows in results.values()) else 0


def main() -> int:
    """All sections, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--section", choices=SECTIONS, help="this one alone, in this process")
    parser.add_argument("--seconds", type=float, default=ALL, help="of that section")
    parser.add_argument("--turn", type=Path, help="a file that its clocks wait for")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("These benchmarks need a GPU that torch sees; logits.py runs on a CPU too.")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.section:
        run_section(asked.section, bench.gpu(), asked.out, asked.seconds, asked.turn)
        return 0
    return finish(bench.here(), run_all(asked.out), asked.out)


if __name__ == "__main__":
    raise SystemExit(main())
