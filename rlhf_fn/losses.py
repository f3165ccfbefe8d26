"""Losses and the batches they read: `loss(params, batch, key) -> (scalar, metrics)`.

Every loss is a weighted sum and so is every metric: parts of a batch, and ranks, just add. The
weights are part of the batch, normalised once over the whole of it (`weights.py`). Position t of
every field speaks of token t. Where a weight is 0 no field but `tokens` and `attention` is read,
and no gradient flows: that is where the policy did not choose the token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import kl, policy, preference, value
from rlhf_fn import logprobs as lp
from rlhf_fn.models import Params, on_next_token
from rlhf_fn.projection import likeliest, logprobs_and_entropy
from rlhf_fn.weights import weighted_sum

Metrics = dict[str, Tensor]
Loss = Callable[[Params, Any, Tensor], tuple[Tensor, Metrics]]
Apply = Callable[..., Any]  # apply(params, tokens, attention), as models.py makes them


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
    """log π(tokenₜ | tokens before t): `f(params, tokens, attention) -> [batch time]`, f₀ = 0.

    What the losses below differentiate, and so how `old_logprobs` and `ref_logprobs` are made.
    """
    aligned = on_next_token(partial(token_logprobs, temperature=temperature))
    return lambda params, tokens, attention: aligned(apply(params, tokens, attention), tokens)


def sequence_logprobs(
    apply: Apply, *, token_logprobs: Callable = lp.token_logprobs
) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """Σₜ mₜ log πₜ, what DPO compares: `f(params, tokens, attention, mask) -> [batch]`."""
    per_token = next_token_logprobs(apply, token_logprobs=token_logprobs)

    def summed(params: Params, tokens: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, per_token(params, tokens, attention), 0.0).sum(-1)

    return summed


def sft_loss(apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
    """L = −Σₜ wₜ log π(tokenₜ). Metrics: loss, and accuracy: of the likeliest token."""
    aligned = on_next_token(token_logprobs)
    hits = on_next_token(lambda logits, tokens: likeliest(logits) == tokens)

    def loss(params: Params, batch: SftBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key  # nothing here is random
        logits = apply(params, batch.tokens, batch.attention)
        total = weighted_sum(-aligned(logits, batch.tokens), batch.weights)
        right = hits(logits, batch.tokens).to(batch.weights.dtype)
        return total, {"loss": total, "accuracy": weighted_sum(right, batch.weights)}

    return loss


def reward_loss(score_apply: Apply) -> Loss:
    """L = −Σᵢ wᵢ log σ(r(chosenᵢ) − r(rejectedᵢ)), with r = `score_apply`, one score per row.

    Metrics: loss, accuracy (a tie counts one half), reward/chosen and reward/rejected.
    Christiano et al. 2017: https://arxiv.org/abs/1706.03741
    """

    def loss(params: Params, batch: PairBatch | DpoBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        chosen = score_apply(params, batch.chosen, batch.chosen_attention)
        rejected = score_apply(params, batch.rejected, batch.rejected_attention)
        total = weighted_sum(preference.bradley_terry(chosen, rejected), batch.weights)
        return total, {"loss": total} | _preferred(chosen, rejected, batch.weights)

    return loss


def preference_loss(
    apply: Apply,
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = Σᵢ wᵢ `dpo`ᵢ: the policy is its own reward model, r = β log π/π_ref.

    Metrics: loss, accuracy (a tie counts one half), reward/chosen and reward/rejected.
    Rafailov et al. 2023: https://arxiv.org/abs/2305.18290
    """
    summed = sequence_logprobs(apply, token_logprobs=token_logprobs)

    def loss(params: Params, batch: DpoBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        weights = batch.weights
        chosen = summed(params, batch.chosen, batch.chosen_attention, batch.chosen_mask)
        rejected = summed(params, batch.rejected, batch.rejected_attention, batch.rejected_mask)
        ref_chosen = _kept(batch.ref_logprobs_chosen, weights)
        ref_rejected = _kept(batch.ref_logprobs_rejected, weights)
        losses = preference.dpo(
            chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing
        )
        total = weighted_sum(losses, weights)
        good = preference.implicit_reward(chosen, ref_chosen, beta=beta)
        bad = preference.implicit_reward(rejected, ref_rejected, beta=beta)
        return total, {"loss": total} | _preferred(good, bad, weights)

    return loss


def policy_loss(
    apply: Apply,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    temperature: float | Tensor,
    kl_coef: float | Tensor,
    entropy_coef: float | Tensor,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = Σₜ wₜ (clipped_surrogateₜ + β ½ (log πₜ − log π_ref,ₜ)² − c Hₜ).

    PPO, GRPO, DAPO and Dr. GRPO: they differ in `advantages` and `weights`, which are data. Of the
    estimates of KL(π ‖ π_ref) only k2 has its gradient, on the policy's own samples (`kl.py`).
    `temperature` is the one sampled at. c = 0.0 spares the entropy its backward pass.
    `token_logprobs` may return (log π, H), as `rlhf_kernels.token_logprobs_and_entropy` does in one
    pass; with `projection.py` there are no logits at all.

    Metrics: loss, policy (the surrogate), kl/old (k3) and kl/ref (k1) in nats per token,
    clip/fraction, entropy. Schulman et al. 2017: https://arxiv.org/abs/1707.06347
    """
    spare = not isinstance(entropy_coef, Tensor) and entropy_coef == 0
    both = logprobs_and_entropy(token_logprobs, temperature=temperature, spare=spare)
    statistics = on_next_token(both)

    def loss(params: Params, batch: PolicyBatch | ActorCriticBatch, key: Tensor):
        del key
        logits = apply(params, batch.tokens, batch.attention)
        logprobs, entropies = statistics(logits, batch.tokens)
        fields = logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages
        logprobs, old, ref, advantages = (_kept(x, batch.weights) for x in fields)
        clip = {"clip_low": clip_low, "clip_high": clip_high}
        per_token = {
            "policy": policy.clipped_surrogate(logprobs, old, advantages, **clip),
            "clip/fraction": policy.clip_fraction(logprobs, old, advantages, **clip),
            "kl/old": policy.approximate_kl(logprobs, old),
            "kl/ref": kl.k1(logprobs, ref),
            "entropy": entropies,
        }
        metrics = {name: weighted_sum(x, batch.weights) for name, x in per_token.items()}
        penalty = weighted_sum(kl.k2(logprobs, ref), batch.weights)
        total = metrics["policy"] + kl_coef * penalty - entropy_coef * metrics["entropy"]
        return total, metrics | {"loss": total}

    return loss


def value_loss(apply: Apply, *, clip: float | Tensor) -> Loss:
    """L = Σₜ wₜ `clipped_value_loss`ₜ; clip = ∞ is half the squared error.

    Metrics: loss, value, return, value/error and return/square: means of V, R, (V − R)² and R².
    Schulman et al. 2017, eq. 9: https://arxiv.org/abs/1707.06347
    """

    def loss(params: Params, batch: ValueBatch | ActorCriticBatch, key: Tensor):
        del key
        fields = apply(params, batch.tokens, batch.attention), batch.old_values, batch.returns
        values, old_values, returns = (_kept(x, batch.weights) for x in fields)
        per_token = {
            "loss": value.clipped_value_loss(values, old_values, returns, clip=clip),
            "value": values,
            "return": returns,
            "value/error": (values - returns).square(),
            "return/square": returns.square(),
        }
        metrics = {name: weighted_sum(x, batch.weights) for name, x in per_token.items()}
        return metrics["loss"], metrics

    return loss


def actor_critic_loss(
    apply: Apply,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    temperature: float | Tensor,
    kl_coef: float | Tensor,
    entropy_coef: float | Tensor,
    value_clip: float | Tensor,
    value_coef: float | Tensor,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = L_policy + c_v L_value, of one backbone with two heads in one forward pass.

    `apply` returns (logits, values). Metrics: those of `policy_loss` and `value_loss`; loss is L.
    Schulman et al. 2017, eq. 9: https://arxiv.org/abs/1707.06347
    """
    actor = policy_loss(
        _given, clip_low=clip_low, clip_high=clip_high, temperature=temperature,
        kl_coef=kl_coef, entropy_coef=entropy_coef, token_logprobs=token_logprobs,
    )  # fmt: skip
    critic = value_loss(_given, clip=value_clip)

    def loss(params: Params, batch: ActorCriticBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        logits, values = apply(params, batch.tokens, batch.attention)
        policy_part, policy_metrics = actor({"outputs": logits}, batch, key)
        value_part, value_metrics = critic({"outputs": values}, batch, key)
        total = policy_part + value_coef * value_part
        return total, policy_metrics | value_metrics | {"loss": total}

    return loss


def _given(params: Params, tokens: Tensor, attention: Tensor) -> Tensor:
    """The model already ran: its outputs stand in for its parameters."""
    return params["outputs"]


def _kept(x: Tensor, weights: Tensor) -> Tensor:
    """x where its weight is not 0, else 0: a NaN there reaches neither the loss nor a gradient."""
    return torch.where(weights != 0, x, 0.0)


def _preferred(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Metrics:
    wins = (1 + (chosen - rejected).detach().sign()) / 2
    per_pair = {"accuracy": wins, "reward/chosen": chosen, "reward/rejected": rejected}
    return {name: weighted_sum(x, weights) for name, x in per_pair.items()}
