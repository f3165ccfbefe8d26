"""Compiled turns draw what eager ones draw, by one graph; and the memory is what was planned."""

from functools import partial

import pytest
import tiny
import torch
from cases_rollout import DECODER, KEYS, MODEL, PAD, POLICY, PROMPT, STOP, VOCAB, padded, scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fn import random
from rlhf_fn.decoding import decoder
from rlhf_fn.engine import bucket, compiled, memory_plan, one_graph
from rlhf_fn.lora import Lora, adapted, by_rank, lora
from rlhf_fn.models import causal_lm
from rlhf_fn.rollout import completions, eager, sample

OPTIONS = {"max_new_tokens": 6, "temperature": 1.0, "stop": [STOP], "pad": PAD}
compiles = pytest.mark.compile


def counted(model):
    """An engine, and the list of the graphs that it has had to compile."""
    graphs = []

    def traced(graph, _):
        graphs.append(graph)
        return graph

    return compiled(model, partial(one_graph, backend=traced)), graphs


@pytest.fixture(scope="module")
def engine():
    """An engine that has met two rows, and the list of its graphs."""
    made = counted(DECODER)
    sample(made[0], POLICY.params, PROMPT, KEYS, **OPTIONS)
    assert len(made[1]) == 1
    return made


def agree(engine, prompts, keys, params=POLICY.params, model=DECODER, rounding=1e-5, **changes):
    """The rollout of both; the same tokens, and log-probs to rounding."""
    options = OPTIONS | changes
    ours, theirs = (sample(x, params, prompts, keys, **options) for x in (engine, model))
    assert completions(ours) == completions(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=rounding)
    return ours


def asked(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return padded(rows, width)


@compiles
def test_one_graph_serves_every_batch_prompt_and_length_and_draws_what_the_decoder_draws(engine):
    engine, graphs = engine
    before = len(graphs)

    @settings(max_examples=25, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=2, max_size=9),
        extra=st.integers(0, 5),
        group=st.integers(1, 3),
        new=st.integers(1, 20),
        temperature=st.floats(0.5, 2.0),
        seed=st.integers(0, 2**31),
    )
    def law(lengths, extra, group, new, temperature, seed):
        prompts = asked(lengths, max(lengths) + extra, seed)
        keys = random.split(random.key(seed), len(lengths) * group)
        agree(engine, prompts, keys, max_new_tokens=new, temperature=temperature)

    law()
    assert len(graphs) == before


@compiles
def test_what_the_graph_is_made_for_costs_one_graph_each_and_no_more(engine):
    engine, graphs = engine
    before = len(graphs)
    ways = [
        {"stop": []},
        {"pad": 3},
        {"top_k": 4, "top_p": 0.7},
        {"temperature": torch.tensor([[0.5], [2.0]])},
    ]
    for number, changes in enumerate(ways, start=1):
        for new in (3, 8):
            agree(engine, PROMPT, KEYS, max_new_tokens=new, **changes)
        assert len(graphs) == before + number


@compiles
def test_a_row_alone_is_answered_as_in_its_batch(engine):
    engine, graphs = engine
    before = len(graphs)
    lengths, keys = [1, 4, 2, 5, 3], random.split(random.key(3), 5)
    prompts = asked(lengths, 6)
    together = sample(engine, POLICY.params, prompts, keys, **OPTIONS)
    assert len({len(row) for row in completions(together)}) > 1
    for i, length in enumerate(lengths):
        own = asked(lengths, 6)[0][i : i + 1, -length:]
        alone = padded(own.tolist(), length)
        rollout = sample(engine, POLICY.params, alone, keys[i : i + 1], **OPTIONS)
        longer = agree(engine, alone, keys[i : i + 1], max_new_tokens=13)
        assert completions(rollout)[0] == completions(together)[i]
        assert completions(longer)[0][:6] == completions(together)[i]
        torch.testing.assert_close(
            rollout.logprobs[rollout.mask], together.logprobs[i][together.mask[i]]
        )
    assert len(graphs) == before + 1  # one row has its own


@compiles
def test_a_call_inside_of_a_call_leaves_both_what_they_are_alone(engine):
    engine, _ = engine
    prompts, keys = asked([2, 4, 3], 4, seed=1), random.split(random.key(9), 3)
    outer, inner = (agree(engine, *x) for x in ((PROMPT, KEYS), (prompts, keys)))
    within = []

    def interrupted(*args, **options):
        within.append(sample(engine, POLICY.params, prompts, keys, **OPTIONS))
        return engine.turn(*args, **options)

    again = sample(engine._replace(turn=interrupted), POLICY.params, PROMPT, KEYS, **OPTIONS)
    torch.testing.assert_close(again, outer, rtol=0, atol=0)
    assert within
    for rollout in within:
        torch.testing.assert_close(rollout, inner, rtol=0, atol=0)


@compiles
def test_other_parameters_need_no_other_graph(engine):
    engine, graphs = engine
    before = len(graphs)
    for scale in (1.0, 0.5):
        params = {name: scale * p for name, p in POLICY.params.items()}
        agree(engine, PROMPT, KEYS, params=params)
    assert len(graphs) == before


@compiles
def test_a_graph_is_guarded_by_what_it_is_given_and_asks_nothing_of_its_decoder(engine):
    engine, graphs = engine
    before = len(graphs)
    skeleton = DECODER.decode.args[0].module
    rollout = agree(engine, PROMPT, KEYS)
    skeleton.train()  # no dropout in it: nothing else changes
    try:
        again = agree(engine, PROMPT, KEYS)
    finally:
        skeleton.eval()
    torch.testing.assert_close(again, rollout, rtol=0, atol=0)
    assert len(graphs) == before
    with torch.autocast("cpu", torch.bfloat16):
        sample(engine, POLICY.params, PROMPT, KEYS, **OPTIONS)
    assert len(graphs) == before + 1


