"""A run under torchrun is the run of one process, up to rounding."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import cases_slices
import pytest
import runs
from safetensors.torch import load_file
from worlds import world

from rlhf_fn import cli
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import main

SHORT = ("--steps", 6, "--every", 2)
WHOLE, SLICES = ("--shards", 1), ("--shards", 2)
LAYERS = (*SLICES, "--layerwise", 1)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "-m", "rlhf_fn.cli")


def torchrun(*words, ranks=2):
    """`torchrun --nproc-per-node ranks -m rlhf_fn.cli words`: (exit code, all that it said)."""
    program = (*TORCHRUN[:3], "--nproc-per-node", str(ranks), *TORCHRUN[3:])
    done = subprocess.run(
        [sys.executable, *program, *map(str, words)],
        env=os.environ | {"PYTHONPATH": runs._PATHS},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def records_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, kept, recompute, more",
    [
        *product(["sft", "reward", "dpo", "grpo", "ppo"], [WHOLE], [0], [()]),
        *product(["sft", "reward", "dpo", "grpo", "ppo"], [SLICES], [0, 1], [()]),
        ("dpo", SLICES, 1, ("--lora", 2, "--dtype", "bfloat16")),
        ("grpo", SLICES, 0, ("--lora", 2)),
        ("grpo", SLICES, 1, ("--lora", 2, "--batch", 1)),  # one rank shares a prompt, one has none
        ("ppo", SLICES, 0, ("--compile", 1, "--batch", 3)),
        ("ppo", LAYERS, 1, ()),
        ("grpo", LAYERS, 1, ("--lora", 2, "--batch", 3)),
    ],
)
def test_two_ranks_log_what_one_process_logs(small, tmp_path, command, kept, recompute, more):
    if command == "ppo":
        scores = runs.words_of(small, "")["reward"]
        assert main([*map(str, scores), *map(str, SHORT), "--out", str(tmp_path / "scores")]) == 0
    recipe = ("--recipe", "dpo") if command == "dpo" else ()
    words = (*runs.words_of(small, tmp_path / "scores/reward_model")[command], *SHORT, *recipe)
    words = (*words, "--recompute", recompute, *more)  # and with shards layer by layer
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    code, said = torchrun(*words, "--out", tmp_path / "two", *kept)
    assert code == 0, said
    assert said.count("report: ") == 1, "one rank speaks"
    same(records_of(tmp_path / "two"), records_of(tmp_path / "one"))
    resumed = [*map(str, words), "--out", str(tmp_path / "two"), "--resume"]
    assert main(resumed) == 0, "one process, of whole parameters, goes on from it"
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    last = [load_latest(tmp_path / name / "checkpoints" / command) for name in ("one", "two")]
    assert last[0].step == last[1].step == 6
    files = (tmp_path / "two/checkpoints" / command / "step_0000000006").glob("*.safetensors")
    written = {name for file in files for name in load_file(file)}
    assert any("#" in name for name in written) == (kept != WHOLE), "slices are of sharded runs"


@pytest.mark.slow
def test_two_ranks_that_evaluate_say_what_one_process_says_if_they_read_the_same(
    small, tmp_path, capfd
):
    scores = runs.words_of(small, "")["reward"]
    assert main([*map(str, scores), *map(str, SHORT), "--out", str(tmp_path / "scores")]) == 0
    of = ("--model", small / "model", "--prompts", small / "prompts.jsonl", "--number", 9)
    judge = tmp_path / "scores/reward_model"
    words = ("evaluate", *of, "--reference", small / "model", "--reward", judge)
    capfd.readouterr()
    assert main([*map(str, words)]) == 0
    alone = capfd.readouterr().out
    code, said = torchrun(*words)
    assert code == 0 and alone in said and "prompts: 9" in alone
    assert world(2, cases_slices.rows_sampled, words) == [[5, 5], [4, 4]], "by both policies"
    other = tmp_path / "other"
    shutil.copytree(small / "model", other)
    (other / "notes.json").write_text("{}")
    for code, said in world(2, cases_slices.evaluated, words, small / "model", other):
        assert code == 2 and "the ranks do not agree on options (rank 0 | rank 1), files" in said


@pytest.mark.slow
def test_a_run_of_two_ranks_that_lost_one_ends_within_a_minute_and_goes_on(small, tmp_path):
    words = (*runs.words_of(small, "")["sft"], "--steps", 200, "--every", 3)
    out = tmp_path / "run"
    program = (*TORCHRUN[:3], "--nproc-per-node", "2", *TORCHRUN[3:])
    agent = runs.start(*words, "--out", out, program=program)
    runs.wait_for_steps(agent, out, 5)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[1]), 9)
    agent.communicate(timeout=60)
    assert agent.returncode != 0
    before = runs.steps_in(out)
    assert 5 <= before < 200
    code, said = torchrun(*words[:-4], "--steps", 200, "--every", 3, "--out", out, "--resume")
    assert code == 0, said
    assert [record["step"] for record in records_of(out)] == list(range(200))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, change, error",
    [
        ("sft", ("--data", "nowhere"), "FileNotFoundError"),
        ("dpo", ("--recipe", "kto"), "ConfigError: kto compares all pairs"),
        ("sft", ("--resume",), "ConfigError: --resume: there is no run"),
        ("sft", ("--device", "cuda:0"), "ValueError: LOCAL_RANK is 0, but this machine has 0 GPUs"),
        ("reward", ("--device", "lazy:0"), "ConfigError: --device lazy:0 is one, for 2 ranks"),
        ("grpo", ("--shards", 3), "ConfigError: --shards is 3, which does not divide the 2 ranks"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(small, tmp_path, command, change, error):
    code, said = torchrun(*runs.words_of(small, "")[command], *change, "--out", tmp_path / "run")
    assert code != 0 and f": {error}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_ends_all_ranks_after_one_step_that_is_saved(small, tmp_path):
    words = (*runs.words_of(small, "")["sft"], "--steps", 500, "--every", 1000)
    out = tmp_path / "run"
    program = (*TORCHRUN[:3], "--nproc-per-node", "2", *TORCHRUN[3:])
    agent = runs.start(*words, "--out", out, program=program)
    runs.wait_for_steps(agent, out, 5)
    agent.terminate()
    _, said = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert load_latest(out / "checkpoints/sft").step == runs.steps_in(out) >= 5, said


ENDS = """
import atexit, os
from rlhf_fn import cli

