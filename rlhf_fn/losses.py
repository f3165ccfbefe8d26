"""Losses of policies and values: `loss(params, batch, key) -> (scalar, metrics)`.

Every loss is a weighted sum and so is every metric: parts of a batch, and ranks, just add. The
weights are part of the batch (`batches.py`), normalised once over the whole of it (`weights.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from rlhf_fn import checks, kl, policy, tree, value
from rlhf_fn import logprobs as lp
from rlhf_fn.batches import (
    ActorCriticBatch,
    ImitationBatch,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    last_tokens,
)
from rlhf_fn.models import Params, on_next_token
from rlhf_fn.prefix import Prefixed
from rlhf_fn.projection import logprobs_and_entropy, logprobs_and_hits
from rlhf_fn.weights import weighted_sum

Metrics = dict[str, Tensor]
Loss = Callable[[Params, Any, Tensor], tuple[Tensor, Metrics]]
Apply = Callable[..., Any]  # apply(params, tokens, attention), as models.py makes them
Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Penalty = Callable[[Tensor, Tensor], Tensor]


def next_token_logprobs(
    apply: Apply,
    *,
    temperature: float | Tensor = 1.0,
    last: int | None = None,
    token_logprobs: Callable = lp.token_logprobs,
) -> Callable[[Params, Any, Any], Tensor]:
    """log π(tokenₜ | tokens before t): `f(params, tokens, attention) -> [batch time]`, f₀ = 0.

    What the losses below differentiate, and so how `old_logprobs` and `ref_logprobs` are made.
    `last` asks only about so many tokens at the end; the others are 0, as are those of a `Prefixed`
    before its rows part.
    """
    aligned = on_next_token(partial(token_logprobs, temperature=temperature))

    def logprobs(params: Params, tokens: Any, attention: Any) -> Tensor:
        read, before = tokens, 0
        if isinstance(tokens, Prefixed):
            read, before = tokens.rows, tokens.prefix.shape[-1]
        out = aligned(apply(params, tokens, attention), read if last is None else read[..., -last:])
        return F.pad(out, (before + read.shape[-1] - out.shape[-1], 0))

    return logprobs


def sft_loss(apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
    """L = −Σₜ wₜ log π(tokenₜ). Metrics: loss, and accuracy: of the likeliest token."""
    statistics = on_next_token(logprobs_and_hits(token_logprobs))

    def loss(params: Params, batch: SftBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key  # nothing here is random
        logits = apply(params, batch.tokens, batch.attention)
        logprobs, hits = statistics(logits, last_tokens(batch.tokens, batch.weights))
        total = weighted_sum(-logprobs, batch.weights)
        right = weighted_sum(hits.to(batch.weights.dtype), batch.weights)
        return total, {"loss": total, "accuracy": right}

    return loss


def of_tokens(surrogate: Callable[..., Tensor], **hyperparameters: float | Tensor) -> Surrogate:
    """A surrogate of each token by itself, called as those of whole answers: with a mask."""
    return partial(tokenwise, surrogate=partial(surrogate, **hyperparameters))


def tokenwise(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: Callable[..., Tensor],
) -> Tensor:
    """`surrogate(logprobs, old_logprobs, advantages)`: what a token owes has no need of a mask."""
    del mask
    return surrogate(logprobs, old_logprobs, advantages)


def policy_loss(
    apply: Apply,
    *,
    surrogate: Surrogate,
    penalty: Penalty,
    kl_coef: float | Tensor,
    entropy_coef: float | Tensor,
    temperature: float | Tensor,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = Σₜ wₜ (surrogateₜ + β penaltyₜ − c Hₜ), and − Σₜ vₜ log πₜ of an `ImitationBatch`.

    PPO, GRPO and their relatives: they differ in `surrogate`, and in `advantages` and `weights`,
    which are data. `surrogate(logprobs, old_logprobs, advantages, mask)` and
    `penalty(logprobs, ref_logprobs)` are per token. Of the estimates of KL(π ‖ π_ref) only `k2` has
    its gradient, on the policy's own samples (`kl.py`). `temperature` is the one sampled at.
    c = 0.0 spares the entropy its backward pass, and with β = 0.0 only kl/ref reads `ref_logprobs`.
    `token_logprobs` may return (log π, H), as `rlhf_kernels.token_logprobs_and_entropy` does in one
    pass; with `projection.py` there are no logits at all.

    Raises: ValueError unless β ≥ 0: less would pay for leaving the reference; and later, where
    `surrogate` is of whole answers, a batch that is packed.

    Metrics: loss, policy (the surrogate), kl/old (k3) and kl/ref (k1) in nats per token, entropy,
    and clip/fraction: of the tokens with an advantage, those the surrogate gives no gradient.
    Schulman et al. 2017: https://arxiv.org/abs/1707.06347
    """
    checks.non_negative(kl_coef=kl_coef)
    spare, alone = (not isinstance(c, Tensor) and c == 0 for c in (entropy_coef, kl_coef))
    both = logprobs_and_entropy(token_logprobs, temperature=temperature, spare=spare)
    statistics = on_next_token(both)

    def loss(params: Params, batch: PolicyBatch | ActorCriticBatch | ImitationBatch, key: Tensor):
        del key
        _require_apart(surrogate, batch)
        logits = apply(params, batch.tokens, batch.attention)
        own, entropies = statistics(logits, last_tokens(batch.tokens, batch.weights))
        fields = own, batch.old_logprobs, batch.ref_logprobs, batch.advantages
        logprobs, old, ref, advantages = (kept(x, batch.weights) for x in fields)
        inputs = logprobs, old, advantages, batch.weights != 0
        per_token = {
            "policy": surrogate(*inputs),
            "clip/fraction": _silent(surrogate, *inputs),
            "kl/old": policy.approximate_kl(logprobs, old),
            "kl/ref": kl.k1(logprobs, ref),
            "entropy": entropies,
        }
        metrics = {name: weighted_sum(x, batch.weights) for name, x in per_token.items()}
        total = metrics["policy"]
        if not alone:
            total = total + kl_coef * weighted_sum(penalty(logprobs, ref), batch.weights)
        total = total - entropy_coef * metrics["entropy"]
        if isinstance(batch, ImitationBatch):
            metrics["imitation"] = weighted_sum(-own, batch.imitation)
            total = total + metrics["imitation"]
        return total, metrics | {"loss": total}

    return loss


