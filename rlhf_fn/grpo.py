"""Learning from groups of answers: one iteration is a pure function of its state and a key.

Prompts → groups of answers → scores → advantages → epochs of steps. Which method it is, is a value
of `recipes.py`. Shao et al. 2024: https://arxiv.org/abs/2402.03300
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

from rlhf_fn import random, tree
from rlhf_fn.checks import NonFiniteError
from rlhf_fn.external import importance
from rlhf_fn.losses import Metrics, PolicyBatch
from rlhf_fn.methods import Online, Samples
from rlhf_fn.models import Params
from rlhf_fn.rollout import Prompts, Rollout
from rlhf_fn.steps import Step, TrainState, averages
from rlhf_fn.weights import token_mean, weighted_sum


class Asked(NamedTuple):
    """Prompts, and the number of the record that each is from, for a reward that looks it up."""

    prompts: Prompts
    records: Int[Tensor, " batch"]


class Roles(NamedTuple):
    """What the method asks of its models and of its rewards, as functions.

    `sample(params, prompts, keys)` draws an answer for every key, a group of them to each prompt,
    and `greedy(params, prompts, keys)` the likeliest; `logprobs(params, tokens, attention)` are
    aligned with tokens; `reference` are the frozen parameters; `score(rollout, records)` is one
    number per row. `correction` is for a `sample` that is not the policy's own (`external.py`): of
    log-ratios, what each token weighs.
    """

    sample: Callable[[Params, Prompts, Tensor], Rollout]
    greedy: Callable[[Params, Prompts, Tensor], Rollout]
    logprobs: Callable[[Params, Tensor, Tensor], Tensor]
    reference: Params
    score: Callable[[Rollout, Tensor], Tensor]
    correction: Callable[[Tensor], Tensor] | None = None


def grpo(
    method: Online, roles: Roles, prompts: Callable[[int], Asked], step: Step, *, pad: int
) -> Callable[[TrainState, Tensor, int], tuple[TrainState, Metrics]]:
    """An iteration `(state, key, number) -> (state, metrics)` of `method` on `prompts(number)`.

    Where the method keeps only some prompts it asks more of them, at most `rounds` times, until it
    has as many as it asked at first; with none at all the state stays as it is. A reference that
    the method does not read is not asked, and no metric speaks of it. Prompts and keys, which may
    be on the CPU, are sampled from where the parameters are.
    """

    said = dict if refers(method) else _without_reference

    def iteration(state: TrainState, key: Tensor, number: int) -> tuple[TrainState, Metrics]:
        sample_key, order_key, update_key = random.split(key, 3)
        asked = (prompts(number * method.rounds + i) for i in range(method.rounds))
        samples, metrics = _gathered(method, roles, state.params, asked, sample_key, pad)
        if not len(samples.scores):
            return state, metrics | {"updates": torch.tensor(0.0)}
        advantages = method.advantages(samples)
        updates = []
        for epoch_key in random.split(order_key, method.epochs):
            order = random.permutation(epoch_key, len(samples.scores))
            for rows in order.chunk(method.minibatches):
                part = tree.map(lambda x, rows=rows: x[rows], samples)
                batch = policy_batch(part, advantages[rows], method.weights)
                state, after = step(state, batch, random.fold_in(update_key, len(updates)))
                updates.append(per_weight(said(after), batch.weights))
        return state, metrics | averages(updates) | {"updates": torch.tensor(float(len(updates)))}

    return iteration


@torch.no_grad()
def samples_of(
    method: Online, roles: Roles, params: Params, asked: Asked, key: Tensor
) -> tuple[Samples, Metrics]:
    """A group of scored answers to every prompt, and what there is to say of them."""
    draw_key, greedy_key = random.split(key)
    number, group = len(asked.records), method.group
    keys = random.split(draw_key, number * group), random.split(greedy_key, number)
    asked, (keys, greedy_keys) = tree.beside((asked, keys), params)
    rollout = roles.sample(params, asked.prompts, keys)
    rollout, weight, gap = _as_own(roles, params, rollout)
    ref_logprobs, asks = torch.full_like(rollout.logprobs, torch.nan), refers(method)
    if asks:
        ref_logprobs = roles.logprobs(roles.reference, rollout.tokens, rollout.attention)
    scores = roles.score(rollout, repeat(asked.records, "p -> (p g)", g=group))
    shaped = rearrange(method.shaping(scores, rollout.mask.sum(-1)), "(p g) -> p g", g=group)
    greedy = torch.full_like(shaped[:, 0], torch.nan)
    if method.greedy:
        likeliest = roles.greedy(params, asked.prompts, greedy_keys)
        greedy = method.shaping(roles.score(likeliest, asked.records), likeliest.mask.sum(-1))
    aligned = tuple(
        rearrange(x, "(p g) t -> p g t", g=group) for x in (*rollout, ref_logprobs, weight)
    )
    samples = Samples(*aligned, scores=shaped, greedy_scores=greedy)
    metrics = _metrics(samples, rearrange(scores, "(p g) -> p g", g=group))
    return samples, (metrics if asks else _without_reference(metrics)) | gap


def _as_own(roles: Roles, params: Params, rollout: Rollout) -> tuple[Rollout, Tensor, Metrics]:
    """The rollout with the policy's log-probs, what its tokens weigh, and how far it was off."""
    if roles.correction is None:
        return rollout, torch.ones_like(rollout.logprobs), {}
    own = roles.logprobs(params, rollout.tokens, rollout.attention)
    weight, gap = importance(own, rollout, correction=roles.correction)
    return rollout._replace(logprobs=own), weight, gap


