"""The benchmarks of the projection run, at toy size and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent.parent / "kernels" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import assembly  # noqa: E402
import bench  # noqa: E402
import gpu  # noqa: E402
import linear  # noqa: E402
import linear_correctness  # noqa: E402


@pytest.fixture
def machine(monkeypatch):
    """A CPU, the path for one, and as few rounds as tell whether the code runs."""
    race = bench.race
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench, "race", lambda c, m, **_: race(c, m, rounds=2, least=2, warm=1))
    return bench.cpu("eager")._replace(peak=lambda call: [call(), 0][1])


@pytest.mark.compile
def test_the_race_runs_at_toy_size_and_its_rows_come_out(machine, tmp_path, monkeypatch):
    toy = linear.jobs(machine, shapes=[linear.Shape(8, 16, 70)], dtypes=["bf16"], seconds=0.1)
    monkeypatch.setattr(gpu, "jobs", lambda *_: toy)
    rows = gpu.run_section("linear", machine, tmp_path, 60.0)
    assert not bench.failed(rows)
    ran = {row["who"] for row in rows if "both / 3 mm" in row}
    assert {"mm", "ours", "ours, kept", "ours, with H", "F.linear_cross_entropy"} <= ran
    assert {"ours, with H measured", "ours, with hits"} <= ran
    assert {row["target"] for row in rows if "target" in row} == {
        "forward", "both, again", "both, kept"
    }  # fmt: skip
    told = gpu.shown("linear", rows)
    assert "both, kept" in told and "1471850" in told and "cut-cross-entropy" in told


def test_more_tokens_fit_without_logits():
    (row,) = linear.fitting(bench.cpu(), 80 * 10**9)
    assert row["without"] > 20 * row["with logits"] > 0


def claims(machine):
    sizes = [(5, 16, 40), (1, 8, 1)]
    jobs = linear_correctness.jobs(machine, sizes=sizes, slack=4, dtypes=["bf16", "fp32"])
    return bench.run(jobs, 60, lambda rows: None)


def test_the_claims_about_a_projection_hold(machine):
    rows = claims(machine)
    assert len(rows) == 4 * (3 * 4 + 5) and not bench.failed(rows)


def test_a_wrong_projection_is_found(machine, monkeypatch):
    ours = linear_correctness.rlhf_kernels
    right = ours.linear_token_logprobs
    monkeypatch.setattr(ours, "linear_token_logprobs", lambda *x, **k: right(*x, **k) * 1.02)
    assert bench.failed(claims(machine))


def test_every_tile_compiles_for_tensor_cores_without_spills():
    """In a process of its own: here Triton interprets."""
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import assembly, bench, json;"
        "jobs = [(n, lambda f=f: assembly.projected(f, 'bf16'))"
        " for n, f in assembly.PROJECTIONS.items()];"
        "print(json.dumps(bench.run(jobs, 300, lambda rows: None)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    rows = json.loads(run.stdout.splitlines()[-1])
    assert not bench.failed(rows)
    assert {row["kernel"]: row["spills"] for row in rows if row["spills"]} == {}
    tiles = [row for row in rows if row["kernel"] in ("_forward", "_backward")]
    assert len(tiles) == 9
    bare = [row["kernel"] for row in tiles if not row["tensor cores"]]
    assert bare == ["_backward"]  # of the entropy: it reads what is kept
    assert set(assembly.COLUMNS) <= rows[0].keys()
