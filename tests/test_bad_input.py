"""Bad inputs of the commands: one sentence that names what is wrong, before `--out` is made."""

import gzip
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from rlhf_fn import data, toy
from rlhf_fn.cli import main
from rlhf_fn.frame import tokenised_pairs
from rlhf_fn.readers import Pair

STEPS = ("--steps", 2, "--batch", 4, "--every", 1)


def run(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as ended:  # argparse
        return ended.code


@pytest.fixture(scope="module")
def scores(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "run"
    words = "reward", "--model", small / "model", "--data", small / "pairs.jsonl", "--out", out
    assert run(*words, *STEPS) == 0
    return out / "reward_model"


@pytest.fixture
def command(small, scores, tmp_path, capsys):
    """Run a command with some of its options replaced: (exit code, stderr, its folder)."""
    words = {
        "sft": {"--model": small / "model", "--data": small / "instructions.jsonl"},
        "reward": {"--model": small / "model", "--data": small / "pairs.jsonl"},
        "dpo": {"--model": small / "model", "--data": small / "pairs.jsonl"},
        "ppo": {"--model": small / "model", "--reward": scores, "--new-tokens": 6,
                "--prompts": small / "prompts.jsonl"},
    }  # fmt: skip

    def call(name, **changes):
        given = words[name] | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
        out = tmp_path / "out"
        code = run(name, *STEPS, *(w for pair in given.items() for w in pair), "--out", out)
        return code, capsys.readouterr().err, out

    return call


def refused(result, *names):
    code, error, out = result
    assert code == 2 and not out.exists()
    assert error.count("\n") == 1 and all(name in error for name in names), error


@pytest.mark.parametrize(
    "name, option, value",
    [("sft", "lr", "nan"), ("sft", "lr", "inf"), ("sft", "steps", 0), ("sft", "max_length", 1),
     ("sft", "seed", -1), ("sft", "held_out", 0), ("reward", "pool", "max"),
     ("sft", "dtype", "half"), ("dpo", "compile", 2),
     ("reward", "part", "3/2"), ("ppo", "temperature", 0), ("ppo", "lam", 1.1),
     ("ppo", "discount", -0.1), ("ppo", "clip", 0), ("ppo", "kl_coef", -1),
     ("ppo", "accumulate", 9), ("ppo", "new_tokens", 0), ("reward", "recompute", 2),
     ("sft", "window", 0), ("dpo", "shards", 0)],
)  # fmt: skip
def test_an_option_out_of_range_is_named_with_its_value(command, name, option, value):
    refused(command(name, **{option: value}), f"--{option.replace('_', '-')} is")


def test_what_recomputes_is_not_compiled(command):
    refused(command("sft", compile=1, recompute=1), "--recompute 1", "leave out --compile")


@pytest.mark.parametrize("words", [{"step": 3}, {"learning_rate": 1}, {"lr": "fast"}])
def test_an_unknown_shortened_or_mistyped_option_is_refused(command, words):
    code, error, out = command("sft", **words)
    assert code == 2 and not out.exists() and next(iter(words)).replace("_", "-") in error


def model_without(**tokens):
    """A model whose tokenizer lacks a token."""

    def make(folder, small):
        tokenizer = toy.tokenizer()
        for name in tokens:
            setattr(tokenizer, name, None)
        tiny.save_toy(folder, tokenizer)

    return make


def model_with(**config):
    return lambda folder, small: tiny.save_toy(folder, **config)


def damaged(name, change, source="model"):
    """A copy of a sound model, one file of it changed (None: removed)."""

    def make(folder, small):
        shutil.copytree(small / source, folder)
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if change is not None:
            (folder / name).write_bytes(change(content))

    return make


def encoder(folder, small):
    sizes = {"vocab_size": 78, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)


MODELS = {
    "no EOS": (model_without(eos_token=None), ("TokenizerError", "no EOS token", "set one")),
    "ids beyond the model": (model_with(vocab_size=20), ("ids up to 77", "only [0, 20)")),
    "too few positions": (model_with(max_position_embeddings=8), ("--", "has 8 positions; lower")),
    "no config": (damaged("config.json", None), ("made", "model_type")),
    "broken config": (damaged("config.json", lambda b: b"{"), ("made/config.json", "JSON")),
    "no weights": (damaged("model.safetensors", None), ("no file named model.safetensors", "made")),
    "half the weights": (damaged("model.safetensors", lambda b: b[:-9]), ("made", "damaged")),
    "no tokenizer": (damaged("tokenizer.json", None), ("TokenizerError", "made", "tokenizer.json")),
    "broken tokenizer": (damaged("tokenizer.json", lambda b: b"{"), ("TokenizerError", "made")),
    "nothing": (lambda folder, small: None, ("made",)),
    "an empty folder": (lambda folder, small: folder.mkdir(), ("made",)),
}


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_used_is_named(command, small, tmp_path, name, what):
    make, says = MODELS[what]
    make(tmp_path / "made", small)
    refused(command(name, model=tmp_path / "made"), *says)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_tokenizer_without_a_pad_token_pads_with_its_eos(command, small, tmp_path, name):
    model_without(pad_token=None)(tmp_path / "made", small)
    code, error, _ = command(name, model=tmp_path / "made")
    assert (code, error) == (0, "")


@pytest.mark.parametrize("change, says", [(lambda x: None, "norm"), (lambda x: x[:3], "norm")])
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_missing_or_misshapen_weight_is_named_and_not_drawn_at_random(
    command, small, tmp_path, name, change, says
):
    shutil.copytree(small / "model", tmp_path / "made")
    weights = load_file(tmp_path / "made/model.safetensors")
    weights["model.norm.weight"] = change(weights["model.norm.weight"])
    kept = {k: x for k, x in weights.items() if x is not None}
    save_file(kept, tmp_path / "made/model.safetensors", metadata={"format": "pt"})
    refused(command(name, model=tmp_path / "made"), "made", "model.norm.weight", "at random")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name, option", [("sft", "model"), ("reward", "model"), ("ppo", "reward")])
def test_a_pickled_model_is_not_opened(command, small, tmp_path, name, option):
    shutil.copytree(small / "model", tmp_path / "made")
    (tmp_path / "made/model.safetensors").unlink()
    torch.save({"x": Canary(tmp_path / "canary")}, tmp_path / "made/pytorch_model.bin")
    refused(command(name, **{option: tmp_path / "made"}), "made", "safetensors")
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "made/pytorch_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists(), "the canary would not have sung"


def test_a_policy_is_no_reward_model(command, small):
    refused(command("ppo", reward=small / "model"), "score.weight", "at random")


def test_a_reward_model_of_another_vocabulary_is_refused(command, scores, tmp_path):
    shutil.copytree(scores, tmp_path / "made")
    file = tmp_path / "made/tokenizer.json"
    file.write_text(file.read_text().replace('"fox"', '"elk"'))
    refused(command("ppo", reward=tmp_path / "made"), "made", "another vocabulary")


def test_long_pairs_keep_their_ends_and_those_alike_by_then_are_not_used():
    encoder = data.encoder(toy.tokenizer())
    pairs = [Pair("the", "fox is kind", "fox is mean"), Pair("the", "fox is tall", "bear is tall")]
    (found,) = tokenised_pairs(encoder, pairs, 4)
    kind, mean = (encoder.encode(f"is {word}") for word in ("kind", "mean"))
    assert found.chosen == data.Example([encoder.bos, *kind, encoder.eos], [False] + [True] * 3)
    assert found.rejected.tokens == [encoder.bos, *mean, encoder.eos]


def test_an_encoder_is_trained_as_a_reward_model_by_its_own_head_and_is_no_policy(
    command, small, tmp_path
):
    encoder(tmp_path / "made", small)
    refused(command("sft", model=tmp_path / "made"), "causal language model", "BertLMHeadModel")
    refused(command("reward", model=tmp_path / "made", pool="mean"), "--pool", "encoder")
    code, error, out = command("reward", model=tmp_path / "made")
    assert (code, error) == (0, "")
    out.rename(tmp_path / "judge")
    refused(command("ppo", reward=tmp_path / "judge/reward_model"), "needs a decoder", "Bert")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_ends_the_run_at_its_step_and_row(
    command, scores, tmp_path, value
):
    shutil.copytree(scores, tmp_path / "made")
    weights = load_file(tmp_path / "made/model.safetensors")
    weights["score.weight"][:] = value
    save_file(weights, tmp_path / "made/model.safetensors", metadata={"format": "pt"})
    code, error, out = command("ppo", reward=tmp_path / "made")
    assert code == 2 and "NonFiniteError: ppo step 0: score[0] is" in error
    assert error.count("\n") == 1 and "not kept" in error
    assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").read_bytes()


ROW = b'{"prompt": "the fox", "completion": "a bear", "chosen": "a bear", "rejected": "a fox"}\n'
FILES = {
    "empty": (b"", ":1:1: the file has no records"),
    "only a BOM": (b"\xef\xbb\xbf", "the file has no records"),
    "not UTF-8": (ROW + b'{"prompt": "\xff"}', ":2:13: byte 0xff is not UTF-8"),
    "NUL": (b'{"prompt": "a\\u0000"}\n', "NUL|no field"),
    "no objects": (b"[3]", "of type int"),
    "one row": (ROW, "--held-out 0.1 of the 1 .* leaves a side empty"),
    "cut .gz": (gzip.compress(ROW * 9)[:-9], "damaged gzip"),
}


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("what", FILES)
def test_a_data_file_that_cannot_be_used_is_named(command, tmp_path, name, what):
    content, says = FILES[what]
    file = tmp_path / "made.jsonl"
    file.write_bytes(content)
    result = command(name, **{"prompts" if name == "ppo" else "data": file})
    refused(result)
    assert pytest.RaisesExc(Exception, match=says).matches(Exception(result[1]))
    assert "made.jsonl" in result[1] or "--held-out" in result[1]


@pytest.mark.parametrize("missing", [True, False])
def test_a_data_file_that_is_missing_or_a_folder_is_named(command, tmp_path, missing):
    file = tmp_path / "made.jsonl"
    file if missing else file.mkdir()
    refused(command("sft", data=file), "made.jsonl", "No such file" if missing else "directory")


def test_rows_without_room_for_a_completion_are_not_enough(command):
    refused(command("sft", max_length=2), "--data for training: 0 usable")
    refused(command("reward", part="40/40"), "--held-out", "--part 40/40")
    refused(command("ppo", new_tokens=500), "--new-tokens", "has 64 positions")


def test_bom_crlf_and_bad_pairs_are_no_obstacle_and_bad_pairs_are_counted(command, small, tmp_path):
    file = tmp_path / "made.jsonl"
    same = b'{"prompt": "p", "chosen": "same", "rejected": "same"}\n'
    rows = (small / "pairs.jsonl").read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + (rows + same).replace(b"\n", b"\r\n"))
    code, error, out = command("reward", data=file)
    assert (code, error) == (0, "") and ", 0, 1 |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_says_what_to_change(command, monkeypatch, error):
    def fails(*args, **more):
        raise error

    monkeypatch.setattr("rlhf_fn.stages.sft", fails)
    code, said, _ = command("sft")
    assert code == 2 and "does not fit" in said and "--accumulate" in said


def test_another_error_has_nothing_to_say_of_memory(command, monkeypatch):
    def fails(*args, **more):
        raise RuntimeError("a size must match")

    monkeypatch.setattr("rlhf_fn.stages.sft", fails)
    code, said, _ = command("sft")
    assert code == 2 and "a size must match" in said and "does not fit" not in said
