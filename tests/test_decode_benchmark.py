"""The benchmark of sampling runs, at toy size."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "benchmarks"))

import bench  # noqa: E402
import decode  # noqa: E402


@pytest.mark.compile
@pytest.mark.slow
def test_the_race_and_the_parts_of_a_turn_run_at_toy_size(monkeypatch):
    race = bench.race
    monkeypatch.setattr(bench, "race", lambda c, m, **_: race(c, m, rounds=2, least=2, warm=0))
    size = decode.Size(vocab=40, width=16, inner=24, layers=1, heads=2, batch=3, prompt=4, new=5)
    jobs = decode.jobs(bench.cpu("eager"), size=size, seconds=0.1)
    rows = bench.run(jobs, 300, lambda rows: None)
    assert not bench.failed(rows), rows
    told = decode.shown(rows)
    assert {row["who"] for row in rows if "who" in row} >= {"generate", "sample"}
    assert all(row["tokens/s"] > 0 for row in rows if "who" in row)
    assert "draw" in told and "sample, compiled turns, bf16" in told
