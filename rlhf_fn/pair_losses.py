"""Losses of pairs, one answer preferred to another, and the batches they read.

As in `losses.py`, a loss is a weighted sum of what each pair has to say, and so is every metric.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import logprobs as lp
from rlhf_fn import preference
from rlhf_fn.losses import Apply, Loss, Metrics, kept, next_token_logprobs
from rlhf_fn.models import Params
from rlhf_fn.weights import weighted_sum


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


def sequence_logprobs(
    apply: Apply, *, token_logprobs: Callable = lp.token_logprobs
) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """Σₜ mₜ log πₜ, what DPO compares: `f(params, tokens, attention, mask) -> [batch]`."""
    per_token = next_token_logprobs(apply, token_logprobs=token_logprobs)

    def summed(params: Params, tokens: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, per_token(params, tokens, attention), 0.0).sum(-1)

    return summed


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
        ref_chosen = kept(batch.ref_logprobs_chosen, weights)
        ref_rejected = kept(batch.ref_logprobs_rejected, weights)
        losses = preference.dpo(
            chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing
        )
        total = weighted_sum(losses, weights)
        good = preference.implicit_reward(chosen, ref_chosen, beta=beta)
        bad = preference.implicit_reward(rejected, ref_rejected, beta=beta)
        return total, {"loss": total} | _preferred(good, bad, weights)

    return loss


def _preferred(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Metrics:
    wins = (1 + (chosen - rejected).detach().sign()) / 2
    per_pair = {"accuracy": wins, "reward/chosen": chosen, "reward/rejected": rejected}
    return {name: weighted_sum(x, weights) for name, x in per_pair.items()}
