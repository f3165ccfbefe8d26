"""`rlhf-fn grpo`: what it trains and saves, and what it says of bad rewards and options."""

import importlib
import json

import pytest

from rlhf_fn import recipes, reward_functions
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import main
from rlhf_fn.config import ConfigError, Grpo
from rlhf_fn.errors import DataError
from rlhf_fn.methods import Online
from rlhf_fn.online import method_of, recipe
from rlhf_fn.readers import read_prompt_records

SIZES = ("--steps", 3, "--batch", 4, "--group", 4, "--new-tokens", 6, "--every", 1)


@pytest.fixture
def grpo(small, tmp_path, capsys):
    """Run the command with some of its options replaced: (exit code, stdout, stderr, folder)."""

    def call(*more, reward="rewards_of_text:kindness", prompts=small / "prompts.jsonl"):
        out = tmp_path / "out"
        words = "grpo", "--model", small / "model", "--prompts", prompts, "--reward", reward
        code = main([str(word) for word in (*words, "--out", out, *SIZES, *more)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, out

    return call


@pytest.fixture
def answered(small, tmp_path):
    """The prompts, each with an answer that its text does not give away and a level."""
    file = tmp_path / "answered.jsonl"
    rows = [json.loads(line) for line in (small / "prompts.jsonl").open()]
    rows = [row | {"answer": row["prompt"].split()[2], "level": i} for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def refused(result, *says):
    code, _, error, out = result
    assert code == 2 and error.count("\n") == 1, error
    assert all(part in error for part in says), error
    return out


@pytest.mark.parametrize("name", ["grpo", "dapo", "remax", "reinforce_pp"])
def test_it_trains_saves_and_reports(grpo, small, name):
    from transformers import AutoModelForCausalLM

    code, printed, error, out = grpo("--recipe", name)
    assert (code, error) == (0, "")
    assert "win rate over the reference" in printed and "KL(tuned" in printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (small / "model", out / "policy")
    )
    moved = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters())]
    assert max(moved) > 1e-4
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [0, 1, 2]
    assert {"reward", "kl/old", "length", "groups/kept", "clip/fraction"} <= records[-1].keys()
    assert ("kl/token" in records[-1]) == (name != "dapo"), "which has no reference"
    assert f"# {name}, judged" in (out / "report.md").read_text()


def test_a_reward_is_given_the_columns_it_names(grpo, answered):
    code, _, error, _ = grpo(reward="rewards_of_text:of_everything", prompts=answered)
    assert (code, error) == (0, "")


def test_a_reward_meets_the_answer_of_its_own_record(grpo, tmp_path, monkeypatch):
    file = tmp_path / "answered.jsonl"
    animals = "fox bear owl hare wolf crow mole deer".split()
    rows = [(f"about the {a} near the {p} :", p) for a in animals for p in ("barn", "hill")]
    file.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    decoded, read = reward_functions.texts, []  # what the model was asked, not what it should be
    monkeypatch.setattr(reward_functions, "texts", lambda *x: read.append(decoded(*x)) or read[-1])
    module = tmp_path / "noting.py"
    module.write_text(
        "seen = []\ndef check(answer):\n    seen.append(answer)\n    return [0.0] * len(answer)\n"
    )
    code, _, error, _ = grpo("--held-out", 0.5, reward=load(module), prompts=file)
    assert (code, error) == (0, "")
    seen = importlib.import_module("noting").seen
    pairs = [
        (a, asked) for rows, answers in zip(read, seen) for a, (asked, _) in zip(answers, rows)
    ]
    assert len(pairs) >= 3 * 16 and {a for a, _ in pairs} == {"barn", "hill"}
    assert all(answer in asked for answer, asked in pairs)


def load(module):
    """The name of the function `check` of a file, importable."""
    import sys

    if str(module.parent) not in sys.path:
        sys.path.append(str(module.parent))
    return f"{module.stem}:check"


def test_a_reward_model_scores_too(grpo, small, tmp_path):
    words = "reward", "--model", small / "model", "--data", small / "pairs.jsonl", "--steps", 2
    assert main([str(w) for w in (*words, "--out", tmp_path / "scores")]) == 0
    code, _, error, _ = grpo(reward=tmp_path / "scores/reward_model")
    assert (code, error) == (0, "")


