"""What is said on paper is what the tensors of a run take."""

import cases_layers
import cases_ranks
import pytest
import transformers as hf
from worlds import world

from rlhf_fn import budget, random, tree
from rlhf_fn.fused import fused_adamw
from rlhf_fn.lora import Lora, all_linear, by_rank, lora
from rlhf_fn.models import causal_lm
from rlhf_fn.steps import train_state

SIZES = budget.Sizes(layers=2, width=16, inner=24, keys=8, vocab=40)


def llama():
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
    )


def numbers(params):
    return sum(x.numel() for x in params.values())


def test_a_llama_and_its_adapter_have_as_many_parameters():
    module = llama()
    base = causal_lm(module)
    assert budget.parameters(SIZES) == numbers(base.params)
    low_rank = Lora(3, 3.0, all_linear(module), by_rank)
    adapter = lora(causal_lm, module, base.params, low_rank, random.key(0)).params
    assert budget.adapter_parameters(SIZES, 3) == numbers(adapter)
    assert budget.parameters(budget.LLAMAS["7B"]) == 6_738_415_616  # as Meta's weights have


def test_a_rank_keeps_as_many_bytes_between_steps():
    params = causal_lm(llama()).params
    state = train_state(params, fused_adamw(1e-3, **cases_ranks.BETAS))
    floats = [x for x in tree.leaves(state) if x.is_floating_point()]
    said = budget.data_parallel_budget(trained=numbers(params), frozen=0, ranks=4)
    assert sum(x.nbytes for x in floats) == said.kept


def test_a_rank_gathers_as_much_by_layer():
    params = causal_lm(llama()).params
    outside = numbers({name: x for name, x in params.items() if ".layers." not in name})
    assert budget.outside_layers(SIZES) == outside
    trained = numbers(params)
    layer = (trained - outside) // 2
    for shards in (1, 2):
        said = budget.by_layer_budget(
            trained=trained, layer=layer, outside=outside, frozen=0, shards=shards
        )
        for gathered, most in world(shards, cases_layers.gathered_by_layer, llama()):
            assert 4 * (gathered + trained) * (shards - 1) / shards == said.sent
            assert most == layer
            assert said.during == 4 * trained / shards + 6 * (most + outside)


def test_a_rank_gathers_as_much_of_an_adapter_and_of_its_base():
    outside, base = budget.outside_layers(SIZES), budget.parameters(SIZES)
    adapter = budget.adapter_parameters(SIZES, 4)
    for shards in (1, 2):
        said = budget.adapted_budget(
            adapter=adapter, base=base, layers=2, outside=outside, shards=shards
        )
        for gathered, most, first, slices in world(
            shards, cases_layers.gathered_of_an_adapter, llama()
        ):
            assert (gathered + 4 * adapter) * (shards - 1) / shards == said.sent
            cast = 2 * adapter // 2  # of a layer, in half precision beside the float32 it came from
            assert said.during == 4 * adapter / shards + first + most + cast
            assert said.kept == slices + 8 * adapter / shards


@pytest.mark.parametrize("shards", [1, 2])
def test_a_rank_gathers_as_much_for_a_rollout(shards):
    module, tokens = cases_layers.cases_rollout.MODEL, 6
    sizes = SIZES._replace(vocab=cases_layers.cases_rollout.VOCAB)
    outside, sampled = budget.outside_layers(sizes), budget.parameters(sizes)
    assert sampled == numbers(causal_lm(module).params)
    layer = (sampled - outside) // 2
    said = budget.rollout_budget(sampled=sampled, layer=layer, outside=outside, shards=shards)
    for *_, most, times in world(shards, cases_layers.rollouts, [[5, 6, 7], [8]], 2, []):
        assert most == sorted([layer, outside]) and said.during == 2 * sum(most)
        gathered = (times - 1) * layer
        assert 2 * gathered * (shards - 1) / shards == tokens * said.sent


@pytest.mark.parametrize("ranks, shards", [(2, 2), (4, 2)])
def test_a_rank_keeps_and_sends_as_many_bytes_for_its_shards(ranks, shards):
    trained = 2**10
    said = budget.sharded_budget(trained=trained, frozen=0, shards=shards, replicas=ranks // shards)
    for kept, slices in world(ranks, cases_ranks.bytes_of, trained, shards):
        assert kept == said.kept
        assert slices == said.during - 6 * trained


def test_one_rank_sends_nothing_and_many_send_at_most_twice_the_gradient():
    for more in ({"ranks": 1}, {"ranks": 1000}):
        sent = budget.data_parallel_budget(trained=10, frozen=5, **more).sent
        assert sent == pytest.approx(0 if more["ranks"] == 1 else 80, rel=2e-3)
    one = budget.sharded_budget(trained=10, frozen=5, shards=1)
    assert (one.kept, one.sent) == (130, 0)
    hybrid = budget.sharded_budget(trained=16, frozen=0, shards=8, replicas=2)
    assert hybrid.sent == 2 * 64 * 7 / 8 + 2 * 8 * 1 / 2


def test_no_ranks_or_parameters_are_refused():
    for wrong in ({"trained": 0}, {"ranks": 0}, {"frozen": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            budget.data_parallel_budget(**{"trained": 1, "frozen": 0, "ranks": 1} | wrong)
    for name in (each := {"adapter": 1, "base": 9, "layers": 1, "outside": 1, "shards": 1}):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            budget.adapted_budget(**each | {name: 0})
    for name in (each := {"sampled": 9, "layer": 1, "outside": 1, "shards": 1}):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            budget.rollout_budget(**each | {name: 0})
    for wrong in ({"shards": 0}, {"replicas": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
            budget.sharded_budget(**{"trained": 1, "frozen": 0, "shards": 1} | wrong)


def test_the_table_has_a_row_for_each_way_and_model():
    assert len(budget.table(ranks=16).splitlines()) == 2 + 6 * len(budget.LLAMAS)
