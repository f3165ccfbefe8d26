"""A run that reads its policy by kernels learns what one by logits learns."""

import json
import sys
from types import SimpleNamespace

import pytest
import runs
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhf_fn.cli import main
from rlhf_fn.config import ConfigError
from rlhf_fn.reading import reading

pytest.importorskip("triton")
STEPS = ("--steps", 2, "--batch", 4, "--every", 1)


@pytest.fixture(scope="module")
def scores(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "run"
    words = "reward", "--model", small / "model", "--data", small / "pairs.jsonl", "--out", out
    assert main([str(word) for word in (*words, *STEPS)]) == 0
    return out / "reward_model"


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo", "grpo", "ppo", "grpo --lora 2"])
def test_a_run_by_kernels_has_the_metrics_of_one_by_logits(small, scores, tmp_path, command):
    name, *more = command.split()
    told = []
    for kernels in ("", "rlhf_kernels"):
        out = tmp_path / f"by {kernels}"
        words = (*runs.words_of(small, scores)[name], *more, "--kernels", kernels, "--out", out)
        assert main([str(word) for word in (*words, "--steps", 4)]) == 0
        told.append(lines_of(out))
    by_logits, by_kernels = told
    assert len(by_logits) == len(by_kernels) == 4
    for one, other in zip(by_logits, by_kernels):
        for metric, value in one.items():
            # a margin over one's own reference is 0 but for rounding, whose sign is `accuracy`
            if not isinstance(value, str) and "second" not in metric and metric != "accuracy":
                # Adam's updates of small gradients differ by more than these do
                assert other[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric


def test_logits_that_are_more_than_a_linear_layers_are_refused_by_the_option():
    capped = Gemma2ForCausalLM(
        Gemma2Config(**tiny.GROUPED, head_dim=8, final_logit_softcapping=30.0)
    )
    with pytest.raises(ConfigError, match="--kernels: .*changes its logits.*leave it out"):
        reading(SimpleNamespace(kernels="rlhf_kernels", recompute=0, shards=1)).make(capped)


def test_kernels_that_are_not_installed_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlhf_kernels", None)
    with pytest.raises(
        ConfigError, match=r"--kernels rlhf_kernels:.*pip install 'rlhf_fn\[kernels\]'"
    ):
        reading(SimpleNamespace(kernels="rlhf_kernels", recompute=0, shards=1))


def test_a_module_without_these_functions_is_refused_by_the_first_it_lacks():
    with pytest.raises(ConfigError, match="--kernels rlhf_fn.kl:linear_token_logprobs: .*has no"):
        reading(SimpleNamespace(kernels="rlhf_fn.kl", recompute=0, shards=1))


def test_without_the_option_no_kernel_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlhf_kernels", None)
    logits, tokens = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    torch.testing.assert_close(
        reading(SimpleNamespace(kernels="", recompute=0, shards=1)).logprobs(logits, tokens),
        logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0],
    )
