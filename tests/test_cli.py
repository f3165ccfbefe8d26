"""The commands as a person types them."""

import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import tiny
import torch

from rlhf_fn import random, toy
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import COMMANDS, main, parser
from rlhf_fn.heads import reward_model
from rlhf_fn.loading import POOLS, load_scores

DATA = Path(__file__).parents[2] / "shared" / "data"


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_fits_one_screen(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100


def test_help_does_not_wait_for_torch():
    code = "import sys; from rlhf_fn.config import Ppo; print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_sft_reward_and_ppo_train_and_save_what_transformers_loads(small, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    common = ("--steps", 4, "--batch", 4, "--every", 2)
    assert run("sft", "--model", small / "model", "--data", small / "instructions.jsonl",
               "--out", tmp_path / "sft", *common) == 0  # fmt: skip
    assert run("reward", "--model", tmp_path / "sft/policy", "--data", small / "pairs.jsonl",
               "--out", tmp_path / "reward", *common) == 0  # fmt: skip
    assert run("ppo", "--model", tmp_path / "sft/policy",
               "--reward", tmp_path / "reward/reward_model",
               "--safety", tmp_path / "reward/reward_model", "--safety-weight", 0.5,
               "--prompts", small / "prompts.jsonl", "--out", tmp_path / "ppo",
               "--target-kl", 2, "--new-tokens", 8, *common) == 0  # fmt: skip
    assert run("evaluate", "--model", tmp_path / "ppo/policy",
               "--reference", tmp_path / "sft/policy",
               "--reward", tmp_path / "reward/reward_model", "--prompts", small / "prompts.jsonl",
               "--number", 8, "--new-tokens", 8) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "held-out perplexity after" in printed and "win rate" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/policy")
    AutoTokenizer.from_pretrained(tmp_path / "ppo/policy")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward/reward_model")
    assert scorer.config.num_labels == 1
    for stage in ("sft", "reward", "ppo"):
        folder = tmp_path / stage
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
        assert "![" in (folder / "report.md").read_text() and list((folder / "plots").iterdir())


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_reward_model_is_loaded_as_it_was_trained(small, tmp_path, pool):
    out = tmp_path / "run"
    assert run("reward", "--model", small / "model", "--data", small / "pairs.jsonl", "--out", out,
               "--pool", pool, "--steps", 2, "--lr", 0.1, "--batch", 4) == 0  # fmt: skip
    module, scores = load_scores(str(out / "reward_model"), toy.tokenizer())
    best = load_latest(out / "checkpoints/reward").tensors
    for name, x in scores.params.items():
        assert torch.equal(x, best[f"params/{name}"])
    tokens, attention = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]])
    apply = reward_model(module, random.key(0), pool=POOLS[pool]).apply
    expected = apply(scores.params, tokens, attention)
    assert torch.equal(scores.apply(scores.params, tokens, attention), expected)


@pytest.mark.parametrize(
    "broken, message",
    [
        ('{"prompt": "about the fox near the lake :", "completion": ', ":2:"),
        ('{"prompt": "about the fox near the lake :"}', "completion"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line_before_the_run_begins(
    small, tmp_path, capsys, broken, message
):
    good = (small / "instructions.jsonl").read_text().splitlines()[0]
    data = tmp_path / "bad.jsonl"
    data.write_text(f"{good}\n{broken}\n")
    code = run("sft", "--model", small / "model", "--data", data, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert code == 2 and "bad.jsonl:2" in error and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_missing_input_is_one_sentence(small, tmp_path, capsys, missing):
    words = {"model": small / "model", "data": small / "instructions.jsonl"}
    words[missing] = tmp_path / "nowhere"
    code = run("sft", "--model", words["model"], "--data", words["data"], "--out", tmp_path / "out")
    assert code == 2 and "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_model_of_another_vocabulary_is_refused(small, tmp_path, capsys):
    if not DATA.exists():
        pytest.skip("needs a second tokenizer: the shared data folder is not there")
    code = run("ppo", "--model", DATA / "models/stories260K",
               "--reward", DATA / "models/stories260K",
               "--prompts", small / "prompts.jsonl", "--out", tmp_path / "out")  # fmt: skip
    assert code == 2 and "weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ALL = """
import sys
import termios
from rlhf_fn.cli import main
model, data, out, *common = sys.argv[1:]
for words in (
    ("sft", "--model", model, "--data", f"{data}/instructions.jsonl"),
    ("reward", "--model", f"{out}/sft/policy", "--data", f"{data}/pairs.jsonl"),
    ("ppo", "--model", f"{out}/sft/policy", "--reward", f"{out}/reward/reward_model",
     "--prompts", f"{data}/prompts.jsonl", "--new-tokens", "6"),
):
    assert main([*words, *common, "--out", f"{out}/{words[0]}"]) == 0
"""


def stderr_of_all_commands(small, folder, **options):
    tokenizer = toy.tokenizer()
    tokenizer.model_max_length = 8  # shorter than the rows, of which transformers would warn
    tiny.save_toy(folder / "model", tokenizer)
    words = [folder / "model", small, folder / "out", "--steps", "2", "--batch", "4"]
    return subprocess.run(
        [sys.executable, "-c", ALL, *map(str, words)], stdout=subprocess.PIPE, check=True, **options
    ).stderr


def test_stderr_is_silent_where_it_is_no_terminal(small, tmp_path):
    assert stderr_of_all_commands(small, tmp_path, stderr=subprocess.PIPE) == b""


def test_a_terminal_shows_bars_with_speed_and_loss_and_no_warnings(small, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(iter(lambda: _read(ours), b"")))
    reader.start()
    stderr_of_all_commands(small, tmp_path, stderr=theirs)
    os.close(theirs)
    reader.join()
    text = b"".join(seen)
    for stage in (b"sft", b"reward", b"ppo"):
        assert stage + b": 100%|" in text
    assert b"tokens/s, loss" in text and b"\r" in text
    assert b"longer than" not in text and b"REPORT" not in text


def _read(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.slow
def test_the_pipeline_satisfies_the_true_preference_of_people(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "rlhf_fn.cli", "pipeline", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, env=dict(os.environ), check=True,
    )  # fmt: skip
    rate = float(out.stdout.split("win rate over the reference, 95 % interval: ")[1].split()[0])
    assert rate >= 0.85
    assert "\r" not in out.stdout and "tokens/s" not in out.stderr  # no bars without a terminal
