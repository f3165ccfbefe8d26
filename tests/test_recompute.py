"""A checkpointed model is the model: the same bits, in less memory."""

from functools import partial
from unittest import mock

import pytest
import tiny
import torch
from cases_steps import KEY, POLICY, batch_of
from runs import words_of
from test_fused import peak
from torch.func import grad
from torch.utils.checkpoint import checkpoint

from rlhf_fn import recompute as recompute_module
from rlhf_fn import tree
from rlhf_fn.cli import main
from rlhf_fn.heads import value_model
from rlhf_fn.linear import linear_token_logprobs_and_entropy
from rlhf_fn.models import causal_lm
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.recompute import checkpointed
from rlhf_fn.steps import (
    PolicyBatch,
    SftBatch,
    ValueBatch,
    autograd_gradient,
    policy_loss,
    value_loss,
)

LINEAR = of_projection(linear_token_logprobs_and_entropy)
KINDS = {
    "logits": (causal_lm, PolicyBatch, lambda apply: policy_loss(apply, **POLICY)),
    "no logits": (
        projected_lm, PolicyBatch, lambda apply: policy_loss(apply, **POLICY, token_logprobs=LINEAR)
    ),
    "values": (partial(value_model, key=KEY), ValueBatch, partial(value_loss, clip=0.2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_checkpointed_model_has_the_bits_of_the_model_forward_and_backward(kind, family):
    make, batch_kind, loss = KINDS[kind]
    module, batch = tiny.tiny(family), batch_of(batch_kind)
    plain, again = make(module), checkpointed(make, module)
    expected = autograd_gradient(loss(plain.apply))(plain.params, batch, KEY)
    for params in (again.params, plain.params):  # twice: the first call left nothing behind
        found = autograd_gradient(loss(again.apply))(params, batch, KEY)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    halved = tree.map(lambda p: 0.5 * p, plain.params)
    torch.testing.assert_close(
        autograd_gradient(loss(again.apply))(halved, batch, KEY),
        autograd_gradient(loss(plain.apply))(halved, batch, KEY), rtol=0, atol=0,
    )  # fmt: skip


def test_a_checkpointed_model_holds_less_and_less_than_half_of_it_in_many_layers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = tiny.GROUPED | {"num_hidden_layers": 12, "attention_dropout": 0.0}
    module = LlamaForCausalLM(LlamaConfig(**sizes))
    batch = tree.map(lambda x: x.repeat(8, 1)[..., :7], batch_of(PolicyBatch))

    def held(model):
        gradient = autograd_gradient(policy_loss(model.apply, **POLICY))
        gradient(model.params, batch, KEY)
        return peak(lambda: gradient(model.params, batch, KEY))

    assert held(checkpointed(causal_lm, module)) < 0.5 * held(causal_lm(module))


@pytest.mark.parametrize("make", [causal_lm, projected_lm, partial(value_model, key=KEY)])
def test_parameters_are_prepared_a_layer_at_a_time_each_once_forward_and_once_backward(make):
    asked, module = [], tiny.tiny("llama")

    def prepare(params):
        asked.append(sorted(params))
        return tree.map(lambda x: 2 * x, params)

    apply, params = checkpointed(make, module, prepare=prepare)
    batch = batch_of(SftBatch)

    def loss(apply):
        def total(params, batch, key):
            outputs = apply(params, batch.tokens, batch.attention)
            return tree.leaves(outputs)[0].square().sum(), {}

        return total

    found = autograd_gradient(loss(apply))(params, batch, KEY)
    first, *layers = asked
    assert len(layers) == 4  # two, forward and backward
    assert len(first) + sum(map(len, layers[:2])) == len(params)

    def doubled(params, *inputs):
        return make(module).apply(tree.map(lambda x: 2 * x, params), *inputs)

    expected = autograd_gradient(loss(doubled))(params, batch, KEY)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_a_gradient_it_is_the_model_itself():
    module, batch = tiny.tiny("llama"), batch_of(PolicyBatch)
    again, plain = checkpointed(causal_lm, module), causal_lm(module)
    with torch.no_grad():
        given = plain.params, batch.tokens, batch.attention
        assert torch.equal(again.apply(*given), plain.apply(*given))


def test_what_cannot_be_checkpointed_is_refused_by_name():
    model = checkpointed(causal_lm, tiny.tiny("llama"))
    batch, loss = batch_of(PolicyBatch), policy_loss(model.apply, **POLICY)
    with pytest.raises(TypeError, match="autograd_gradient"):
        grad(loss, has_aux=True)(model.params, batch, KEY)


@pytest.mark.parametrize(
    "command, dtype", [(x, "float32") for x in ("sft", "reward", "dpo", "ppo", "grpo")]
    + [(x, "bfloat16") for x in ("sft", "ppo")],
)  # fmt: skip
def test_a_run_that_recomputes_has_the_bits_of_one_that_does_not(small, tmp_path, command, dtype):
    short, scores = ("--steps", 2, "--batch", 4), tmp_path / "scores"
    if command == "ppo":
        words = (*words_of(small, "")["reward"], *short, "--out", scores)
        assert main([str(word) for word in words]) == 0
    lora = ("--lora", 2) if command in ("dpo", "grpo") else ()
    words, found = words_of(small, scores / "reward_model")[command], []
    for recompute in (0, 1):
        out = tmp_path / str(recompute)
        with mock.patch.object(recompute_module, "checkpoint", wraps=checkpoint) as again:
            how = "--recompute", recompute, "--dtype", dtype, "--out", out
            everything = (*words, *short, *lora, *how)
            assert main([str(word) for word in everything]) == 0
        assert bool(again.call_count) == bool(recompute)
        found.append((out / "metrics.jsonl").read_bytes())
    assert found[0] == found[1]
