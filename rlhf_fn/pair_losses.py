"""Losses of pairs, one answer preferred to another, and the batches they read.

As in `losses.py`, a loss is a weighted sum of what each pair has to say, and so is every metric.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import logprobs as lp
from rlhf_fn import preference, tree
from rlhf_fn.batches import last_tokens
from rlhf_fn.losses import Apply, Loss, Metrics
from rlhf_fn.models import Params, on_next_token
from rlhf_fn.prefix import Prefixed
from rlhf_fn.sequence import masked_mean
from rlhf_fn.weights import weighted_sum


class PairBatch(NamedTuple):
    """Preference pairs, of which the first is chosen; a weight for each, the mask on the answers.

    The mask says where prompts end, which are read once if both have the same (`prefix.shared`).
    """

    tokens: Int[Tensor, "batch two time"]
    attention: Bool[Tensor, "batch two time"]
    mask: Bool[Tensor, "batch two last"]
    weights: Float[Tensor, " batch"]


class DpoBatch(NamedTuple):
    """Answers with the log-probs of the reference, aligned with their tokens.

    Of the answers to a prompt the first is chosen and the second rejected. Any others are only
    measured: KTO's are the two again, under the prompt of another pair.
    """

    tokens: Int[Tensor, "batch answers time"]
    attention: Bool[Tensor, "batch answers time"]
    mask: Bool[Tensor, "batch answers last"]
    ref_logprobs: Float[Tensor, "batch answers last"]
    weights: Float[Tensor, " batch"]


class Answers(NamedTuple):
    """One answer to each prompt; what the mask hides may be NaN, and so may all of a row."""

    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]


Objective = Callable[..., Tensor]  # (chosen: Answers, rejected: Answers, *others) -> [batch]
Reward = Callable[[Answers], Tensor]


def answer_logprobs(
    apply: Apply, *, token_logprobs: Callable = lp.token_logprobs
) -> Callable[[Params, DpoBatch], Tensor]:
    """log π of the tokens that a `DpoBatch` asks about, and how its `ref_logprobs` are made.

    `f(params, batch) -> [batch answers last]`, aligned with the mask. No gradient flows through
    those that are only measured.
    """
    aligned = on_next_token(token_logprobs)

    def of(params: Params, batch: DpoBatch) -> Tensor:
        tokens, attention, mask = (_rows(x) for x in batch[:3])
        rows = aligned(apply(params, tokens, attention), last_tokens(tokens, mask))
        return rows.unflatten(0, batch.mask.shape[:2])

    def logprobs(params: Params, batch: DpoBatch) -> Tensor:
        fields, weights = batch[:-1], batch.weights
        compared = of(params, DpoBatch(*(_some(x, slice(2)) for x in fields), weights=weights))
        if batch.mask.shape[1] == 2:
            return compared
        others = DpoBatch(*(_some(x, slice(2, None)) for x in fields), weights=weights)
        return torch.cat([compared, of(tree.stop(params), others)], 1)

    return logprobs


def _rows(x: Any) -> Any:
    """Every answer a row, as a model reads them."""
    return x if isinstance(x, Prefixed) else x.flatten(0, 1)


def _some(x: Any, answers: slice) -> Any:
    """Some of the answers to each prompt."""
    if isinstance(x, Prefixed):
        return x._replace(rest=x.rest[:, answers])
    return x[:, answers]


def pair_scores(
    score_apply: Apply, params: Params, batch: PairBatch
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Of the chosen answers, and of the rejected ones."""
    scores = score_apply(params, _rows(batch.tokens), _rows(batch.attention))
    chosen, rejected = scores.unflatten(0, (-1, 2)).unbind(1)
    return chosen, rejected


def reward_loss(score_apply: Apply) -> Loss:
    """L = −Σᵢ wᵢ log σ(r(chosenᵢ) − r(rejectedᵢ)), with r = `score_apply`, one score per row.

    Metrics: loss, accuracy (a tie counts one half), reward/chosen and reward/rejected.
    Christiano et al. 2017: https://arxiv.org/abs/1706.03741
    """

    def loss(params: Params, batch: PairBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        chosen, rejected = pair_scores(score_apply, params, batch)
        total = weighted_sum(preference.bradley_terry(chosen, rejected), batch.weights)
        per_pair = _preferred(chosen, rejected)
        return total, {"loss": total} | _averages(per_pair, batch.weights)

    return loss


def preference_loss(
    apply: Apply,
    *,
    objective: Objective,
    reward: Reward,
    token_logprobs: Callable = lp.token_logprobs,
) -> Loss:
    """L = Σᵢ wᵢ objective(chosenᵢ, rejectedᵢ): the policy is its own reward model.

    DPO and its relatives: they differ in `objective`, which is given `Answers` and gives one loss
    per pair. `reward` is what their answers are worth by it, in nats, and is only measured.

    Metrics: loss, accuracy (a tie counts one half), reward/chosen and reward/rejected, and
    logprob/chosen and logprob/rejected, means over an answer's tokens.
    Rafailov et al. 2023: https://arxiv.org/abs/2305.18290
    """
    logprobs = answer_logprobs(apply, token_logprobs=token_logprobs)

    def loss(params: Params, batch: DpoBatch, key: Tensor) -> tuple[Tensor, Metrics]:
        del key
        answers = _answers(logprobs(params, batch), batch)
        total = weighted_sum(objective(*answers), batch.weights)
        chosen, rejected, *_ = answers
        per_pair = _preferred(reward(chosen), reward(rejected)) | {
            "logprob/chosen": masked_mean(chosen.logprobs, chosen.mask),
            "logprob/rejected": masked_mean(rejected.logprobs, rejected.mask),
        }
        return total, {"loss": total} | _averages(per_pair, batch.weights)

    return loss


def _answers(logprobs: Tensor, batch: DpoBatch) -> list[Answers]:
    """The chosen answers, the rejected ones, and any others."""
    mask = batch.mask & (batch.weights != 0)[:, None, None]
    fields = (x.unbind(1) for x in (logprobs, batch.ref_logprobs, mask))
    return [Answers(*each) for each in zip(*fields)]


def _preferred(chosen: Tensor, rejected: Tensor) -> Metrics:
    wins = (1 + (chosen - rejected).detach().sign()) / 2
    return {"accuracy": wins, "reward/chosen": chosen, "reward/rejected": rejected}


def _averages(per_pair: Metrics, weights: Tensor) -> Metrics:
    return {name: weighted_sum(x, weights) for name, x in per_pair.items()}