@compiles
def test_half_precision_is_drawn_from_in_float32(engine):
    engine, graphs = engine
    before = len(graphs)
    params = {name: p.bfloat16() for name, p in POLICY.params.items()}
    rollout = agree(
        engine, PROMPT, KEYS, params=params, rounding=2**-8
    )  # a graph rounds less often
    assert rollout.logprobs.dtype == torch.float32
    assert len(graphs) == before + 1


@compiles
def test_an_adapted_decoder_has_compiled_turns_too():
    low_rank = Lora(2, 4.0, ("q_proj", "v_proj"), by_rank)
    adapter = lora(causal_lm, MODEL, POLICY.params, low_rank, random.key(0)).params
    params = POLICY.params | {name: x + 0.1 for name, x in adapter.items()}
    model = decoder(adapted(MODEL, low_rank))
    engine, graphs = counted(model)
    agree(engine, PROMPT, KEYS, params=params, model=model)
    assert len(graphs) == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_turns_of_every_family_are_one_graph(family):
    module = tiny.tiny(family)
    model, params = decoder(module), causal_lm(module).params
    engine, graphs = counted(model)
    for lengths in ([3, 5], [1, 2, 4, 6]):
        keys = random.split(random.key(0), len(lengths))
        prompts = asked(lengths, max(lengths))
        agree(engine, prompts, keys, params=params, model=model, max_new_tokens=9)
    assert len(graphs) == 1


@compiles
@pytest.mark.slow
def test_generated_code_is_one_graph_for_all_and_draws_the_same():
    torch._dynamo.utils.counters.clear()
    engine = compiled(DECODER)
    for lengths, new in (([3, 1, 5, 2], 9), ([2, 6], 4), ([1, 1, 2, 3, 4, 5, 6], 12)):
        keys = random.split(random.key(new), len(lengths))
        prompts, options = asked(lengths, max(lengths) + 1), OPTIONS | {"max_new_tokens": new}
        ours, theirs = (
            sample(x, POLICY.params, prompts, keys, **options) for x in (engine, DECODER)
        )
        assert completions(ours) == completions(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # norms are in float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@given(st.integers(2, 2**20))
def test_a_bucket_holds_what_it_is_for_and_less_than_half_more(n):
    assert n <= bucket(n) < 1.5 * n or n == bucket(n)
    assert bucket(bucket(n)) == bucket(n) and bucket(n) <= bucket(n + 1)


def test_buckets_are_few_and_never_of_one():
    assert sorted({bucket(n) for n in range(1, 33)}) == [2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert len({bucket(n) for n in range(1, 4097)}) == 23


def test_rows_and_columns_that_are_read_come_in_buckets():
    lengths = (1, 2, 2, 3, 4, 4, 5, 19)
    said = scripted([[5] * (n - 1) + [2] * (20 - n + 1) for n in lengths])
    seen = []

    def turn(params, tokens, attention, index, cache, *more, **options):
        seen.append(tuple(attention.shape))
        assert not attention[:, index + 1 :].any()
        filled = attention[:, : index + 1]  # a script knows no more
        return eager(said).turn(params, tokens, filled, index, cache, *more, **options)

    prompts, keys = padded([[5]] * 8, 1), random.split(random.key(1), 8)
    options = OPTIONS | {"max_new_tokens": 20}
    engine = eager(said)._replace(turn=turn, size=bucket)
    rollout = sample(engine, {}, prompts, keys, **options)
    torch.testing.assert_close(rollout, sample(said, {}, prompts, keys, **options))
    assert [rows for rows, _ in seen] == [8, 8, 4] + [2] * 15
    assert [columns for _, columns in seen] == [min(bucket(2 + i), 20) for i in range(18)]


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("group", [1, 3])
def test_the_planned_memory_is_what_is_allocated(family, group):
    module = tiny.tiny(family)
    model, params = decoder(module), causal_lm(module).params
    plan = memory_plan(model, params, prompts=2, group=group, width=5, max_new_tokens=7)
    prompts = asked([3, 5], 5)
    _, cache = model.prefill(params, *prompts, 12)
    of_prompts = sum(x.nbytes for layer in cache for x in layer)
    keys = random.split(random.key(0), 2 * group)
    rollout = sample(model, params, prompts, keys, **OPTIONS | {"max_new_tokens": 7})
    assert plan.cache == group * of_prompts
    assert plan.copied == max(of_prompts * (group > 1), plan.cache // 2)
    assert plan.weights == sum(p.nbytes for p in params.values())
    assert plan.rollout == sum(x.nbytes for x in rollout)
    assert plan.total == sum(plan) and "\n" not in str(plan)


def test_a_plan_is_made_without_reading_a_parameter_and_refuses_what_sampling_would():
    params = {name: p.to("meta") for name, p in POLICY.params.items()}
    sizes = {"prompts": 2, "group": 1, "width": 4, "max_new_tokens": 3}
    assert memory_plan(DECODER, POLICY.params, **sizes).cache > 0
    with pytest.raises(ValueError, match="at most 32"):
        memory_plan(DECODER, POLICY.params, **sizes | {"max_new_tokens": 29})
    with pytest.raises(ValueError, match="group must be at least 1"):
        memory_plan(DECODER, params, **sizes | {"group": 0})
