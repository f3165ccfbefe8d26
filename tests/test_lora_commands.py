"""`--lora RANK`: what is trained, what is saved, and that a run resumes."""

import json

import pytest
import runs
import torch
from cases_lora import ROWS

from rlhf_fn.adapters import load_adapter
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import main
from rlhf_fn.loading import load_policy
from rlhf_fn.lora import merge
from rlhf_fn.models import causal_lm

OPTIONS = {
    "dpo": ("--data", "pairs.jsonl", "--steps", 4, "--batch", 4, "--warmup", 1, "--every", 2),
    "grpo": (
        "--prompts", "prompts.jsonl", "--reward", "rewards_of_text:kindness", "--steps", 2,
        "--batch", 4, "--group", 4, "--new-tokens", 6, "--every", 1,
    ),
}  # fmt: skip


@pytest.fixture
def command(small, tmp_path, capsys):
    """Run a command with an adapter of rank 2: its folder."""

    def call(name, *more, code=0):
        given = [small / x if str(x).endswith(".jsonl") else x for x in OPTIONS[name]]
        words = name, "--model", small / "model", "--out", tmp_path / "out", *given, *more
        assert main([str(word) for word in words]) == code
        return tmp_path / "out"

    return call


@pytest.mark.parametrize("name", OPTIONS)
def test_the_adapter_alone_is_trained_and_policy_is_the_model_with_it(command, small, name):
    out = command(name, "--lora", 2, "--lr", 1e-2)
    module = load_policy(str(small / "model")).module
    adapter, low_rank = load_adapter(module, out / "adapter")
    assert low_rank.rank == 2 and len(adapter) == 2 * 7 and all(x.any() for x in adapter.values())
    base = causal_lm(module)
    expected = merge(module, base.params, adapter, low_rank)
    policy = causal_lm(load_policy(str(out / "policy")).module)
    torch.testing.assert_close(policy.params, expected, rtol=0, atol=0)
    assert not policy.apply(policy.params, *ROWS).equal(base.apply(base.params, *ROWS))
    kept = load_latest(out / "checkpoints" / name).tensors
    assert {n for n in kept if "params/" in n} == {f"params/{n}" for n in adapter}


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_rank_there_is_no_adapter(command, name):
    assert not (command(name) / "adapter").exists()


def test_the_policy_begins_at_its_reference_and_leaves_it(command):
    out = command("grpo", "--lora", 2, "--lr", 1e-1, "--steps", 3)
    first, *_, last = map(json.loads, (out / "metrics.jsonl").open())
    assert abs(first["kl/token"]) < 1e-6 and abs(last["kl/token"]) > 1e-4


def test_a_run_that_is_resumed_ends_in_the_same_bits(command, tmp_path):
    out = command("dpo", "--lora", 2)
    whole = runs.bits(out)
    last = max((out / "checkpoints/dpo").glob("step_*"))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert load_latest(out / "checkpoints/dpo").step == 2
    command("dpo", "--lora", 2, "--resume")
    assert runs.bits(out) == whole


def test_another_rank_is_another_run(command, capsys):
    command("dpo", "--lora", 2)
    command("dpo", "--lora", 3, "--resume", code=2)
    assert "lora: 2 → 3" in capsys.readouterr().err
    command("dpo", "--lora", -1, code=2)
    assert "--lora is -1; it must not be negative" in capsys.readouterr().err
