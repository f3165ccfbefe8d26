"""A tiny Llama, ragged batches, and every loss on them: what test_steps and test_losses share."""

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fn import random
from rlhf_fn.heads import actor_critic, reward_model, value_model
from rlhf_fn.kl import k2
from rlhf_fn.losses import of_tokens
from rlhf_fn.models import causal_lm
from rlhf_fn.optim import adamw
from rlhf_fn.pair_methods import log_ratio, of_sums
from rlhf_fn.policy import clipped_surrogate
from rlhf_fn.preference import dpo
from rlhf_fn.steps import (
    ActorCriticBatch,
    DpoBatch,
    PairBatch,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    actor_critic_loss,
    next_token_logprobs,
    policy_loss,
    preference_loss,
    reward_loss,
    sft_loss,
    value_loss,
)
from rlhf_fn.weights import fixed_length, sequence_mean, token_mean

VOCAB, ROWS, TIME, KEY = 11, 5, 7, random.key(0)
CLIPS = {
    "surrogate": of_tokens(clipped_surrogate, clip_low=0.2, clip_high=0.28),
    "penalty": k2,
}
POLICY = CLIPS | {"temperature": 0.7, "kl_coef": 0.3, "entropy_coef": 0.05}
EVENLY = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
DPO = {"objective": of_sums(dpo, beta=0.3, label_smoothing=0.1), "reward": log_ratio}
OPTIMIZER = adamw(3e-3, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.01)


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


MODEL = llama()
LM, CRITIC = causal_lm(MODEL), value_model(MODEL, random.key(1))
SCORER, BOTH = reward_model(MODEL, random.key(2)), actor_critic(MODEL, random.key(3))


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ragged(rows=ROWS, time=TIME):
    """Tokens, attention (padded left and right) and a mask within it that a prompt comes before."""
    start = torch.randint(0, 3, (rows, 1))
    stop = torch.randint(time - 2, time + 1, (rows, 1))
    step = torch.arange(time)
    attention = (step >= start) & (step < stop)
    mask = attention & (step > start) & (torch.rand(rows, time) < 0.7)
    return torch.randint(0, VOCAB, (rows, time)), attention, mask


def answers_to_prompts(answers):
    """Ragged answers, the first of them one token long."""
    tokens, attention, mask = (torch.stack(x, 1) for x in zip(*(ragged() for _ in range(answers))))
    one = attention[0, 0].nonzero()[1:2, 0]
    mask[0, 0] = torch.arange(TIME) == one
    return tokens, attention, mask


def dpo_batch(answers):
    tokens, attention, mask = answers_to_prompts(answers)
    ref_logprobs = torch.where(mask, -2 + 0.5 * real(*mask.shape), 0.0)
    return DpoBatch(tokens, attention, mask, ref_logprobs, EVENLY)


def batch_of(kind, weighting=token_mean):
    torch.manual_seed(1)
    tokens, attention, mask = ragged()
    weights = weighting(mask, dtype=torch.float64)
    if kind is SftBatch:
        return SftBatch(tokens, attention, weights)
    if kind is PairBatch:
        return PairBatch(*answers_to_prompts(answers=2), EVENLY)
    if kind is DpoBatch:
        return dpo_batch(answers=2)
    logprobs = next_token_logprobs(LM.apply, temperature=0.7)(LM.params, tokens, attention)
    values = CRITIC.apply(CRITIC.params, tokens, attention)
    old, ref, old_values = (
        torch.where(mask, x + 0.3 * real(ROWS, TIME), 0.0) for x in (logprobs, logprobs, values)
    )
    everything = {
        "tokens": tokens, "attention": attention, "old_logprobs": old, "ref_logprobs": ref,
        "advantages": real(ROWS, TIME), "old_values": old_values, "returns": real(ROWS, TIME),
        "weights": weights,
    }  # fmt: skip
    return kind(**{name: everything[name] for name in kind._fields})


class Case(NamedTuple):
    loss: object
    params: dict
    batch: type


CASES = {
    "sft": Case(sft_loss(LM.apply), LM.params, SftBatch),
    "reward": Case(reward_loss(SCORER.apply), SCORER.params, PairBatch),
    "dpo": Case(preference_loss(LM.apply, **DPO), LM.params, DpoBatch),
    "policy": Case(policy_loss(LM.apply, **POLICY), LM.params, PolicyBatch),
    "value": Case(value_loss(CRITIC.apply, clip=0.2), CRITIC.params, ValueBatch),
    "actor-critic": Case(
        actor_critic_loss(BOTH.apply, **POLICY, value_clip=0.2, value_coef=0.5),
        BOTH.params,
        ActorCriticBatch,
    ),
}
WEIGHTINGS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length": lambda mask, dtype: fixed_length(mask, length=9, dtype=dtype),
}
