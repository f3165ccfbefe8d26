"""`python kernels/benchmarks/gpu.py [--out FOLDER]`: everything that needs a GPU, in nine minutes.

Each section is a process of its own with a budget, so that none stops another, whatever it does to
the device. `results.json` has every row, `RESULTS.md` the tables. The exit status is 1 if a
section found something wrong, 2 without a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import bench
import torch
from bench import Job, Machine, Row

GRACE = 30.0  # seconds more to begin, and for the job that runs when a section's time is up
ALL = 535.0  # seconds for all sections; the last one has what the others leave


class Section(NamedTuple):
    title: str
    seconds: float  # after which no job of it begins
    modules: tuple[str, ...]  # each with `jobs(machine)`, the first with `shown(rows)`


SECTIONS = {
    "correctness": Section("Are they right?", 120, ("hard", "correctness", "linear_correctness")),
    "linear": Section("Without logits", 100, ("linear",)),
    "targets": Section("Targets", 60, ("targets",)),
    "assembly": Section("Machine code", 25, ("assembly",)),
    "sweep": Section("The best way to walk a row", 80, ("sweep",)),
    "step": Section("A training step", 45, ("step",)),
    "peers": Section("Peers", 10, ("peers",)),
    "scans": Section("Scans over time", 35, ("scans",)),
    "logits": Section("Against others", ALL, ("logits",)),
}


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


def run_section(name: str, machine: Machine, folder: Path, seconds: float) -> list[Row]:
    """One section, here; its rows are in `folder/name.json` as they come."""
    path = folder / f"{name}.json"
    try:
        rows = bench.run(jobs(name, machine), seconds, lambda rows: bench.write(path, rows))
    except Exception as error:
        rows = [{"job": name, "status": "FAILED", "why": bench.said(error)}]
    bench.write(path, rows)
    return rows


def run_apart(name: str, folder: Path, seconds: float) -> list[Row]:
    """The same in a process of its own, and what it left behind if it did not end well."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", str(folder)]
    limit, ended = seconds + GRACE, None
    try:
        ended = subprocess.run([*command, "--seconds", str(seconds)], timeout=limit).returncode
    except subprocess.TimeoutExpired:
        pass
    rows = json.loads(path.read_text()) if path.exists() else []
    path.unlink(missing_ok=True)
    if ended != 0:
        why = f"stopped after {limit:.0f} s" if ended is None else f"ended with status {ended}"
        rows.append({"job": name, "status": "FAILED", "why": why})
    return rows


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
    for name in ("sweep", "step", "linear", "targets"):
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
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("These benchmarks need a GPU that torch sees; logits.py runs on a CPU too.")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.section:
        run_section(asked.section, bench.gpu(), asked.out, asked.seconds)
        return 0
    results, start = {}, time.monotonic()
    for name in SECTIONS:
        now = time.monotonic() - start
        print(f"{name} (at {now:.0f} s)", flush=True)
        seconds = min(SECTIONS[name].seconds, max(ALL - GRACE - now, 0.0))
        results[name] = run_apart(name, asked.out, seconds)
    return finish(bench.here(), results, asked.out)


if __name__ == "__main__":
    raise SystemExit(main())
