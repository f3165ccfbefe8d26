"""What the ranks of a world do whose models gather a layer where it computes."""

from functools import partial
from unittest import mock

import cases_rollout
import tiny
import torch
from cases_ranks import KEY, LM, OPTIMIZER, batches, cases, steps_of
from test_fused import peak
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fn import offline, random, ranks, room, sampler, sharding, stages, tree
from rlhf_fn.collate import pair_batch
from rlhf_fn.heads import reward_model
from rlhf_fn.lora import Lora, all_linear, by_rank, lora
from rlhf_fn.losses import next_token_logprobs, sft_loss
from rlhf_fn.models import Functional, causal_lm
from rlhf_fn.pair_losses import reward_loss
from rlhf_fn.precision import cast
from rlhf_fn.prefix import Prefixed
from rlhf_fn.recipes import dpo
from rlhf_fn.recompute import checkpointed
from rlhf_fn.rollout import sample
from rlhf_fn.steps import (
    _summed,
    autograd_gradient,
    gradient_step,
    of_asked,
    of_shared,
    train_state,
)
from rlhf_fn.trainable import trainable

BY_LAYER = {"gather": sharding.slices, "share": sharding.shared_alike}


def by_layer_trajectories(plans, shards):
    """`cases_ranks.sharded_trajectories`, by models that gather a layer where it computes."""
    again = checkpointed(causal_lm, tiny.tiny("gpt2"), prepare=sharding.assembled)
    mesh, found = sharding.device_mesh(shards=shards), []
    for case, rows, _, parts in plans:
        gradient = sharding.fully_sharded(autograd_gradient, **BY_LAYER)
        step = gradient_step(
            cases(again.apply)[case][0], OPTIMIZER, microbatches=parts, gradient=gradient
        )
        params = sharding.shard(LM.params, mesh)
        found.append(steps_of(step, train_state(params, OPTIMIZER), case, rows))
    return found


def adapted_trajectory(shards):
    """Of an adapter on a frozen base; in so many shards both are in slices, or none where 0."""
    module = tiny.tiny("gpt2")
    low_rank = Lora(2, 4.0, all_linear(module), by_rank)
    make, base, gradient = causal_lm, LM.params, autograd_gradient
    if shards:
        mesh = sharding.device_mesh(shards=shards)
        make = partial(checkpointed, causal_lm, prepare=sharding.assembled)
        base, gradient = sharding.shard(base, mesh), sharding.fully_sharded(gradient, **BY_LAYER)
    apply, params = lora(make, module, base, low_rank, KEY)
    params = {name: x + 0.1 for name, x in params.items()}
    step = gradient_step(sft_loss(apply), OPTIMIZER, gradient=gradient)
    params = sharding.shard(params, mesh) if shards else params
    return steps_of(step, train_state(params, OPTIMIZER), "sft", 5)


def shared_prompts(rows, by_layer):
    """Of each time that a rank's model was asked, whether prompts were shared; and the gradient."""
    asked, make = [], partial(reward_model, key=KEY)
    module = tiny.tiny("gpt2")
    again = checkpointed(make, module, prepare=sharding.assembled)

    def counting(params, tokens, attention):
        asked.append(isinstance(tokens, Prefixed))
        return again.apply(params, tokens, attention)

    how = BY_LAYER if by_layer else {}
    gradient = autograd_gradient if by_layer else of_asked(of_shared(autograd_gradient))
    gradient = sharding.fully_sharded(gradient, **how)(reward_loss(counting))
    params = sharding.shard(again.params, sharding.device_mesh(shards=ranks.place().ranks))
    grads, said = gradient(params, pair_batch(rows, 0), KEY)
    return asked, sharding.whole(grads), said


def gathered_by_layer(module):
    """The numbers of all that a gradient gathers, and of the most that are asked for together."""
    asked = []

    def counted(params):
        asked.append(sum(x.numel() for x in params.values()))
        return sharding.assembled(params)

    again = checkpointed(causal_lm, module, prepare=counted)
    params = sharding.shard(again.params, sharding.device_mesh(shards=ranks.place().ranks))
    gradient = sharding.fully_sharded(autograd_gradient, **BY_LAYER)(sft_loss(again.apply))
    gradient(params, batches("sft", 2)[0], KEY)
    first, *layers = asked
    return first + sum(layers), max(layers)


def gathered_of_an_adapter(module):
    """In bytes: all that a gradient gathers, the most for a layer, that of none; and the slices."""
    asked = []

    def counted(params):
        asked.append(sum(x.nbytes for x in params.values()))
        return sharding.assembled(params)

    make = partial(checkpointed, causal_lm, prepare=counted)
    mesh = sharding.device_mesh(shards=ranks.place().ranks)
    base = sharding.shard(cast(causal_lm(module).params, torch.bfloat16), mesh)
    again = lora(make, module, base, Lora(4, 4.0, all_linear(module), by_rank), KEY)
    params = sharding.shard(again.params, mesh)
    gradient = sharding.fully_sharded(autograd_gradient, **BY_LAYER)(sft_loss(again.apply))
    gradient(params, batches("sft", 2)[0], KEY)
    first, *layers = asked
    slices = sum(x.to_local().nbytes for x in (*base.values(), *params.values()))
    return first + sum(layers), max(layers), first, slices


