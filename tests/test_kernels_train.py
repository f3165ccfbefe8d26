"""The benchmark of the whole step runs at toy size, and its ways agree on the gradient's norm."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "benchmarks"))

import bench  # noqa: E402
import llamas  # noqa: E402
import train  # noqa: E402

TINY = train.Size(llamas.Shape(32, 16, 24, 1, 2, 2), batch=2, time=16)


@pytest.mark.slow
@pytest.mark.compile
def test_every_way_to_take_a_step_has_a_row(monkeypatch):
    race = bench.race
    monkeypatch.setattr(bench, "race", lambda c, m, **_: race(c, m, rounds=2, least=2, warm=1))
    rows = bench.run(train.jobs(bench.cpu("eager"), sizes=[TINY]), 300, lambda rows: None)
    assert not bench.failed(rows)
    assert len(rows) == 12 and all(row["norm error"] < 0.1 for row in rows)
    table = train.shown(rows)
    assert all(row["who"] in table for row in rows)
