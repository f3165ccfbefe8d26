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
    assert all(row["extra MB"] == 8 for row in rows if row["what"] == "step")
    assert all(0 < row["extra MB"] < 1 for row in rows if row["what"] == "sampling")
    growth.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_the_time(machine, monkeypatch, power):
    def taken(contenders, machine, **_):
        seconds = {name: call(0) ** power for name, call in contenders.items()}
        return {name: bench.Times(each, each, each, 0) for name, each in seconds.items()}

    monkeypatch.setattr(bench, "race", taken)
    monkeypatch.setattr(
        growth, "MADE", {"step": lambda m, size: (lambda: size.batch, size.batch, None)}
    )
    rows = growth.raised(machine, "step", "batch", 1.0)
    assert "exponent" not in rows[0] and len(rows) == len(growth.AXES["batch"][1])
    assert all(row["exponent"] == pytest.approx(power) for row in rows[1:])
    (brief,) = growth.compact(rows)
    assert brief["exponent of the last"] == pytest.approx(power)
    each = [float(text) for text in brief["µs per token"].split(" · ")]
    assert each == pytest.approx([r["value"] ** (power - 1) * 1e6 for r in rows], rel=0.01)
    assert brief["from … to"] == "1 … 256"


def test_the_short_table_leaves_out_what_failed_and_the_long_one_says_why(machine, monkeypatch):
    def broken(machine, size):
        raise RuntimeError("no memory")

    monkeypatch.setattr(growth, "AXES", {name: (TINY, (8, 16)) for name in growth.AXES})
    monkeypatch.setitem(growth.MADE, "step", broken)
    rows = bench.run(growth.jobs(machine), 60.0, lambda rows: None)
    assert {row["of"] for row in growth.compact(rows)} == {"sampling"}
    assert "step by batch: FAILED, RuntimeError: no memory" in growth.shown(rows)