def rollouts(prompts, group, stop):
    """Of slices that are gathered by layer, and of all at once: ranks share the prompts.

    And how many numbers the former gathers at once, each once in order, and how often it gathers.
    """
    module, asked = cases_rollout.MODEL, []
    prompts = cases_rollout.padded(prompts, 4)
    keys = random.split(KEY, len(prompts.tokens) * group)
    how = {"max_new_tokens": 6, "temperature": 1.0, "stop": stop, "pad": 0}
    mesh = sharding.device_mesh(shards=ranks.place().ranks)
    params = sharding.shard(causal_lm(module).params, mesh)

    def counted(params):
        asked.append(sum(x.numel() for x in params.values()))
        return sharding.assembled(params)

    def drawn(reads):
        draw = sharding.model_by_rows(partial(sample, reads.engine, **how), reads.gather)
        return draw(params, prompts, keys)

    with mock.patch.object(sampler, "assembled", counted):
        found = drawn(sampler.by_layer(module))
    return found, drawn(sampler.at_once(module)), sorted(set(asked)), len(asked)


def held_out(pairs, by_layer):
    """What is said of held-out rows without a gradient; and how many rows this rank has read."""
    module, read = tiny.tiny("gpt2"), []

    def counting(make):
        if by_layer:
            make = partial(checkpointed, make, prepare=sharding.assembled)
        apply, params = make(module)

        def counted(params, tokens, *rest):
            rows = tokens.rows if isinstance(tokens, Prefixed) else tokens
            read.append(rows[..., 0].numel())
            return apply(params, tokens, *rest)

        mesh = by_layer and sharding.device_mesh(shards=ranks.place().ranks)
        return Functional(counted, sharding.shard(params, mesh) if by_layer else params)

    scores, policy = counting(partial(reward_model, key=KEY)), counting(causal_lm)
    texts, loss = [example for pair in pairs for example in pair], dpo.loss(policy.apply)
    nll = stages.nll(next_token_logprobs(policy.apply), policy.params, texts, 0)
    judged = stages.preferences(scores.apply, scores.params, pairs, 0)
    known = offline.compared(policy, pairs, size=4, pad=0)
    halved = tree.map(lambda x: 0.5 * x, policy.params)
    return (nll, judged, known, offline.measured(loss, halved, known, size=4, pad=0)), sum(read)


def merged(module, rank):
    """W' of an adapter: of slices of both, put together, and of whole ones; what is sent for it."""
    mesh = sharding.device_mesh(shards=ranks.place().ranks)
    alone = trainable(module, causal_lm(module), rank, KEY)
    parts = trainable(
        module, causal_lm(module), rank, KEY,
        keep=lambda model: model._replace(params=sharding.shard(model.params, mesh)),
    )  # fmt: skip
    adapter = {name: x + 0.1 for name, x in alone.model.params.items()}
    adapter_parts = sharding.shard(adapter, mesh)
    with CommDebugMode() as sent:
        found = parts.merged(adapter_parts, torch.float32)
    assert all(x.placements == parts.start[name].placements for name, x in found.items())
    counts = {str(kind).split(".")[-1]: n for kind, n in sent.get_comm_counts().items()}
    return sharding.whole(found), alone.merged(adapter, torch.float32), counts


def deep():
    """A model of 12 layers."""
    config = LlamaConfig(**tiny.GROUPED | {"num_hidden_layers": 12, "hidden_size": 64})
    return LlamaForCausalLM(config)


def planned_and_held(rows):
    """In bytes, of gradients of microbatches: of slices at once, by layer, of an adapter's base."""
    module, mesh = deep(), sharding.device_mesh(shards=ranks.place().ranks)
    make, plain = partial(checkpointed, causal_lm, prepare=sharding.assembled), causal_lm(module)
    base, batch = sharding.shard(plain.params, mesh), batches("sft", rows)[0]
    adapted = lora(make, module, base, Lora(2, 4.0, all_linear(module), by_rank), KEY)
    found = []
    for apply, params, how in (
        (plain.apply, base, {}),
        (make(module).apply, base, BY_LAYER),
        (adapted.apply, sharding.shard(adapted.params, mesh), BY_LAYER),
    ):
        needs, loss = [], sft_loss(apply)

        def summed(gradient, how=how, loss=loss, params=params):
            gradients = _summed(sharding.fully_sharded(gradient, **how)(loss), 2)
            return lambda: gradients(params, batch, KEY)

        note = partial(lambda needs, what, needed, *_: needs.append(needed), needs)
        with mock.patch.object(room, "require_room", note):
            summed(partial(room.planned, microbatches=2)(autograd_gradient))()
        summed(autograd_gradient)()
        found.append((max(needs), peak(summed(autograd_gradient))))
    return found


def peaks():
    """The most bytes of a gradient of 12 layers in two slices, by layer and of all at once."""
    again = checkpointed(causal_lm, deep(), prepare=sharding.assembled)
    params = sharding.shard(again.params, sharding.device_mesh(shards=2))
    batch = batches("sft", 2)[0]

    def held(model, **how):
        gradient = sharding.fully_sharded(autograd_gradient, **how)(sft_loss(model.apply))
        gradient(params, batch, KEY)
        return peak(lambda: gradient(params, batch, KEY))

    return held(again, **BY_LAYER), held(again), sum(x.nbytes for x in again.params.values())
