"""The race with TRL: our side makes its steps, and its table is what the laps said."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import benchmark_trl  # noqa: E402
import race_ours  # noqa: E402
from race_setting import Job  # noqa: E402

JOBS = ("sft", "reward", "dpo", "grpo", "ppo")


@pytest.fixture
def eager(monkeypatch):
    """Without the compiler, whose graphs other tests look at."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(race_ours.engine, "compiled", lambda decoder: decoder)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_makes_its_steps(eager, name):
    lap = race_ours.JOBS[name](Job(name, 16, "float32"))
    losses = [lap() for _ in range(2)]
    assert all(map(math.isfinite, losses)) and losses[0] != losses[1]
    if name == "dpo":  # at first the policy is its reference
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    if name == "sft":
        assert losses[0] == pytest.approx(math.log(16), abs=0.5)


class Said:
    """A side that says what it was told to."""

    def __init__(self, laps):
        self.laps = iter(laps)

    def lap(self):
        return next(self.laps)

    def end(self):
        pass


def test_a_row_has_the_median_of_the_ratios_and_the_worst_gap_of_the_losses(monkeypatch):
    def laps(seconds, losses):
        return [{"seconds": s, "loss": x, "peak": 2e6} for s, x in zip(seconds, losses)]

    ours = Said(laps([9.0, 8.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]))
    theirs = Said(laps([5.0, 5.0, 3.0, 4.0, 4.0], [1.0, 1.0, 1.25, 1.0, 1.0]))
    sides = {"race_ours.py": ours, "race_trl.py": theirs}
    monkeypatch.setattr(benchmark_trl, "Side", lambda python, script, job: sides[script])
    rates = benchmark_trl.Rates({"float32": 1e12}, 1e10)
    row = benchmark_trl.raced(Job("sft", 16, "float32"), "python", 3, rates)
    assert row["TRL / ours"] == 3.0 and row["ours ms"] == 1000 and row["TRL ms"] == 4000
    assert row["ours first s"] == 9.0 and float(row["losses differ"]) == 0.25
    assert row["ours MB"] == row["TRL MB"] == 2.0


def test_a_side_that_ends_says_why():
    side = benchmark_trl.Side(sys.executable, "race_ours.py", Job("nothing", 16, "float32"))
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        side.lap()
    side.end()


@pytest.mark.parametrize("name", JOBS)
def test_the_floor_is_work_over_rate(name):
    job, rates = Job(name, 512, "float32"), benchmark_trl.Rates({"float32": 1e11}, 1e10)
    twice = benchmark_trl.Rates({"float32": 2e11}, 2e10)
    floor = benchmark_trl.floor(job, rates)
    assert 0.01 < floor < 10 and floor == pytest.approx(2 * benchmark_trl.floor(job, twice))
