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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bench
import torch
from bench import Job, Machine, Row


class Section(NamedTuple):
    title: str
    seconds: float  # after which no job of it begins
    jobs: Callable[[Machine], Iterator[Job]]
    shown: Callable[[list[Row]], str]


def _table(columns: tuple[str, ...]) -> Callable[[list[Row]], str]:
    def shown(rows: list[Row]) -> str:
        return bench.table([row for row in rows if columns[0] in row], columns) + _wrong(rows)

    return shown


def _wrong(rows: list[Row]) -> str:
    bad = [f"\n- {row['job']}: {row['status']}, {row['why']}" for row in rows if "why" in row]
    return "\n" + "".join(dict.fromkeys(bad)) if bad else ""


def _counted(rows: list[Row]) -> str:
    return f"{len(rows) - len(bench.failed(rows))} of {len(rows)} claims hold." + _wrong(rows)


def _correctness() -> Section:
    import correctness
    import hard

    def jobs(machine):
        yield from hard.jobs(machine)
        yield from correctness.jobs(machine)

    return Section("Are they right?", 110, jobs, _counted)


def _targets() -> Section:
    import targets

    return Section("Targets", 60, targets.jobs, _table(targets.COLUMNS))


def _assembly() -> Section:
    import assembly

    return Section("Machine code", 25, lambda machine: assembly.jobs(), _table(assembly.COLUMNS))


def _sweep() -> Section:
    import sweep

    return Section("The best way to walk a row", 80, sweep.jobs, _table(sweep.COLUMNS))


def _step() -> Section:
    import step

    return Section("A training step", 45, step.jobs, _table(step.COLUMNS))


def _logits() -> Section:
    import logits

    def jobs(machine):
        yield from logits.drawing_jobs(machine, logits.DRAWS_ON_GPU, 1.0)
        yield from logits.jobs(machine, logits.ON_GPU, ("bf16", "fp32"), 1.5)

    return Section("Against others", 80, jobs, logits.shown)


def _peers() -> Section:
    import peers

    return Section("Peers", 10, peers.jobs, _table(peers.COLUMNS))


SECTIONS = {
    "correctness": _correctness,
    "targets": _targets,
    "assembly": _assembly,
    "sweep": _sweep,
    "step": _step,
    "peers": _peers,
    "logits": _logits,
}  # imported where they run: an import that fails is its own section's failure
GRACE = 30.0  # seconds more for the job that runs when a section's time is up
ALL = 530.0  # seconds for all sections


def run_section(name: str, machine: Machine, folder: Path) -> list[Row]:
    """One section, here; its rows are in `folder/name.json` as they come."""
    path = folder / f"{name}.json"
    try:
        section = SECTIONS[name]()
        rows = bench.run(section.jobs(machine), section.seconds, lambda r: bench.write(path, r))
    except Exception as error:
        rows = [{"job": name, "status": "FAILED", "why": bench.said(error)}]
    bench.write(path, rows)
    return rows


def run_apart(name: str, folder: Path, seconds: float) -> list[Row]:
    """The same in a process of its own, and what it left behind if it did not end well."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", str(folder)]
    ended = None
    try:
        ended = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        pass
    rows = json.loads(path.read_text()) if path.exists() else []
    if ended != 0:
        why = f"stopped after {seconds:.0f} s" if ended is None else f"ended with status {ended}"
        rows.append({"job": name, "status": "FAILED", "why": why})
    return rows


def report(machine: Machine, results: dict[str, list[Row]]) -> str:
    """RESULTS.md."""
    about = ", ".join(f"{value}" for value in bench.versions(machine).values())
    parts = [f"# Results\n\n`kernels/benchmarks/gpu.py`; date, device, torch, triton: {about}."]
    for name, rows in results.items():
        section = SECTIONS[name]()
        parts.append(f"## {section.title}\n\n{section.shown(rows)}")
    return "\n\n".join(parts) + "\n"


def summary(results: dict[str, list[Row]]) -> str:
    """One line for each section."""
    lines = []
    for name, rows in results.items():
        bad = bench.failed(rows)
        skipped = sum(row["status"] == "skipped" for row in rows)
        whys = " | ".join(dict.fromkeys(f"{r['job']}: {r['why']}" for r in bad))[:300]
        lines.append(
            {
                "section": name,
                "rows": len(rows),
                "skipped": skipped,
                "FAILED": len(bad),
                "why": whys,
            }
        )
    return bench.table(lines, ("section", "rows", "skipped", "FAILED", "why"))


def finish(machine: Machine, results: dict[str, list[Row]], folder: Path) -> int:
    """Write both files, print the tables, the short ones last; 1 if a claim failed."""
    bench.write(folder / "results.json", {"about": bench.versions(machine), "rows": results})
    (folder / "RESULTS.md").write_text(report(machine, results))
    for name in ("sweep", "step", "targets"):
        if name in results:
            print(f"\n{name}\n{SECTIONS[name]().shown(results[name])}")
    print(f"\n{summary(results)}")
    return 1 if any(bench.failed(rows) for rows in results.values()) else 0


def main() -> int:
    """All sections, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--section", choices=SECTIONS)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("These benchmarks need a GPU that torch sees; logits.py runs on a CPU too.")
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.section:
        run_section(asked.section, bench.gpu(), asked.out)
        return 0
    results, start = {}, time.monotonic()
    for name in SECTIONS:
        now = time.monotonic() - start
        print(f"{name} (at {now:.0f} s)", flush=True)
        budget = min(SECTIONS[name]().seconds + GRACE, ALL - now)
        results[name] = run_apart(name, asked.out, max(budget, 0.0))
    return finish(bench.here(), results, asked.out)


if __name__ == "__main__":
    raise SystemExit(main())
