"""Losses and the batches they read: `loss(params, batch, key) -> (scalar, metrics)`.

Every loss is a weighted sum and every metric is too, so parts of a batch and ranks just add. The weights are
part of the batch, normalised once over the whole of it (`weights.py`). Position t of every field speaks of
token t; `weights` is 0 on what the policy did not choose, and what it hides is never read.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import kl, logprobs as lp, policy, preference, value
from rlhf_fn.models import on_next_token
from rlhf_fn.weights import weighted_sum

Params = dict[str, Tensor]
Metrics = dict[str, Tensor]
Loss = Callable[[Params, Any, Tensor], tuple[Tensor, Metrics]]
Apply = Callable[..., Any]  # apply(params, tokens, attention), see models.py


class SftBatch(NamedTuple):
    """Instructions with their answers; `weights` is 0 on the prompt."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]


class PairBatch(NamedTuple):
    """Preference pairs: `weights` has one number per pair, the masks are True on the answers."""

    chosen: Int[Tensor, "batch time"]
    chosen_attention: Bool[Tensor, "batch time"]
    chosen_mask: Bool[Tensor, "batch time"]
    rejected: Int[Tensor, "batch other"]
    rejected_attention: Bool[Tensor, "batch other"]
    rejected_mask: Bool[Tensor, "batch other"]
    weights: Float[Tensor, " batch"]


class DpoBatch(NamedTuple):
    """A `PairBatch` with the reference's log-probability of each answer, summed over its mask."""

    chosen: Int[Tensor, "batch time"]
    chosen_attention: Bool[Tensor, "batch time"]
    chosen_mask: Bool[Tensor, "batch time"]
    rejected: Int[Tensor, "batch other"]
    rejected_attention: Bool[Tensor, "batch other"]
    rejected_mask: Bool[Tensor, "batch other"]
    weights: Float[Tensor, " batch"]
    ref_logprobs_chosen: Float[Tensor, " batch"]
    ref_logprobs_rejected: Float[Tensor, " batch"]


class PolicyBatch(NamedTuple):
    """Rollouts with the log-probs they were sampled at and what each token was worth."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]


class ValueBatch(NamedTuple):
    """Rollouts with the values they were given when sampled and the returns that followed."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_values: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]


class ActorCriticBatch(NamedTuple):
    """Every field of a `PolicyBatch` and of a `ValueBatch`."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    old_values: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]
    weights: Float[Tensor, "batch time"]


def next_token_logprobs(
    apply: Apply, *, temperature: float | Tensor = 1.0, token_logprobs: Callable = lp.token_logprobs
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """log π(tokenₜ | tokens before t) as `f(params, tokens, attention) -> [batch time]`, 0 at the first position.

    What the losses below differentiate, and so also how `old_logprobs` and `ref_logprobs` are made.
    """
    aligned = on_next_token(partial(token_logprobs, temperature=temperature))
    return lambda params, tokens, attention: aligned(apply(params, tokens, attention), tokens)


def sequence_logprobs(apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Callable:
    """Σₜ log π(tokenₜ) over the mask, as `f(params, tokens, attention, mask) -> [batch]`: DPO's quantity."""
    per_token = next_token_logprobs(apply, token_logprobs=token_logprobs)

    def summed(params: Params, tokens: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, per_token(params, tokens, attention), 0.0).sum(-1)

    return summed


def sft_loss(apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
    """L = −Σₜ wₜ log π(tokenₜ).   Metrics: loss, accuracy (how often the likeliest token is the right one)."""
    aligned = on_next_token(token_logprobs)
    hits = on_next_token(lambda logits, tokens: (logits.argmax(-1) == tokens).to(logits.dtype))

    def loss(params: Params, batch: SftBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        logits = apply(params, batch.tokens, batch.attention)
        total = weighted_sum(-aligned(logits, batch.tokens), batch.weights)
        accuracy = weighted_sum(hits(logits.detach(), batch.tokens), batch.weights)
        return total, {"loss": total, "accuracy": accuracy}

    return loss


def reward_loss(score_apply: Apply) -> Loss:
    """L = Σᵢ wᵢ · −log σ(r(chosenᵢ) − r(rejectedᵢ)), Bradley and Terry's.

    Metrics: loss, accuracy (a tie counts one half), reward/chosen, reward/rejected.
    Christiano et al. 2017: https://arxiv.org/abs/1706.03741
    """

    def loss(params: Params, batch: PairBatch | DpoBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        chosen = score_apply(params, batch.chosen, batch.chosen_attention)
        rejected = score_apply(params, batch.rejected, batch.rejected_attention)
        total = weighted_sum(preference.bradley_terry(chosen, rejected), batch.weights)
        return total, {"loss": total} | _preferred(chosen, rejected, batch.weights)

    return loss