def _gathered(
    method: Online, roles: Roles, params: Params, asked: Iterable[Asked], key: Tensor, pad: int
) -> tuple[Samples, Metrics]:
    """The samples of the prompts that are kept, of as many rounds as it takes."""
    parts, metrics, wanted = [], [], 0
    for i, ask in enumerate(asked):
        samples, about = samples_of(method, roles, params, ask, random.fold_in(key, i))
        keep = method.keep(samples.scores)
        parts.append(tree.map(lambda x, keep=keep: x[keep], samples))
        metrics.append(about | {"groups/kept": keep.float().mean()})
        wanted = max(wanted, len(keep))
        if sum(len(part.scores) for part in parts) >= wanted:
            break
    kept = tree.map(lambda *x: torch.cat(x)[:wanted], *_one_width(parts, pad))
    tokens = torch.stack([about["tokens"] for about in metrics]).sum()
    return kept, averages(metrics) | {"tokens": tokens}


def _one_width(parts: list[Samples], pad: int) -> list[Samples]:
    """Parts whose prompts were padded to different widths, padded to the same on the left."""
    width = max(part.tokens.shape[-1] for part in parts)

    def widened(x: Tensor, value: int) -> Tensor:
        return x if x.ndim < 3 else F.pad(x, (width - x.shape[-1], 0), value=value)

    return [
        Samples(widened(part.tokens, pad), *(widened(x, 0) for x in part[1:])) for part in parts
    ]


def policy_batch(
    samples: Samples, advantages: Tensor, weights: Callable[[Tensor], Tensor]
) -> PolicyBatch:
    """Groups as the rows of one batch, with the weights of its own denominator."""
    s, weight = samples, weights(samples.mask) * samples.importance
    fields = s.tokens, s.attention, s.old_logprobs, s.ref_logprobs, advantages, weight
    return PolicyBatch(*(rearrange(x, "p g t -> (p g) t") for x in fields))


def per_weight(metrics: Metrics, weights: Tensor) -> Metrics:
    """Metrics per unit of weight: of fixed-length weights, too, means over tokens."""
    total = weights.sum()
    whole = {"loss", "policy", "grad/norm", "finite"}
    return {name: x if name in whole else x / total for name, x in metrics.items()}


def equal_answers(group: int) -> Samples:
    """One prompt with as many answers of one token, worth the same."""
    mask = torch.ones(1, group, 1, dtype=torch.bool)
    zeros = torch.zeros(1, group, 1)
    ones = torch.ones_like(zeros)
    return Samples(mask.long(), mask, mask, zeros, zeros, ones, zeros[..., 0], zeros[:, 0, 0])


def refers(method: Online) -> bool:
    """Whether its loss or its advantages read `ref_logprobs`; the advantages are asked."""
    samples = equal_answers(method.group)
    absent = torch.full_like(samples.ref_logprobs, torch.nan)
    try:
        advantages = method.advantages(samples._replace(ref_logprobs=absent))
    except NonFiniteError:
        return True
    return method.kl_coef != 0 or not bool(advantages.isfinite().all())


def _without_reference(metrics: Metrics) -> Metrics:
    """The metrics that speak of no reference."""
    return {name: x for name, x in metrics.items() if name not in ("kl/token", "kl/ref")}


def _metrics(samples: Samples, scores: Tensor) -> Metrics:
    weights = token_mean(samples.mask)
    return {
        "reward": scores.mean(),
        "reward/std": scores.std(-1, correction=0).mean(),
        "kl/token": weighted_sum(samples.old_logprobs - samples.ref_logprobs, weights),
        "length": samples.mask.sum(-1).float().mean(),
        "tokens": samples.mask.sum().float(),
    }
