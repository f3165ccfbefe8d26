"""Commands compute where they are told to: nothing of a step stays behind on the CPU.

The device is one of `elsewhere.py`, which refuses what a GPU refuses. It computes on the CPU, if by
other kernels than the CPU's own.
"""

import json

import pytest
from elsewhere import THERE, Elsewhere
from runs import words_of

from rlhf_fn import room, sampler
from rlhf_fn.cli import main
from rlhf_fn.engine import MemoryPlan

SHORT = ("--steps", 3, "--every", 2)
SCORES = object()  # stands for the folder of the reward model
RUNS = [
    ("sft", ()),
    ("reward", ("--pool", "mean")),
    ("dpo", ("--lora", 2, "--recipe", "dpo")),
    ("ppo", ("--safety", SCORES)),
    ("grpo", ("--recipe", "remax", "--group", 1)),
    ("grpo", ("--reward", SCORES, "--lora", 2, "--dtype", "bfloat16")),
]


def run(*words, device):
    with Elsewhere():
        assert main([str(word) for word in (*words, *SHORT, "--device", device)]) == 0


@pytest.fixture(scope="module")
def scores(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    run(*words_of(small, "")["reward"], "--out", folder / "run", device="cpu")
    return folder / "run/reward_model"


@pytest.fixture
def unplanned(monkeypatch):
    """No plans of memory: fake tensors, by which they are made, do not know this device."""
    nothing = MemoryPlan(weights=0, cache=0, copied=0, logits=0, rollout=0)
    monkeypatch.setattr(sampler, "memory_plan", lambda *_, **sizes: nothing)
    monkeypatch.setattr(room, "peak_bytes", lambda *_: 0)


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize("command, more", RUNS)
def test_a_run_elsewhere_is_one_here(small, scores, tmp_path, command, more):
    words = *words_of(small, scores)[command], *(scores if x is SCORES else x for x in more)
    for device in ("cpu", THERE):
        run(*words, "--out", tmp_path / str(device), device=device)
    here, there = (records(tmp_path / str(device)) for device in ("cpu", THERE))
    assert len(here) == len(there) == 3
    noise = 1e-4 if "bfloat16" in more else 1e-6
    for one, other in zip(here, there):
        assert other == pytest.approx(one, rel=1e-4, abs=noise)


def records(out):
    """The numbers of every step."""
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name != "stage"} for line in lines]


@pytest.mark.usefixtures("unplanned")
def test_a_verdict_elsewhere_is_one_here(small, scores, capsys):
    model = ("--model", small / "model", "--reference", small / "model", "--reward", scores)
    prompts = ("--prompts", small / "prompts.jsonl", "--number", 4, "--new-tokens", 6)
    said = []
    for device in ("cpu", THERE):
        with Elsewhere():
            assert main([str(x) for x in ("evaluate", *model, *prompts, "--device", device)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["cuda:99", "quark"])
def test_a_device_that_is_not_there_is_one_sentence(small, tmp_path, capsys, name):
    words = *words_of(small, "")["sft"], "--out", tmp_path / "out", "--device", name
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert f"--device {name}" in error and "cpu" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()
