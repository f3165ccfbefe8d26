"""With --shards no rank has a model whole, but while something reads it whole."""

import json

import cases_slices
import pytest
import runs
import torch
from safetensors.torch import load_file
from worlds import world

from rlhf_fn import tree
from rlhf_fn.cli import main
from rlhf_fn.loading import load_tokenizer
from rlhf_fn.models import load_causal_lm

SHORT = ("--steps", 2, "--every", 2)
LAYERS = ("--layerwise", 1)
ALL = ("sft", "reward", "dpo", "grpo", "ppo")


@pytest.fixture(scope="module")
def words(small, tmp_path_factory):
    """The options of each command, a short run each."""
    out = tmp_path_factory.mktemp("scores") / "run"
    scores = runs.words_of(small, "")["reward"]
    assert main([str(word) for word in (*scores, *SHORT, "--out", out)]) == 0
    recipe = {"dpo": ("--recipe", "dpo")}
    found = runs.words_of(small, out / "reward_model")
    return {name: (*found[name], *recipe.get(name, ()), *SHORT) for name in ALL}


def count(state):
    return sum(int(x) for x in tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("command", ALL)
def test_a_rank_keeps_its_share_of_what_it_trains_and_of_what_it_began_with(
    words, tmp_path, command
):
    kept = {}
    for n in (1, 2):
        shared = (*words[command], "--shards", n, "--out", tmp_path / str(n))
        kept[n] = world(n, cases_slices.held, shared)
    ((alone, state, _),) = kept[1]
    numbers = count(state)
    if command == "ppo":  # its critic begins as the judge, of which one process has one copy
        numbers += count(state.actor.params) - count(state.critic.params)
    elif command != "reward":  # whose best parameters so far are in the state
        numbers += count(state.params)
    for both, same, _ in kept[2]:
        assert same == state
        assert alone - both == pytest.approx(4 * numbers / 2, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, more",
    [("sft", ()), ("reward", ()), ("dpo", ()), ("grpo", LAYERS), ("ppo", LAYERS),
     ("grpo", (*LAYERS, "--lora", 2))],
)  # fmt: skip
def test_by_layer_nothing_but_a_leaf_that_is_saved_is_whole(words, tmp_path, command, more):
    by_layer = (*words[command], "--shards", 2, "--recompute", 1, *more, "--out", tmp_path / "run")
    _, (_, _, together) = world(2, cases_slices.held, by_layer)  # rank 0 keeps what it saves
    (saved,) = (tmp_path / "run").glob("*/model.safetensors")
    sizes = sorted(x.numel() for x in load_file(saved).values())
    assert sizes[-1] <= together < sizes[-1] + 8 < sum(sizes) / 3, "a leaf, and counters"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, more", [("grpo", ()), ("ppo", ()), ("grpo", ("--recompute", 1, *LAYERS, "--lora", 2))]
)
def test_a_rollout_in_half_precision_puts_together_no_wider_parameters(
    words, tmp_path, command, more
):
    half = (*words[command], "--dtype", "bfloat16", "--shards", 2, *more, "--out", tmp_path / "run")
    assert world(2, cases_slices.sampled_in, half) == [{torch.bfloat16}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, more", [("sft", ()), ("reward", ()), ("ppo", ()), ("grpo", ("--lora", 2))]
)
def test_nobody_waits_for_what_rank_0_writes(words, tmp_path, command, more):
    given = (*words[command], "--shards", 2, *more, "--out", tmp_path / "run")
    first, _ = world(2, cases_slices.order_of_saving, given)
    assert "together" not in first[first.index("written") :]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_of_weights_in_half_precision_the_run_is_the_same(words, tmp_path, command):
    model = words[command][2]
    half, found = tmp_path / "half", {}
    load_causal_lm(model).to(torch.bfloat16).save_pretrained(half)
    load_tokenizer(str(model)).save_pretrained(half)
    for n in (1, 2):
        out = tmp_path / str(n)
        given = (command, "--model", half, *words[command][3:], "--shards", n, "--out", out)
        world(n, cases_slices.held, given)
        found[n] = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        saved = load_file(out / "policy/model.safetensors")
        assert {x.dtype for x in saved.values()} == {torch.float32}
    for one, two in zip(found[1], found[2], strict=True):
        assert one.pop("stage") == two.pop("stage")
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    configs = [(tmp_path / f"{n}/policy/config.json").read_text() for n in (1, 2)]
    assert configs[0] == configs[1]
