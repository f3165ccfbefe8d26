"""What a method that learns from pairs is made of; the methods are values of `pair_recipes.py`.

A loss of floor 0 becomes an objective of `Answers` by what it is asked about: sums or means of
log-probs, with a reference or alone.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fn import logprobs as lp
from rlhf_fn.losses import Apply, Loss
from rlhf_fn.methods import described
from rlhf_fn.pair_losses import Answers, Objective, Reward, preference_loss
from rlhf_fn.pairs import desensitised_logprob
from rlhf_fn.preference import bradley_terry
from rlhf_fn.sequence import masked_mean, masked_sum
from rlhf_fn.unpaired import kto_baseline

Reduce = Callable[[Tensor, Tensor], Tensor]  # (per token, mask) -> per answer


class Offline(NamedTuple):
    """A method that learns from pairs of answers that are there already.

    L = Σᵢ wᵢ objective(chosenᵢ, rejectedᵢ)

    Args:
        paper: who published it, and where.
        objective: (chosen, rejected) -> one loss per pair, of `Answers`.
        reward: `Answers` -> what they are worth to this method, whose margin is reported; nats.
        reference: whether `ref_logprobs` are read; where not, they are 0.
        mismatched: whether the objective is also given both answers under another pair's prompt.
        whole: whether a pair's loss depends on the other pairs of its batch. Then micro-batches
            change it, and no pair may have weight 0.
    """

    paper: str
    objective: Objective
    reward: Reward
    reference: bool
    mismatched: bool
    whole: bool

    def loss(self, apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
        """The loss of a model on a `DpoBatch`."""
        return preference_loss(
            apply, objective=self.objective, reward=self.reward, token_logprobs=token_logprobs
        )

    def __repr__(self) -> str:
        return described(self)


# rewards


def log_ratio(answers: Answers) -> Tensor:
    """log π/π_ref of whole answers, or log π where there is no reference."""
    return masked_sum(answers.logprobs - answers.ref_logprobs, answers.mask)


def log_ratio_per_token(answers: Answers) -> Tensor:
    """`log_ratio` by the answer's length."""
    return masked_mean(answers.logprobs - answers.ref_logprobs, answers.mask)


# objectives


def of_sums(loss: Callable[..., Tensor], **hyperparameters: float) -> Objective:
    """A loss of the log-probs of whole answers: π's of both, then the reference's."""
    return partial(paired, reduce=masked_sum, loss=partial(loss, **hyperparameters))


def of_means(loss: Callable[..., Tensor], **hyperparameters: float) -> Objective:
    """`of_sums`, of log-probs per token."""
    return partial(paired, reduce=masked_mean, loss=partial(loss, **hyperparameters))


def of_policy_sums(loss: Callable[..., Tensor], **hyperparameters: float) -> Objective:
    """A loss of the policy's log-probs of whole answers, without a reference."""
    return partial(alone, reduce=masked_sum, loss=partial(loss, **hyperparameters))


def of_policy_means(loss: Callable[..., Tensor], **hyperparameters: float) -> Objective:
    """`of_policy_sums`, of log-probs per token."""
    return partial(alone, reduce=masked_mean, loss=partial(loss, **hyperparameters))


def paired(
    chosen: Answers, rejected: Answers, *, reduce: Reduce, loss: Callable[..., Tensor]
) -> Tensor:
    """loss(log π(y_w), log π(y_l), log π_ref(y_w), log π_ref(y_l))"""
    (good, ref_good), (bad, ref_bad) = (
        [reduce(x, answers.mask) for x in (answers.logprobs, answers.ref_logprobs)]
        for answers in (chosen, rejected)
    )
    return loss(good, bad, ref_good, ref_bad)


def alone(
    chosen: Answers, rejected: Answers, *, reduce: Reduce, loss: Callable[..., Tensor]
) -> Tensor:
    """loss(log π(y_w), log π(y_l))"""
    return loss(*(reduce(answers.logprobs, answers.mask) for answers in (chosen, rejected)))


def rewarded(
    chosen: Answers, rejected: Answers, *, reward: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`bradley_terry` of reward(log π, log π_ref), of whole answers."""
    return paired(
        chosen, rejected, reduce=masked_sum,
        loss=lambda good, bad, *refs: bradley_terry(reward(good, refs[0]), reward(bad, refs[1])),
    )  # fmt: skip


def desensitised(
    chosen: Answers, rejected: Answers, *, loss: Callable[..., Tensor], alpha: float
) -> Tensor:
    """`paired`, of log-probs that count α past the shorter answer's length."""
    shared = torch.minimum(chosen.mask.sum(-1), rejected.mask.sum(-1))

    def reduce(logprobs: Tensor, mask: Tensor) -> Tensor:
        return desensitised_logprob(logprobs, shared, mask, alpha=alpha)

    return paired(chosen, rejected, reduce=reduce, loss=loss)


def with_length(chosen: Answers, rejected: Answers, *, loss: Callable[..., Tensor]) -> Tensor:
    """`paired`, of sums, of a loss that is also given the length of the chosen answer."""
    lengths = chosen.mask.sum(-1).clamp(min=1)  # a pair that is not there has none

    return paired(chosen, rejected, reduce=masked_sum, loss=lambda *sums: loss(*sums, lengths))


def with_target(chosen: Answers, rejected: Answers, *, loss: Callable[..., Tensor]) -> Tensor:
    """`alone`, of sums, of a loss that is also given its target: the chosen answer once more."""
    return alone(chosen, rejected, reduce=masked_sum, loss=lambda good, bad: loss(good, bad, good))


def shifted(
    chosen: Answers, rejected: Answers, *, loss: Callable[..., Tensor], beta: float
) -> Tensor:
    """`paired`, of sums, of a loss that is also given the mean reward of its batch, held constant.

    δ = sg[β mean of log π/π_ref], over the chosen and the rejected answers
    """
    both = chosen, rejected
    there = torch.cat([answers.mask.any(-1) for answers in both])
    shift = beta * masked_mean(torch.cat([log_ratio(x) for x in both]), there).detach()
    return paired(chosen, rejected, reduce=masked_sum, loss=partial(loss, beta=beta, shift=shift))


def unpaired(
    chosen: Answers, rejected: Answers, *mismatched: Answers, loss: Callable[..., Tensor]
) -> Tensor:
    """Half of a loss of each answer, the chosen one desirable, with `kto_baseline` of others."""
    now, ref, mask = (torch.cat(fields) for fields in zip(*mismatched))
    baseline = kto_baseline(masked_sum(now, mask), masked_sum(ref, mask), mask.any(-1))

    def half(logprobs: Tensor, ref_logprobs: Tensor, desirable: bool) -> Tensor:
        marks = torch.full_like(logprobs, desirable, dtype=torch.bool)
        return loss(logprobs, ref_logprobs, marks, baseline=baseline) / 2

    return paired(
        chosen, rejected, reduce=masked_sum,
        loss=lambda good, bad, *refs: half(good, refs[0], True) + half(bad, refs[1], False),
    )  # fmt: skip


def surprise(chosen: Answers, rejected: Answers) -> Tensor:
    """−log π(y_w)/|y_w|: what supervised fine-tuning lowers."""
    return -masked_mean(chosen.logprobs, chosen.mask)


def mixed(
    chosen: Answers, rejected: Answers, *, weights: tuple[float, ...], **objectives: Objective
) -> Tensor:
    """Σₖ weightₖ objectiveₖ"""
    parts = zip(weights, objectives.values(), strict=True)
    return torch.stack([w * objective(chosen, rejected) for w, objective in parts]).sum(0)
