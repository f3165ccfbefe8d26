"""PPO on a language model: one iteration is a pure function of its state and a key.

Rollout → scores → shaped rewards → advantages → epochs of clipped steps on actor and critic.
Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155; Schulman et al. 2017, https://arxiv.org/abs/1707.06347
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import random, tree
from rlhf_fn.kl import adaptive_kl
from rlhf_fn.losses import ImitationBatch, PolicyBatch, ValueBatch
from rlhf_fn.methods import ActorCritic
from rlhf_fn.rewards import shape_rewards
from rlhf_fn.rollout import Prompts, Rollout
from rlhf_fn.steps import Step, TrainState, averages
from rlhf_fn.value import explained_variance
from rlhf_fn.weights import token_mean, weighted_sum

Metrics = dict[str, Tensor]


class PpoState(NamedTuple):
    actor: TrainState
    critic: TrainState
    kl_coef: Float[Tensor, ""]


class Roles(NamedTuple):
    """What PPO asks of its four models, as functions.

    `sample(params, prompts, keys)` is the actor's rollout; `logprobs(params, tokens, attention)`
    and `values(params, tokens, attention)` are aligned with tokens; `reference` are the frozen
    parameters that the KL penalty refers to; `score(rollout)` is one number per row.
    """

    sample: Callable[[Any, Prompts, Tensor], Rollout]
    logprobs: Callable[[Any, Tensor, Tensor], Tensor]
    values: Callable[[Any, Tensor, Tensor], Tensor]
    reference: dict[str, Tensor]
    score: Callable[[Rollout], Tensor]


class Experience(NamedTuple):
    """A rollout with everything that PPO's losses ask of it; all but scores `[batch, time]`."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    old_values: Float[Tensor, "batch time"]
    advantages: Float[Tensor, "batch time"]
    returns: Float[Tensor, "batch time"]
    scores: Float[Tensor, " batch"]


@torch.no_grad()
def experience(method: ActorCritic, roles: Roles, state: PpoState, rollout: Rollout) -> Experience:
    """Score a rollout and estimate its advantages, as `ActorCritic` says."""
    tokens, attention, mask = rollout.tokens, rollout.attention, rollout.mask
    ref_logprobs = roles.logprobs(roles.reference, tokens, attention)
    values = roles.values(state.critic.params, tokens, attention)
    scores = roles.score(rollout)
    rewards = shape_rewards(scores, rollout.logprobs, ref_logprobs, mask, beta=state.kl_coef)
    advantages, returns = method.estimate(rewards, values, mask)
    return Experience(
        tokens, attention, mask, rollout.logprobs, ref_logprobs, values, advantages, returns, scores
    )


def _minibatches(
    data: Experience, key: Tensor, *, epochs: int, number: int
) -> Iterator[Experience]:
    """Every row once an epoch, in an order drawn from the key."""
    for epoch_key in random.split(key, epochs):
        for rows in random.permutation(epoch_key, len(data.tokens)).chunk(number):
            yield Experience(*(x[rows] for x in data))


def near(method: ActorCritic) -> Callable[[Metrics], Tensor]:
    """Whether a step of the actor begins within `max_kl` of where the rollout was sampled.

    A KL that is NaN is for the driver to find, among the metrics.
    """
    return lambda metrics: ~(metrics["kl/old"] > method.max_kl)


def ppo(
    method: ActorCritic,
    roles: Roles,
    prompts: Callable[[int], Prompts],
    actor_step: Step,
    critic_step: Step,
) -> Callable[[PpoState, Tensor, int], tuple[PpoState, Metrics]]:
    """An iteration `(state, key, number) -> (state, metrics)` of `method` on `prompts(number)`.

    Prompts and keys, which may be on the CPU, are sampled from where the parameters are.
    An actor's step that is not `near` is not followed. One that donates has to refuse it by itself:
    `donating_step(..., accept=near(method))`.
    """

    def iteration(state: PpoState, key: Tensor, number: int) -> tuple[PpoState, Metrics]:
        sample_key, order_key, update_key = random.split(key, 3)
        params, asked = state.actor.params, prompts(number)
        keys = random.split(sample_key, len(asked.tokens))
        rollout = roles.sample(params, *tree.beside((asked, keys), params))
        data = experience(method, roles, state, rollout)
        parts = _minibatches(data, order_key, epochs=method.epochs, number=method.minibatches)
        step = actor_step if number >= method.critic_first else None
        actor, critic, updates = _update(method, state, parts, step, critic_step, update_key)
        metrics = _metrics(data, state.kl_coef) | averages(updates)
        metrics["updates"] = torch.tensor(float(len(updates)))
        kl_coef = state.kl_coef
        if method.target_kl is not None:
            kl_coef = adaptive_kl(
                kl_coef, metrics["kl/sequence"], target=method.target_kl, horizon=method.horizon,
                tokens=len(data.tokens),
            )  # fmt: skip
        return PpoState(actor, critic, kl_coef), metrics

    return iteration


def _update(
    method: ActorCritic,
    state: PpoState,
    parts: Iterator[Experience],
    actor_step: Step | None,
    critic_step: Step,
    key: Tensor,
) -> tuple[TrainState, TrainState, list[Metrics]]:
    """Steps of actor and critic until the parts end or the actor has gone too far."""
    actor, critic, updates = state.actor, state.critic, []
    for i, part in enumerate(parts):
        weights = method.weights(part.mask)
        step_key, metrics = random.fold_in(key, i), {}
        if actor_step is not None:
            new_actor, metrics = actor_step(actor, _policy_batch(method, part, weights), step_key)
            if not near(method)(metrics):
                break
            actor = new_actor
        critic, critic_metrics = critic_step(critic, _value_batch(part, weights), step_key)
        updates.append(metrics | {"loss/value": critic_metrics["loss"]})
    return actor, critic, updates


def _policy_batch(
    method: ActorCritic, part: Experience, weights: Tensor
) -> PolicyBatch | ImitationBatch:
    batch = PolicyBatch(
        part.tokens, part.attention, part.old_logprobs, part.ref_logprobs, part.advantages, weights
    )
    if method.imitation == 0:
        return batch
    good = method.weights(part.mask & (part.scores > 0)[:, None])
    return ImitationBatch(*batch, imitation=method.imitation * good)


def _value_batch(part: Experience, weights: Tensor) -> ValueBatch:
    return ValueBatch(part.tokens, part.attention, part.old_values, part.returns, weights)


def _metrics(data: Experience, kl_coef: Tensor) -> Metrics:
    weights = token_mean(data.mask)
    log_ratio = torch.where(data.mask, data.old_logprobs - data.ref_logprobs, 0.0)
    return {
        "reward": data.scores.mean(),
        "reward/std": data.scores.std(correction=0),
        "kl/token": weighted_sum(log_ratio, weights),
        "kl/sequence": log_ratio.sum(-1).mean(),
        "kl/coef": kl_coef,
        "length": data.mask.sum(-1).float().mean(),
        "tokens": data.mask.sum().float(),
        "value/explained": explained_variance(data.old_values, data.returns, data.mask),
    }
