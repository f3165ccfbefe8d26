"""How cost grows: the benchmark runs, and its exponents are those of what it is given."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "benchmarks"))

import bench  # noqa: E402
import growth  # noqa: E402

TINY = growth.Size(batch=2, length=8, vocab=32, width=16, layers=1)


@pytest.fixture
def machine(monkeypatch):
    """A CPU, whose race is over after one round."""
    race = bench.race
    monkeypatch.setattr(bench, "race", lambda c, m, **_: race(c, m, rounds=1, least=1, warm=0))
    return bench.cpu()._replace(peak=lambda call: 8_000_000)


def test_every_work_is_measured_by_every_size_and_drawn(machine, monkeypatch, tmp_path):
    values = {name: (TINY, (8, 16)) for name in growth.AXES}
    monkeypatch.setattr(growth, "AXES", values)
    rows = bench.run(growth.jobs(machine), 60.0, lambda rows: None)
    assert not bench.failed(rows)
    assert {(r["what"], r["size"]) for r in rows} == {
        (work, axis) for work, axes in growth.WORKS.items() for axis in axes
    }
    growth.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_the_time(machine, monkeypatch, power):
    def taken(contender, machine, **_):
        (call,) = contender.values()
        seconds = call(0) ** power
        return {name: bench.Times(seconds, seconds, seconds, 0) for name in contender}

    monkeypatch.setattr(bench, "race", taken)
    monkeypatch.setattr(growth, "MADE", {"step": lambda m, size: (lambda: size.batch, 1)})
    first, *rest = growth.raised(machine, "step", "batch", 1.0, float("inf"))
    assert "exponent" not in first and rest
    assert all(row["exponent"] == pytest.approx(power) for row in rest)