class Kept:
    def __del__(self, say=os.write):
        say(1, b"taken down")

def main():
    cli.kept = Kept()
    atexit.register(print, "exit functions")
    print("main", end=", ")
    return 3

cli.main = main
cli.program()
"""


@pytest.mark.parametrize("rank, said", [(None, ["taken down"]), ("0", [])])
def test_a_rank_ends_with_its_code_and_all_it_said_before_the_interpreter_does(rank, said):
    """What gloo's threads free later would find none and abort."""
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    env = alone | {"PYTHONPATH": runs._PATHS} | ({"RANK": rank} if rank else {})
    done = subprocess.run([sys.executable, "-c", ENDS], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (3, ["main, exit functions", *said])
    assert not done.stderr


@pytest.mark.parametrize("compiles, seconds", [(0, cli.SILENCE), (1, cli.COMPILING)])
def test_ranks_wait_longer_for_one_that_compiles(monkeypatch, tmp_path, compiles, seconds):
    asked = []

    def joined(*, timeout, gpus):
        asked.append(timeout)
        raise OSError("no rank is there")

    monkeypatch.setattr("rlhf_fn.ranks.joined", joined)
    words = ("--model", tmp_path, "--data", tmp_path, "--out", tmp_path, "--compile", compiles)
    assert main(["sft", *map(str, words)]) == 2
    assert asked == [seconds]
