"""The benchmarks run, at toy size and without a GPU: a typo must not be found on a rented one."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parent.parent / "kernels" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import assembly  # noqa: E402
import bench  # noqa: E402
import commands  # noqa: E402
import correctness  # noqa: E402
import gpu  # noqa: E402
import hard  # noqa: E402
import large_grpo  # noqa: E402
import large_sampling  # noqa: E402
import large_training  # noqa: E402
import llamas  # noqa: E402
import logits  # noqa: E402
import peers  # noqa: E402
import scans  # noqa: E402
import step  # noqa: E402
import sweep  # noqa: E402
import targets  # noqa: E402
import train  # noqa: E402

TINY = step.Size(vocab=32, width=16, layers=1, heads=2, batch=2, time=8)
SHAPE = llamas.Shape(32, 16, 24, 1, 4, 2, tied=True)
TOYS = {
    "correctness": lambda m: [
        *correctness.jobs(m, vocabs=(70,), middle=65, dtypes=["bf16"], slack=4),
        *hard.jobs(m, vocab=70, beyond=700, batches=(1, 9)),
        *commands.jobs(m, steps=1, batch=2),
    ],
    "targets": lambda m: targets.jobs(m, shapes=[(4, 70)], whole=(4, 70), few=(2, 70), seconds=0.1),
    "sweep": lambda m: sweep.jobs(m, shapes=[(4, 130)], blocks=(64,), warps=(1, 2), seconds=0.1),
    "step": lambda m: step.jobs(m, size=TINY, seconds=0.1),
    "peers": lambda m: peers.jobs(m, vocab=70),
    "scans": lambda m: scans.jobs(m, shapes=[(4, 70)], checked=[(3, 9)], seconds=0.1),
    "logits": lambda m: logits.jobs(m, shapes=[(4, 70)], draws=[(2, 70)], dtypes=["bf16"]),
    "large_sampling": lambda m: large_sampling.jobs(
        m, size=large_sampling.Size(SHAPE, rows=(2, 3), prompt=4, new=5), seconds=0.1
    ),
    "large_training": lambda m: large_training.jobs(m, size=train.Size(SHAPE, 4, 16), seconds=0.1),
    "large_grpo": lambda m: large_grpo.jobs(
        m, size=large_grpo.Size(SHAPE, prompts=3, group=2, prompt=4, new=5), seconds=0.1
    ),
}


@pytest.fixture
def machine(monkeypatch):
    """A CPU, the kernels' path for one, and as few rounds as tell whether the code runs."""
    race = bench.race
    monkeypatch.setattr(bench, "race", lambda c, m, **_: race(c, m, rounds=2, least=2, warm=1))
    monkeypatch.setattr(bench, "CACHE", 0)
    monkeypatch.setattr(sweep.kernel_rows, "interpreted", lambda: False)
    monkeypatch.setattr(targets, "predicted", lambda *_: 0.9)
    torch.manual_seed(0)
    return bench.cpu("eager")._replace(peak=lambda call: [call(), 0][1])


@pytest.mark.compile
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in gpu.EARLY)) for n in TOYS]
)
def test_a_section_runs_at_toy_size_and_its_rows_come_out(name, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "jobs", lambda name, machine: TOYS[name](machine))
    turn = None
    if name in gpu.EARLY:
        (turn := tmp_path / "turn").touch()
    rows = gpu.run_section(name, machine, tmp_path, 60.0, turn)
    assert rows and not bench.failed(rows), bench.failed(rows)
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(rows))
    assert gpu.finish(machine, {name: rows}, tmp_path) == 0
    assert gpu.shown(name, rows) == import_module(gpu.SECTIONS[name].modules[0]).shown(rows)
    told = (tmp_path / "RESULTS.md").read_text()
    assert torch.__version__ in told and gpu.SECTIONS[name].title in told
    assert json.loads((tmp_path / "results.json").read_text())["rows"][name]


def test_a_job_that_fails_does_not_stop_the_others_and_fails_the_run(machine, tmp_path):
    def broken():
        raise RuntimeError("no such kernel")

    jobs = [("first", broken), ("second", lambda: [{"what": "fine"}])]
    rows = bench.run(jobs, 60, lambda rows: None)
    assert [row["status"] for row in rows] == ["FAILED", "ok"]
    assert gpu.finish(machine, {"correctness": rows}, tmp_path) == 1
    assert "no such kernel" in (tmp_path / "RESULTS.md").read_text()


def test_a_wrong_kernel_is_found(machine, monkeypatch):
    right = correctness.rlhf_kernels.token_logprobs_and_entropy

    def off(x, y, **options):
        logp, entropy = right(x, y, **options)
        return logp, entropy * (1 + 1e-5)

    monkeypatch.setattr(correctness.rlhf_kernels, "token_logprobs_and_entropy", off)
    assert bench.failed(correctness.agree(machine, 65, "fp32", slack=correctness.SLACK))


def test_a_contender_that_raises_is_out_of_the_race_and_no_other(machine):
    times = bench.race({"a": lambda i: i, "b": lambda i: 1 / 0}, machine, rounds=3)
    assert times["a"].low <= times["a"].median <= times["a"].high
    assert times["b"].startswith("ZeroDivisionError")


def test_memory_is_what_a_call_holds_at_once():
    x = torch.zeros(2**20)
    assert abs(bench.cpu().peak(lambda: (x + 1) * 2) / x.nbytes - 2) < 0.01


def test_the_swept_plan_is_the_one_that_kernels_ask_for_and_is_put_back():
    usual = sweep.default((8, 32000))
    with sweep.plan((1024, 4, 2)):
        assert sweep.default((8, 32000)) == (1024, 4, 2)
    assert sweep.default((8, 32000)) == usual