def value_loss(apply: Apply, *, clip: float | Tensor) -> Loss:
    """L = Σₜ wₜ `clipped_value_loss`ₜ; clip = ∞ is half the squared error.

    Metrics: loss, value, return, value/error and return/square: means of V, R, (V − R)² and R².
    Schulman et al. 2017, eq. 9: https://arxiv.org/abs/1707.06347
    """

    def loss(params: Params, batch: ValueBatch | ActorCriticBatch, key: Tensor):
        del key
        said = last_tokens(apply(params, batch.tokens, batch.attention), batch.weights)
        fields = said, batch.old_values, batch.returns
        values, old_values, returns = (kept(x, batch.weights) for x in fields)
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
    surrogate: Surrogate,
    penalty: Penalty,
    kl_coef: float | Tensor,
    entropy_coef: float | Tensor,
    temperature: float | Tensor,
    value_clip: float | Tensor,
    value_coef: float | Tensor,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = L_policy + c_v L_value, of one backbone with two heads in one forward pass.

    `apply` returns (logits, values). Metrics: those of `policy_loss` and `value_loss`; loss is L.
    Schulman et al. 2017, eq. 9: https://arxiv.org/abs/1707.06347
    """
    actor = policy_loss(
        _given, surrogate=surrogate, penalty=penalty, kl_coef=kl_coef, entropy_coef=entropy_coef,
        temperature=temperature, token_logprobs=token_logprobs,
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


def _require_apart(surrogate: Surrogate, batch: Any) -> None:
    attention = tree.leaves(batch.attention)[0]
    if attention.dtype != torch.bool and _joins(surrogate, batch.weights):
        raise ValueError(
            "batch is packed, and the surrogate is of whole answers: it would take those that "
            "share a row for one; pass the batch as it was before pack"
        )


def _joins(surrogate: Surrogate, like: Tensor) -> bool:
    """Whether what a token owes depends on the other one of its row: tried on a good and a bad.

    False where numbers cannot be read.
    """
    row, good = like.new_full((2, 2), -1.0), like.new_tensor([[1.0], [-1.0]]).expand(2, 2)
    moved = row - like.new_tensor([0.0, 0.5])
    one, other = (surrogate(x, row, good, row < 0)[:, 0] for x in (row, moved))
    return checks.concrete(other) and not torch.equal(one, other)


def _silent(
    surrogate: Surrogate, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """1 where a token has an advantage, and yet no gradient."""
    total = partial(_total, surrogate, old.detach(), advantages.detach(), mask)
    return ((grad(total)(logprobs.detach()) == 0) & (advantages != 0)).to(logprobs.dtype)


def _total(
    surrogate: Surrogate, old: Tensor, advantages: Tensor, mask: Tensor, logprobs: Tensor
) -> Tensor:
    return surrogate(logprobs, old, advantages, mask).sum()


def kept(x: Tensor, weights: Tensor) -> Tensor:
    """x where its weight is not 0, else 0: a NaN there reaches neither the loss nor a gradient."""
    return torch.where(weights != 0, x, 0.0)
