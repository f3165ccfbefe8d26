"""`rlhf-fn dpo`, and the stage behind it."""

import json

import pytest
import tiny
import torch
from cases_steps import KEY

from rlhf_fn import data, offline, pair_recipes, random, toy
from rlhf_fn.cli import main
from rlhf_fn.command_dpo import split_by_prompt
from rlhf_fn.config import ConfigError
from rlhf_fn.data import Example
from rlhf_fn.models import causal_lm
from rlhf_fn.offline import compared, dpo_batch, measured, mismatched
from rlhf_fn.pair_methods import Offline
from rlhf_fn.readers import Pair

RECIPES = {name: x for name, x in vars(pair_recipes).items() if isinstance(x, Offline)}
STEPS = ("--steps", 2, "--batch", 4, "--every", 1)
MODEL = causal_lm(tiny.tiny("llama"))


@pytest.fixture
def command(small, tmp_path, capsys):
    """Run `rlhf-fn dpo` on the toy pairs: (exit code, stdout, stderr, its folder)."""

    def call(*words, data=small / "pairs.jsonl"):
        out = tmp_path / "out"
        given = ("dpo", "--model", small / "model", "--data", data, *STEPS, *words, "--out", out)
        code = main([str(word) for word in given])
        return code, *capsys.readouterr(), out

    return call


def written(path, pairs):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def pairs_of(path):
    return [json.loads(line) for line in path.open()]


def rows(lengths):
    """Ragged pairs: an answer of each length, one after another, to ragged prompts of their own."""
    torch.manual_seed(0)

    def example(asked, length):
        tokens = torch.randint(3, tiny.VOCAB, (length,)).tolist()
        return Example([*asked, *tokens], [False] * len(asked) + [True] * length)

    asked = [torch.randint(3, tiny.VOCAB, (2 + i % 3,)).tolist() for i in range(len(lengths))]
    return [(example(p, a), example(p, b)) for p, a, b in zip(asked, lengths, reversed(lengths))]


