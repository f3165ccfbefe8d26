"""How commands sample: the blank rollout that goes first fits every size, and changes no answer."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases_steps import LM, llama

from rlhf_fn import random, room, sampler
from rlhf_fn.config import ConfigError, Grpo, Ppo, validate
from rlhf_fn.decoding import decoder
from rlhf_fn.engine import compiled, memory_plan
from rlhf_fn.precision import cast
from rlhf_fn.ranks import Place
from rlhf_fn.rollout import Prompts

HOW = {"temperature": 1.0, "stop": (5,), "pad": 0}


def merging(params, dtype):
    return {name: (x + 1).to(dtype) for name, x in params.items()}


@pytest.mark.parametrize(
    "merged, dtype, there",
    [(cast, "float32", True), (merging, "float32", False), (merging, "bfloat16", True)],
)
def test_sampling_that_cannot_fit_says_how_much_it_needs_and_what_to_change(
    merged, dtype, there, monkeypatch
):
    """What a run samples with is there before it merges in half precision: rounded, of W."""
    options = SimpleNamespace(layerwise=0, compile=0, dtype=dtype, batch=3, new_tokens=4)
    sizes = {"prompts": 3, "group": 2, "width": 5, "max_new_tokens": 4}
    plan = memory_plan(decoder(llama()), cast(LM.params, getattr(torch, dtype)), **sizes)
    needed = plan.total - there * plan.weights
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        draw = partial(
            sampler.sampler, llama(), options, LM.params, width=5, group=2, merged=merged, **HOW
        )
        if enough:
            draw()
        else:
            with pytest.raises(
                ConfigError, match=r"MiB are free.*--batch \(3\).*--new-tokens \(4\)"
            ):
                draw()


def test_ranks_plan_for_their_shares_of_the_prompts(monkeypatch, capsys):
    options = SimpleNamespace(layerwise=0, compile=0, dtype="float32", batch=5, new_tokens=4)
    for ranks, share in ((1, 5), (2, 3), (4, 2)):
        monkeypatch.setattr(sampler, "place", lambda ranks=ranks: Place(0, ranks))
        sampler.sampler(llama(), options, LM.params, width=5, group=2, **HOW)
        sizes = {"prompts": share, "group": 2, "width": 5, "max_new_tokens": 4}
        plan = memory_plan(decoder(llama()), cast(LM.params, torch.float32), **sizes)
        assert capsys.readouterr().out == f"{plan}\n"


def test_the_blank_rollout_of_a_rank_is_of_its_share(monkeypatch):
    drawn = []
    monkeypatch.setattr(sampler, "sample", lambda _, __, *rows, **___: drawn.append(rows))
    monkeypatch.setattr(sampler, "place", lambda: Place(0, 2))
    options = SimpleNamespace(layerwise=0, compile=1, dtype="float32", batch=5, new_tokens=4)
    sampler.sampler(llama(), options, LM.params, width=5, group=2, **HOW)
    ((blank, keys),) = drawn
    assert (len(blank.tokens), len(keys)) == (3, 6)


def test_free_memory_is_some_and_not_more_than_there_is():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < room.free_memory(torch.device("cpu")) <= pages


def test_ranks_of_one_machine_share_what_is_free(monkeypatch):
    monkeypatch.setattr(room, "kept", lambda: 2**40)
    free = [room.free_memory(torch.device("cpu")) - 2**40]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free.append(room.free_memory(torch.device("cpu")) - 2**40)
    assert 3 < free[0] / free[1] < 5, "other processes take and free some meanwhile"


@pytest.mark.parametrize("width, new", [(1, 1), (1, 2), (3, 4)])
def test_compiled_turns_answer_as_eager_ones_from_the_smallest_size_on(
    width, new, monkeypatch, capsys
):
    uncompiled = partial(compiled, compile=lambda function: function)
    monkeypatch.setattr(sampler, "compiled", uncompiled)
    tokens = torch.arange(2 * width).view(2, width) % 5 + 1
    prompts, keys = Prompts(tokens, tokens > 0), random.split(random.key(1), 4)
    answers = []
    for compile in (0, 1):
        options = SimpleNamespace(
            layerwise=0, compile=compile, dtype="float32", batch=2, new_tokens=new
        )
        draw = sampler.sampler(llama(), options, LM.params, width=width, group=2, **HOW)
        answers.append(draw(LM.params, prompts, keys))
    for one, other in zip(*answers):
        torch.testing.assert_close(one, other)
    assert capsys.readouterr().out.count("sampling: ") == 2


@pytest.mark.parametrize("options", [{}, {"recompute": 1}, {"shards": 2}])
def test_layers_are_gathered_for_each_token_where_they_are_in_slices_and_for_a_step_alone(options):
    files = {"model": "", "reward": "", "prompts": (), "out": ""}
    for kind in (Grpo, Ppo):
        with pytest.raises(ConfigError, match="--layerwise 1 wants --shards and --recompute 1"):
            validate(kind(**files, layerwise=1, **options))
        validate(kind(**files, layerwise=1, shards=2, recompute=1))


def test_a_plan_by_layer_counts_a_layer_and_what_is_in_none_and_is_what_a_refusal_offers(
    monkeypatch, capsys
):
    options = SimpleNamespace(layerwise=1, compile=0, dtype="float32", batch=3, new_tokens=4)
    sampler.sampler(llama(), options, LM.params, width=5, **HOW)
    by_layer = capsys.readouterr().out
    numbers = {name: x.numel() for name, x in LM.params.items()}
    first = sum(n for name, n in numbers.items() if ".layers.0." in name)
    outside = sum(n for name, n in numbers.items() if ".layers." not in name)
    assert f"(weights {4 * (first + outside) / 2**20:,.1f}," in by_layer
    monkeypatch.setattr(room, "free_memory", lambda device: 0)
    monkeypatch.setattr(sampler, "in_slices", lambda params: True)
    options.layerwise = 0
    with pytest.raises(ConfigError, match="--dtype bfloat16 or --layerwise 1$"):
        sampler.sampler(llama(), options, LM.params, width=5, **HOW)
