"""A run that was killed, however often and whenever, ends in the bits of one that never was."""

import json
import random
import signal

import pytest
import runs
from runs import bits, kill, start, steps_in, wait_for_steps

from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import main

COMMANDS = ("sft", "reward", "dpo", "ppo", "grpo")


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """Each command's options, and its run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    words = runs.words_of(small, folder / "reward/reward_model")
    for command in COMMANDS:
        assert run(*words[command], "--out", folder / command) == 0
    return words, folder


def records_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def test_a_reward_model_stops_when_its_held_out_loss_no_longer_falls_and_is_the_best_one(whole):
    _, folder = whole
    losses = [r["held-out loss"] for r in records_of(folder / "reward") if "held-out loss" in r]
    assert losses.index(min(losses)) == len(losses) - 3, "patience is 2"
    report = (folder / "reward/report.md").read_text()
    assert f"| held-out loss (log 2 is chance, 0.693) | {min(losses):.3f} |" in report


def test_every_step_has_rows_of_its_own(whole):
    _, folder = whole
    assert len({r["tokens"] for r in records_of(folder / "sft")}) > 3


def test_the_run_that_is_killed_has_all_that_could_be_lost(whole):
    words, folder = whole
    assert steps_in(folder / "reward") < 24, "the reward model stopped early"
    records = records_of(folder / "ppo")
    assert len({r["kl/coef"] for r in records}) > 4, "the KL coefficient adapts"
    assert any(r["updates"] == 4 for r in records)
    state = load_latest(folder / "ppo/checkpoints/ppo").tensors
    named = {name.split("/")[0]: name for name in state}
    assert named.keys() == {"actor", "critic", "kl_coef"}
    assert sum("opt_state" in name for name in state) > 20


@pytest.mark.parametrize(
    "command, steps", [("sft", 7), ("reward", 4), ("dpo", 8), ("ppo", 10), ("grpo", 8)]
)
def test_a_killed_run_is_resumed_to_the_same_bits(whole, tmp_path, command, steps):
    words, folder = whole
    assert kill(start(*words[command], "--out", tmp_path / "run"), tmp_path / "run", steps)
    assert steps <= steps_in(tmp_path / "run") < steps_in(folder / command)
    assert run(*words[command], "--out", tmp_path / "run", "--resume") == 0
    assert bits(tmp_path / "run") == bits(folder / command)


def test_sigterm_ends_a_run_after_its_step_with_143_and_resumes_to_the_same_bits(whole, tmp_path):
    words, folder = whole
    process = start(*words["ppo"], "--out", tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 4)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert (process.returncode, error) == (143, "")
    done = load_latest(tmp_path / "run/checkpoints/ppo").step
    assert 4 <= done == steps_in(tmp_path / "run") < 24
    assert run(*words["ppo"], "--out", tmp_path / "run", "--resume") == 0
    assert bits(tmp_path / "run") == bits(folder / "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_killed_four_times_is_resumed_to_the_same_bits(whole, tmp_path, command):
    words, folder = whole
    out, draw, kills = tmp_path / "run", random.Random(command), 0
    last = steps_in(folder / command)
    for steps in sorted(draw.sample(range(last - 1), 3)) + [last - 1]:
        process = start(*words[command], "--out", out, *runs.resume(out))
        kills += kill(process, out, steps, draw.uniform(0, 0.05))
    assert kills >= 3
    assert run(*words[command], "--out", out, *runs.resume(out)) == 0
    assert bits(out) == bits(folder / command)


@pytest.mark.slow
def test_a_pipeline_killed_in_each_of_its_stages_is_resumed_to_the_same_bits(tmp_path):
    small = {"program": ("-c", runs.PIPELINE)}
    process = start("pipeline", "--out", tmp_path / "whole", **small)
    assert process.communicate()[1] == "" and process.returncode == 0
    out = tmp_path / "run"
    for stage, step in (("sft", 5), ("reward", 3), ("ppo", 1), ("ppo", 4)):
        before = {"sft": 0, "reward": 8, "ppo": 14}[stage]
        process = start("pipeline", "--out", out, *runs.resume(out), **small)
        assert kill(process, out, before + step)
        assert json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-1])["stage"] == stage
    process = start("pipeline", "--out", out, "--resume", **small)
    process.communicate()
    assert process.returncode == 0
    assert bits(out) == bits(tmp_path / "whole")
    assert {stage.name for stage in (out / "checkpoints").iterdir()} == {"sft", "reward", "ppo"}