def test_a_run_trains_logs_saves_what_transformers_loads_and_begins_with_ties(command, small):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = (small / "model/model.safetensors").read_bytes()
    code, printed, error, out = command("--steps", 12, "--lr", 1e-2, "--every", 4)
    assert (code, error) == (0, "")
    assert "accuracy of log π/π_ref before: 0.500" in printed
    assert "loss before and after: 0.6931, " in printed and "nats per answer: 0.000, " in printed
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(records) == 12 and sum("held-out loss" in r for r in records) == 3
    assert records[-1]["loss"] < 0.6931 and f"{records[-1]['held-out loss']:.4f}" in printed
    assert abs(records[0]["reward/chosen"]) < 1e-5 < abs(records[-1]["reward/chosen"])
    assert AutoModelForCausalLM.from_pretrained(out / "policy").dtype == torch.float32
    AutoTokenizer.from_pretrained(out / "policy")
    assert "![" in (out / "report.md").read_text()
    assert (small / "model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["kto", "ipo", "aot", "orpo"])
def test_other_recipes_run_too(command, name):
    code, printed, error, out = command("--recipe", name)
    assert (code, error) == (0, "")
    unit = "token" if name in ("ipo", "orpo") else "answer"
    assert f"before and after, nats per {unit}: " in printed and (out / "policy").exists()


@pytest.mark.parametrize("name", ["nothing", "grpo", "Dpo", "_plain", ""])
def test_a_recipe_that_is_not_one_of_pairs_is_refused_and_all_that_are_are_listed(command, name):
    code, _, error, out = command("--recipe", name)
    assert code == 2 and not out.exists() and error.count("\n") == 1
    assert f"--recipe is {name!r}; it must be one of " in error
    assert set(error.split("one of ")[1].strip().split(", ")) == RECIPES.keys()


BAD = {
    "more micro-batches than rows": (("--accumulate", 5), "--accumulate is 5, more than the 4"),
    "micro-batches of a sorted batch": (("--recipe", "aot", "--accumulate", 2), "leave it at 1"),
    "micro-batches of KTO": (("--recipe", "kto", "--accumulate", 2), "--accumulate is 2, but kto"),
    "no room for an answer": (("--max-length", 2), "--data for training: 0 usable"),
    "nothing held out": (("--held-out", 1e-9), "distinct prompts of --data leaves a side empty"),
    "a rate that is no number": (("--lr", "nan"), "--lr is nan"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_done_is_one_sentence_and_leaves_no_folder(command, what):
    words, says = BAD[what]
    code, _, error, out = command(*words)
    assert code == 2 and not out.exists() and says in error and error.count("\n") == 1


def test_kto_needs_two_prompts(command, tmp_path):
    same = [{"prompt": "the", "chosen": f"fox {x}", "rejected": f"bear {x}"} for x in "abcdef"]
    file = written(tmp_path / "made.jsonl", [pair | {"prompt": ""} for pair in same])
    code, _, error, out = command("--recipe", "kto", "--held-out", 0.4, data=file)
    assert code == 2 and "all pairs of --data have the same one" in error and not out.exists()


def test_pairs_that_cannot_be_used_are_counted_by_what_is_wrong(command, small, tmp_path):
    good = pairs_of(small / "pairs.jsonl")
    longer = {"prompt": " ".join(["fox"] * 40), "chosen": "a", "rejected": "b"}
    empty = {"prompt": "the", "chosen": "", "rejected": "fox"}
    same = {"prompt": "the", "chosen": "fox", "rejected": "fox"}
    file = written(tmp_path / "made.jsonl", [*good, longer, empty, good[0], same, good[1], good[1]])
    code, printed, error, _ = command("--max-length", 40, data=file)
    train, held, unused, repeated, bad = (
        printed.split("not readable): ")[1].split("\n")[0].split(", ")
    )
    assert (code, error, unused, repeated, bad) == (0, "", "1", "3", "2")
    assert int(train) + int(held) == len({tuple(pair.values()) for pair in good})


def test_a_prompt_is_on_one_side_and_a_pair_without_a_prompt_is_its_own():
    pairs = [Pair(f"p{i % 5}" if i < 30 else "", f"a{i}", f"b{i}") for i in range(60)]
    for seed in range(5):
        kept, held = split_by_prompt(pairs, random.key(seed), 0.4)
        assert sorted(kept + held) == sorted(pairs) and kept and held
        prompts = ({p.prompt for p in side} - {""} for side in (kept, held))
        assert not set.intersection(*prompts)
    assert any(p.prompt == "" for p in kept) and any(p.prompt == "" for p in held)


def test_mismatched_answers_are_those_of_another_prompt_under_their_own():
    pairs = rows([3, 1, 5, 2])
    twice = [pairs[0], (pairs[0][1], pairs[0][0]), *pairs[1:]]  # two pairs of one prompt
    found = mismatched(twice, 6)

    def parted(example):
        at = example.mask.index(True)
        return example.tokens[:at], example.tokens[at:], example.mask[at:]

    for pair, (chosen, rejected, *others) in zip(twice, found, strict=True):
        assert (chosen, rejected) == pair
        own, _, _ = parted(chosen)
        for k, other in enumerate(others):
            prompt, answer, mask = parted(other)
            assert prompt == own and all(mask) and len(other.tokens) <= 6
            donors = [parted(p[k])[:2] for p in twice if parted(p[k])[0] != own]
            assert answer in [given[: 6 - len(own)] for _, given in donors]
    with pytest.raises(ConfigError, match="the same one"):
        mismatched(twice[:2], 6)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_compared_with_itself_as_a_tie_to_the_last_bit(name):
    pairs = rows([3, 1, 5, 2, 4, 4, 1])
    pairs = mismatched(pairs, 9) if name == "kto" else pairs
    loss = RECIPES[name].loss(MODEL.apply)
    held = compared(MODEL, pairs, size=3, pad=0)
    found = measured(loss, MODEL.params, held, size=3, pad=0)
    assert found["reward/chosen"] == found["reward/rejected"] == 0
    assert found["accuracy"] == pytest.approx(0.5, abs=1e-6)  # thirds do not add up to 1
    for row in held:
        assert [len(x) for x in row.ref_logprobs] == [len(e.tokens) for e in row.answers]
    batch = dpo_batch(held, 0)
    assert (batch.ref_logprobs[batch.mask] < 0).all() and not batch.ref_logprobs[..., 0].any()
    assert not batch.ref_logprobs[~batch.attention].any()


def test_the_reference_is_asked_once_and_not_at_all_where_none_is_needed(command, monkeypatch):
    asked = []
    whole = offline.compared

    def counted(reference, *args, **kwargs):
        asked.append(reference)
        return whole(reference, *args, **kwargs)

    monkeypatch.setattr("rlhf_fn.command_dpo.compared", counted)
    assert command("--recipe", "simpo")[0] == 0
    assert asked == [None, None]


def test_a_row_without_a_reference_has_zeros():
    (row,) = compared(None, rows([3])[:1], size=4, pad=0)
    assert all(not x.any() and x.shape == (5,) for x in row.ref_logprobs)


def test_what_is_measured_does_not_depend_on_how_many_rows_at_a_time():
    held = compared(MODEL, rows([3, 1, 5, 2, 4, 4, 1]), size=3, pad=0)
    params = {n: p + 0.1 * torch.randn_like(p) for n, p in MODEL.params.items()}
    loss = RECIPES["dpo"].loss(MODEL.apply)
    one, most = (measured(loss, params, held, size=size, pad=0) for size in (1, 5))
    whole = loss(params, dpo_batch(held, 0), KEY)[1]
    assert one == pytest.approx(most, rel=1e-5)
    assert one == pytest.approx({n: x.item() for n, x in whole.items()}, rel=1e-5)


def test_an_answer_that_is_cut_keeps_its_first_tokens_and_no_end():
    encoder = data.encoder(toy.tokenizer())
    pair = Pair("the", "fox is kind", "bear is kind")
    (found,) = data.tokenise_pairs(encoder, [pair], max_length=4).examples
    assert sum(found.chosen.mask) == 2 and encoder.eos not in found.chosen.tokens[-2:]
