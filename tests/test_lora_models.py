"""Adapters where parameters go: every kind of model, sampling, losses, steps and methods."""

from functools import partial

import cases_steps
import pytest
import tiny
import torch
from cases_lora import KEY, ROWS, by_hand, drawn, everything, pull, tuned
from torch.func import grad, vmap

from rlhf_fn import random, recipes, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.heads import actor_critic, reward_model, value_model
from rlhf_fn.lora import adapted, lora, merge, on_base
from rlhf_fn.losses import PolicyBatch
from rlhf_fn.models import causal_lm
from rlhf_fn.pair_losses import DpoBatch
from rlhf_fn.projection import projected_lm
from rlhf_fn.rollout import Prompts, sample
from rlhf_fn.steps import (
    autograd_gradient,
    functional_gradient,
    gradient_step,
    next_token_logprobs,
    train_state,
)

each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
close = torch.testing.assert_close
same = partial(close, rtol=0, atol=0)


def tensors(x):
    return [leaf for leaf in tree.leaves(x) if isinstance(leaf, torch.Tensor)]


MAKERS = {
    "projected_lm": projected_lm,
    "value_model": partial(value_model, key=random.key(1)),
    "reward_model": partial(reward_model, key=random.key(1)),
    "actor_critic": partial(actor_critic, key=random.key(1)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_of_model_is_adapted_and_keeps_its_head(family, make):
    module = tiny.tiny(family)
    base = make(module)
    apply, adapter = lora(make, module, base.params, everything(module), KEY)
    adapter = drawn(adapter)
    inside = module if set(dict(module.named_parameters())) <= set(base.params) else None
    merged = by_hand(inside or module.base_model, base.params, adapter, 4 / 3)
    read, expected = apply(adapter, *ROWS), base.apply(merged, *ROWS)
    close(tensors(tuple(read)), tensors(tuple(expected)))
    assert len(adapter) == 2 * sum("lora_A" in name for name in adapter) > 0


@each_decoder
def test_sampling_with_an_adapter_is_sampling_from_merged_weights(family):
    module, base, low_rank, _, adapter = tuned(family)
    tokens, attention = ROWS
    prompts = Prompts(tokens[[0, 2]], attention[[0, 2]])
    keys = random.split(random.key(1), 2)
    draw = {"max_new_tokens": 5, "temperature": 1.0, "stop": (), "pad": 0}
    thin = on_base(partial(sample, decoder(adapted(module, low_rank))), base.params)
    merged = merge(module, base.params, adapter, low_rank)
    close(
        thin(adapter, prompts, keys, **draw), sample(decoder(module), merged, prompts, keys, **draw)
    )


def test_what_else_is_put_beside_an_adapter_is_trained_in_place_of_the_base():
    module, base, low_rank, apply, adapter = tuned("llama")
    head = {"lm_head.weight": base.params["lm_head.weight"] + 0.1}
    merged = merge(module, base.params, adapter | head, low_rank)
    assert merged["lm_head.weight"] is head["lm_head.weight"]
    close(apply(adapter | head, *ROWS), base.apply(merged, *ROWS))
    slopes = grad(lambda p: pull(apply(p, *ROWS)))(adapter | head)
    expected = grad(lambda p: pull(base.apply(p, *ROWS)))(merged)
    close(slopes["lm_head.weight"], expected["lm_head.weight"])


LOSSES = {"dpo": (recipes.dpo, DpoBatch), "dapo": (recipes.dapo, PolicyBatch)}


@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_trains_the_adapter_alone_and_its_loss_falls(name, gradient):
    method, kind = LOSSES[name]
    module, base = cases_steps.MODEL, cases_steps.LM
    before = tree.map(torch.clone, base.params)
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)
    optimizer = cases_steps.OPTIMIZER
    step = gradient_step(method.loss(apply), optimizer, gradient=gradient, microbatches=2)
    state, batch = train_state(adapter, optimizer), cases_steps.batch_of(kind)
    memory = [x.shape for x in tensors(state.opt_state) if x.ndim]
    assert sorted(memory) == sorted(2 * [x.shape for x in adapter.values()])
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch, KEY)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.01 and state.params.keys() == adapter.keys()
    assert all(not x.equal(adapter[n]) for n, x in state.params.items())
    same(base.params, before)


def test_the_adapter_that_training_starts_from_is_the_reference():
    module, base = cases_steps.MODEL, cases_steps.LM
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)
    batch = cases_steps.batch_of(DpoBatch)
    logprobs = next_token_logprobs(apply)(adapter, batch.tokens, batch.attention)
    expected = next_token_logprobs(base.apply)(base.params, batch.tokens, batch.attention)
    assert logprobs.equal(expected)


def test_a_population_of_adapters_steps_under_vmap():
    module, base = cases_steps.MODEL, cases_steps.LM
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)
    optimizer, batch = cases_steps.OPTIMIZER, cases_steps.batch_of(DpoBatch)
    step = gradient_step(recipes.dpo.loss(apply), optimizer)
    states = [train_state(drawn(adapter, seed), optimizer) for seed in (0, 1)]
    many = vmap(step, in_dims=(0, None, None))(
        tree.map(lambda *x: torch.stack(x), *states), batch, KEY
    )
    for i, state in enumerate(states):
        each = tree.map(lambda x, i=i: x[i], many)
        close(each, step(state, batch, KEY), rtol=1e-6, atol=1e-9)
