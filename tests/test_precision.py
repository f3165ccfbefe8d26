"""Half precision to compute in: near to float32, and nothing that is learned is lost to it."""

import pytest
import torch
from cases_steps import KEY, POLICY, batch_of, llama
from torch.func import grad

from rlhf_fn import random, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.fused import fused_adamw
from rlhf_fn.heads import actor_critic, reward_model, value_model
from rlhf_fn.linear import linear_token_logprobs_and_entropy
from rlhf_fn.models import causal_lm
from rlhf_fn.precision import cast, in_dtype
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.rollout import Prompts, sample
from rlhf_fn.steps import (
    PairBatch,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    autograd_gradient,
    donating_step,
    functional_gradient,
    next_token_logprobs,
    policy_loss,
    reward_loss,
    sft_loss,
    train_state,
    value_loss,
)

HALVES = [torch.bfloat16, torch.float16]
MODULE = llama(torch.float32)
LM, CRITIC = causal_lm(MODULE), value_model(MODULE, random.key(1))
SCORER, PROJECTED = reward_model(MODULE, random.key(2)), projected_lm(MODULE)
LINEAR = of_projection(linear_token_logprobs_and_entropy)
LOSSES = {
    "sft": (LM, SftBatch, lambda m: sft_loss(m.apply)),
    "policy": (LM, PolicyBatch, lambda m: policy_loss(m.apply, **POLICY)),
    "no logits": (
        PROJECTED, PolicyBatch, lambda m: policy_loss(m.apply, **POLICY, token_logprobs=LINEAR)
    ),
    "value": (CRITIC, ValueBatch, lambda m: value_loss(m.apply, clip=0.2)),
    "reward": (SCORER, PairBatch, lambda m: reward_loss(m.apply)),
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", LOSSES)
each_half = pytest.mark.parametrize("dtype", HALVES)


def single(batch):
    return tree.map(lambda x: x.float() if x.is_floating_point() else x, batch)


def halved(model, dtype, name):
    out = torch.float32 if name in ("value", "reward") else None
    return in_dtype(model, dtype, out=out)


@each_loss
@each_half
@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
def test_a_gradient_computed_in_half_precision_is_float32_and_near(name, dtype, gradient):
    model, kind, make = LOSSES[name]
    batch = single(batch_of(kind))
    whole, (total, _) = gradient(make(model))(model.params, batch, KEY)
    half, (near, metrics) = gradient(make(halved(model, dtype, name)))(model.params, batch, KEY)
    assert {g.dtype for g in half.values()} == {x.dtype for x in metrics.values()} == {near.dtype}
    assert near.dtype == torch.float32
    gap = tree.global_norm(tree.map(torch.sub, half, whole)) / tree.global_norm(whole)
    ulp = torch.finfo(dtype).eps
    assert 0 < gap < 8 * ulp  # computed in half precision, and in nothing worse
    assert abs(near - total) < 8 * ulp * (1 + abs(total))


@each_half
def test_logprobs_are_float32_whatever_the_model_computes_in(dtype):
    batch = batch_of(SftBatch)
    logprobs = next_token_logprobs(in_dtype(LM, dtype).apply)
    assert logprobs(LM.params, batch.tokens, batch.attention).dtype == torch.float32


def test_float32_is_the_model_itself():
    batch = single(batch_of(PolicyBatch))
    losses = (policy_loss(m.apply, **POLICY) for m in (LM, in_dtype(LM, torch.float32)))
    one, two = (autograd_gradient(loss)(LM.params, batch, KEY) for loss in losses)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert all(p is LM.params[name] for name, p in cast(LM.params, torch.float32).items())


@each_half
def test_a_model_frozen_in_half_precision_says_what_its_master_says_at_half_the_memory(dtype):
    batch, model = batch_of(SftBatch), in_dtype(LM, dtype)
    frozen = cast(LM.params, dtype)
    given = batch.tokens, batch.attention
    assert torch.equal(model.apply(frozen, *given), model.apply(LM.params, *given))
    held = [sum(p.nbytes for p in params.values()) for params in (frozen, LM.params)]
    assert held[0] * 2 == held[1]


def test_steps_too_small_for_half_precision_add_up_in_the_master():
    """θ = 1 and steps of 10⁻⁴, an eightieth of what bfloat16 can add to 1."""
    model = in_dtype(
        LM._replace(apply=lambda params, x: params["w"] * x, params={"w": torch.ones(3)}),
        torch.bfloat16,
    )

    def loss(params, batch, key):
        return model.apply(params, *batch).sum().float(), {}

    optimizer = fused_adamw(1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    state = train_state({"w": torch.ones(3)}, optimizer)
    step = donating_step(loss, optimizer)
    for count in range(1, 41):
        state, _ = step(state, (torch.ones(3).bfloat16(),), KEY)
        torch.testing.assert_close(state.params["w"], torch.full((3,), 1 - count * 1e-4))
    assert {x.dtype for x in tree.leaves((state.params, state.opt_state[1:]))} == {torch.float32}
    assert (cast(state.params, torch.bfloat16)["w"] < 1).all()


def test_values_and_scores_come_out_as_wide_as_asked():
    both = actor_critic(MODULE, random.key(3))
    batch = batch_of(SftBatch)
    given = both.params, batch.tokens, batch.attention
    for out in (torch.float32, None):
        found = in_dtype(both, torch.bfloat16, out=out).apply(*given)
        assert {x.dtype for x in found} == {out or torch.bfloat16}


@each_half
def test_sampling_in_half_precision_says_the_logprobs_of_the_model_in_half_precision(dtype):
    tokens = torch.tensor([[1, 5, 3], [2, 2, 7]])
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    params, keys = cast(LM.params, dtype), random.split(KEY, 2)
    rollout = sample(
        decoder(MODULE), params, prompts, keys, max_new_tokens=5, temperature=1.0, stop=(), pad=0
    )
    again = next_token_logprobs(in_dtype(LM, dtype).apply)(
        LM.params, rollout.tokens, rollout.attention
    )
    assert rollout.logprobs.dtype == torch.float32
    gap = (again - rollout.logprobs)[rollout.mask].abs().max()
    assert gap < 16 * torch.finfo(dtype).eps


def test_a_model_in_half_precision_vmaps_and_differentiates():
    batch, model = single(batch_of(PolicyBatch)), in_dtype(LM, torch.bfloat16)
    loss = policy_loss(model.apply, **POLICY)
    params = tree.map(lambda p: torch.stack([p, 0.9 * p]), LM.params)
    many = torch.func.vmap(grad(loss, has_aux=True), in_dims=(0, None, None))(params, batch, KEY)
    one = grad(loss, has_aux=True)(LM.params, batch, KEY)
    first = tree.map(lambda x: x[0], many)
    torch.testing.assert_close(first, one, rtol=0.05, atol=0.02)
    assert {g.dtype for g in first[0].values()} == {torch.float32}