BAD_REWARDS = {
    "raises": ("rewards_of_text:raises raised KeyError: 'no such word'", "on the records"),
    "too_few": ("returned 15 rewards for 16 answers",),
    "one_number": ("raised TypeError", "float"),
    "nothing": ("returned None for an answer to record", "a finite number"),
    "not_a_number": ("returned nan",),
    "words": ("returned 'good'",),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_fails_is_named_and_nothing_is_lost(grpo, name):
    out = refused(grpo(reward=f"rewards_of_text:{name}"), *BAD_REWARDS[name])
    assert (out / "config.json").exists() and not (out / "metrics.jsonl").read_bytes()


def test_a_reward_that_fails_late_is_mended_and_the_run_goes_on_to_the_same_bits(grpo, tmp_path):
    import runs

    module = tmp_path / "mended.py"
    good = "def check(completions):\n    return [float('kind' in text) for text in completions]\n"
    module.write_text(good)
    code, _, error, out = grpo(reward=load(module))
    assert (code, error) == (0, "")
    whole = runs.bits(out)
    out.rename(tmp_path / "whole")
    import mended  # the module that was loaded just now

    honest, calls = mended.check, []

    def tired(completions):
        calls.append(1)
        return honest(completions) if len(calls) < 3 else [None] * len(completions)

    mended.check = tired
    refused(grpo(reward=load(module)), "returned None")
    assert load_latest(out / "checkpoints/grpo").step == 2
    mended.check = honest
    assert grpo("--resume", reward=load(module))[0] == 0
    assert runs.bits(out) == whole


UNUSABLE = {
    "no such module": ("rewards_of_nothing:f", ("cannot import rewards_of_nothing",)),
    "no such function": ("rewards_of_text:kindnes", ("no function 'kindnes'", "kindness, ends")),
    "no function": ("rewards_of_text:NO_FUNCTION", ("no function 'NO_FUNCTION'",)),
    "a column that is not there": ("rewards_of_text:equal", ("asks for answer", "prompts, comple")),
    "no folder": ("rewards", ("--reward rewards is neither module:function nor the folder",)),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_reward_that_cannot_be_used_is_refused_before_the_run(grpo, what):
    reward, says = UNUSABLE[what]
    assert not refused(grpo(reward=reward), *says).exists()


@pytest.mark.parametrize(
    "options, says",
    [
        (("--recipe", "grop"), ("--recipe is 'grop'", "dr_grpo, dapo")),
        (("--recipe", "dpo"), ("--recipe is 'dpo'", "dr_grpo, dapo")),
        (("--recipe", "_plain"), ("--recipe is '_plain'",)),
        (("--group", 1), ("--group 1 does not suit grpo", "2 samples or more")),
        (("--group", -2), ("--group is -2",)),
        (("--stop", "nowhere."), ("--stop 'nowhere.'", "choose one")),
        (("--field", "question"), ("no field 'question'", "'prompt'")),
        (("--new-tokens", 80), ("--new-tokens", "has 64 positions")),
        (("--accumulate", 9), ("--accumulate is 9",)),
        (("--held-out", 0.001), ("--held-out 0.001", "leaves a side empty")),
    ],
)
def test_an_option_that_cannot_mean_anything_is_refused_before_the_run(grpo, options, says):
    assert not refused(grpo(*options), *says).exists()


def options_of(**changes):
    return Grpo(model="", reward="", prompts=(), out="", **changes)


def test_a_recipe_is_a_name_in_the_module_and_options_change_its_numbers():
    assert recipe("dapo", Online) is recipes.dapo
    assert method_of(options_of(recipe="dapo")) == recipes.dapo
    changed = method_of(options_of(recipe="dapo", group=8, epochs=3, minibatches=5))
    assert changed == recipes.dapo._replace(group=8, epochs=3, minibatches=5)
    assert method_of(options_of(recipe="remax")).group == 1
    with pytest.raises(ConfigError, match="--group 1 does not suit rloo"):
        method_of(options_of(recipe="rloo", group=1))


def test_answers_end_with_the_texts_that_stop_them(small):
    from rlhf_fn.loading import load_policy, stopping

    policy = load_policy(str(small / "model"))
    fox = policy.tokenizer.convert_tokens_to_ids("fox")
    assert set(stopping(policy, ("fox",)).stop) == {*policy.stop, fox}


def test_records_keep_their_fields_and_must_have_the_same(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "1+1", "answer": 2}\n{"answer": 3, "question": "1+2"}\n')
    records = read_prompt_records(file, field="question").records
    assert records == [{"prompt": "1+1", "answer": 2}, {"prompt": "1+2", "answer": 3}]
    file.write_text('{"prompt": "a", "answer": 2}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2:1: its fields are prompt, but the first"):
        read_prompt_records(file)
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    assert read_prompt_records(text).records == [{"prompt": "one"}, {"prompt": "two"}]


def test_equal_prompts_are_asked_once_and_never_on_both_sides(small, tmp_path):
    from rlhf_fn.command_grpo import distinct_prompts
    from rlhf_fn.loading import load_policy

    options = Grpo(
        model="", reward="", prompts=(str(small / "prompts.jsonl"),), out="", prompt_tokens=3
    )
    policy = load_policy(str(small / "model"))
    found = distinct_prompts(options, policy)
    assert len({row["prompt"] for row in found.values()}) == len(found) < 40
    assert all(len(tokens) == 3 for tokens in found)
    assert all(row["prompt"].startswith("about the") for row in found.values())