def test_without_a_gpu_it_says_so_and_a_section_that_ends_badly_is_a_failure(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (row,) = gpu.end("peers", gpu.begin("peers", tmp_path, 60.0), tmp_path, 60.0)
    assert row["why"] == "ended with status 2" and bench.failed([row])
    assert "need a GPU" in capfd.readouterr().out


SCRIPT = """
import json, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, folder, turn = given["--section"], Path(given["--out"]), given.get("--turn")
begun = time.time()
(folder / f"{name}.json").write_text('[{"job": "first", "status": "ok"}]')
awaited = Path(turn) if turn else folder / "early.json"
while name != "last" and not awaited.exists():
    time.sleep(0.01)
row = {"job": name, "status": "ok", "begun": begun, "ended": time.time()}
(folder / f"{name}.json").write_text(json.dumps([row]))
"""


@pytest.fixture
def acted(tmp_path, monkeypatch):
    """Sections that a script plays; the first waits for the early one to have begun."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(gpu, "__file__", str(script))
    names = ("first", "early", "last")
    monkeypatch.setattr(gpu, "SECTIONS", {n: gpu.Section(n, 20, ()) for n in names})
    monkeypatch.setattr(gpu, "EARLY", ("early",))


def test_a_section_that_hangs_is_stopped_and_keeps_its_rows(acted, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECTIONS", {"hangs": gpu.Section("", 0.5, ())})
    monkeypatch.setattr(gpu, "EARLY", ())
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    rows = gpu.run_all(tmp_path)["hangs"]
    assert rows[0]["job"] == "first" and rows[1]["why"].startswith("stopped after")
    assert bench.failed(rows) == rows[1:]


def test_an_early_section_begins_with_the_first_and_times_nothing_before_its_turn(acted, tmp_path):
    rows = {name: rows[0] for name, rows in gpu.run_all(tmp_path).items()}
    assert rows["early"]["begun"] < rows["first"]["ended"] < rows["early"]["ended"]
    assert rows["last"]["begun"] > rows["early"]["ended"]
    assert not [*tmp_path.glob("*.turn")]


def test_when_the_time_is_up_the_other_sections_are_not_begun(acted, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ALL", gpu.GRACE)
    results = gpu.run_all(tmp_path)
    assert all(row["status"] == "skipped" for rows in results.values() for row in rows)


def test_the_jobs_after_the_first_wait_for_their_turn(machine, tmp_path, monkeypatch):
    turn, seen = tmp_path / "turn", []

    def job(name):
        return lambda: seen.append((name, turn.exists())) or [{"what": name}]

    monkeypatch.setattr(gpu, "jobs", lambda *_: iter([("a", job("a")), ("b", job("b"))]))
    monkeypatch.setattr(gpu, "wait", lambda turn: turn.touch())
    rows = gpu.run_section("peers", machine, tmp_path, 60.0, turn)
    assert seen == [("a", False), ("b", True)] and [r["what"] for r in rows] == ["a", "b"]


def test_nobody_waits_for_a_turn_that_never_comes(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ALL", 0.2)
    monkeypatch.setattr(gpu, "jobs", lambda *_: iter([("a", lambda: [{"what": 1}])]))
    rows = gpu.run_section("peers", machine, tmp_path, 60.0, tmp_path / "turn")
    assert "TimeoutError" in rows[-1]["why"] and rows[0]["what"] == 1


@pytest.mark.slow
@pytest.mark.compile
def test_turns_as_cuda_graphs_draw_what_sample_draws_in_one_graph(machine):
    size = large_sampling.Size(SHAPE, rows=(2, 3), prompt=4, new=5)
    ways = large_sampling.contenders(machine, size)
    bench.compiled_anew()
    torch._dynamo.utils.counters.clear()
    for rows in (3, 2, 3):
        asked = large_sampling.asked(machine, size, rows)
        plain, recorded = (ways[f"sample{w}"](*asked) for w in ("", ", CUDA graphs"))
        assert torch.equal(plain.tokens, recorded.tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_limits_of_half_a_billion_parameters_are_those_of_its_weights_and_its_cache():
    shape, size = llamas.HALF_BILLION, large_sampling.Size()
    assert shape.products == pytest.approx(0.494e9, rel=1e-3)
    cached = 2 * 2 * 24 * 128 * (64 + 65 / 2)  # bytes a row: keys and values, layers, two heads
    wanted = 16 * 3e12 / (2 * shape.products + 16 * cached)
    assert size.limit(16, 3e12) == pytest.approx(wanted)


def test_utilisation_is_a_share_of_what_the_gpu_names(monkeypatch):
    size = train.Size(llamas.HALF_BILLION, batch=8, time=1024)
    assert large_training.mfu(size, 0.1) == "?" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    flops = 8192 * (6 * 0.494e9 + 6 * 24 * 896 * 1024)
    assert large_training.mfu(size, 0.1) == pytest.approx(flops / 0.1 / 989e12, rel=1e-3)


def test_every_kernel_compiles_for_a_gpu_without_spills():
    """In a process of its own: here Triton interprets."""
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import assembly, bench, json;"
        "rows = bench.run(assembly.jobs(dtypes=['bf16'], vocab=8192), 300, lambda rows: None);"
        "print(json.dumps(rows))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    rows = json.loads(run.stdout.splitlines()[-1])
    assert not bench.failed(rows)
    assert {row["kernel"]: row["spills"] for row in rows if row["spills"]} == {}
    assert set(assembly.COLUMNS) <= rows[0].keys()
