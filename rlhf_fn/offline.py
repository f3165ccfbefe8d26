"""The stage that learns from pairs: what the reference says of them, once, and then a fold."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fn import batches, collate, random, tree
from rlhf_fn import config as configuration
from rlhf_fn import logprobs as lp
from rlhf_fn.collate import chunks, pad_answers
from rlhf_fn.config import ConfigError
from rlhf_fn.data import Example
from rlhf_fn.losses import Loss, Metrics
from rlhf_fn.models import Functional, Params
from rlhf_fn.pair_losses import DpoBatch, answer_logprobs
from rlhf_fn.ranks import by_rows, place, share_of, sum_over_ranks
from rlhf_fn.run import Run
from rlhf_fn.sharding import shared_for
from rlhf_fn.stages import folded, iteration_of
from rlhf_fn.steps import TrainState
from rlhf_fn.updates import begun, cosine, fused, readable, step_of


class Compared(NamedTuple):
    """Answers to a prompt, as `DpoBatch` orders them, and the reference's log-probs of each."""

    answers: tuple[Example, ...]
    ref_logprobs: tuple[Tensor, ...]


def mismatched(pairs: Sequence[tuple[Example, ...]], max_length: int) -> list[tuple[Example, ...]]:
    """Every pair, with both answers of the next pair that has another prompt, under its own.

    Raises:
        ConfigError: all pairs have one prompt.
    """

    def prompt(example: Example) -> list[int]:
        return example.tokens[: example.mask.index(True)]

    def under(before: list[int], other: Example) -> Example:
        after = other.tokens[other.mask.index(True) :]
        tokens = [*before, *after][:max_length]
        return Example(tokens, [i >= len(before) for i in range(len(tokens))])

    prompts = [prompt(pair[0]) for pair in pairs]
    if all(asked == prompts[0] for asked in prompts):
        raise ConfigError(
            "--recipe needs answers to other prompts, and all pairs of --data have the same one"
        )
    rows = []
    for i, (asked, pair) in enumerate(zip(prompts, pairs)):
        order = (j % len(pairs) for j in range(i + 1, i + len(pairs)))
        partner = pairs[next(j for j in order if prompts[j] != asked)]
        rows.append((*pair, *(under(asked, answer) for answer in partner)))
    return rows


def dpo_batch(rows: Sequence[Compared], pad: int) -> DpoBatch:
    """Answers as `collate.pad_answers` has them; every row weighs the same."""
    tokens, attention, mask = pad_answers([row.answers for row in rows], pad)
    refs = torch.cat([x for row in rows for x in row.ref_logprobs])
    aligned = refs.new_zeros(tokens.shape).masked_scatter(attention, refs)
    weights = torch.full((len(rows),), 1 / len(rows))
    return DpoBatch(tokens, attention, mask, aligned, weights)


@torch.no_grad()
def compared(
    reference: Functional | None,
    rows: Sequence[tuple[Example, ...]],
    *,
    size: int,
    pad: int,
    token_logprobs: Callable = lp.token_logprobs,
) -> list[Compared]:
    """Every row with the reference's log-probs of it, so many at a time; zeros without one."""
    blank = [Compared(row, tuple(torch.zeros(len(x.tokens)) for x in row)) for row in rows]
    if reference is None:
        return blank
    logprobs, found = answer_logprobs(reference.apply, token_logprobs=token_logprobs), []

    def said(batch: DpoBatch) -> Tensor:
        last = logprobs(reference.params, shared_for(reference.params, batches.asked(batch)))
        return F.pad(last, (batch.tokens.shape[-1] - last.shape[-1], 0))

    for part in chunks(blank, size):
        batch = tree.beside(dpo_batch(part, pad), reference.params)
        rows_said = by_rows(said)(batch)
        for row, each, real in zip(part, rows_said, batch.attention):
            cut = tuple(x[there].cpu() for x, there in zip(each, real))
            found.append(Compared(row.answers, cut))
    return found


@torch.no_grad()
def measured(
    loss: Loss, params: Params, rows: Sequence[Compared], *, size: int, pad: int
) -> dict[str, float]:
    """The metrics of a loss over all rows, each of which weighs the same; ranks share them out.

    A loss that compares the pairs of a batch compares so many.
    """
    total: Metrics = {}
    for part in chunks(rows, size):
        batch = tree.beside(dpo_batch(part, pad), params)
        mine, any_here = share_of(batch, place())
        _, metrics = loss(params, shared_for(params, batches.asked(mine)), random.key(0))
        metrics = sum_over_ranks(metrics if any_here else tree.zeros_like(metrics))
        share = tree.scale(metrics, len(part) / len(rows))
        total = tree.add(total, share) if total else share
    return {name: x.item() for name, x in total.items()}


def prefer(
    options: configuration.Dpo,
    loss: Loss,
    params: Params,
    train: Sequence[Compared],
    held_out: Sequence[Compared],
    *,
    run: Run,
    key: Tensor,
    pad: int,
    stage: str = "dpo",
) -> Params:
    """Lower a loss of pairs; the tuned parameters."""
    order_key, fold_key = random.split(key)
    optimizer = fused(cosine(options), options, weight_decay=options.weight_decay)
    rows = collate.batches(
        train, options.batch, order_key, partial(dpo_batch, pad=pad),
        window=options.window, examples=lambda row: row.answers,
    )  # fmt: skip
    time = max(len(x.tokens) for row in train for x in row.answers)
    step = step_of(loss, optimizer, options, rows=options.batch, time=time, share=True)
    plain = iteration_of(step, rows)

    def iteration(state: TrainState, key: Tensor, number: int):
        state, metrics = plain(state, key, number)
        if (number + 1) % options.every == 0 or number + 1 == options.steps:
            now = readable(state.params, options)
            found = measured(loss, now, held_out, size=options.batch, pad=pad)
            names = ("loss", "accuracy")
            metrics |= {f"held-out {name}": torch.tensor(found[name]) for name in names}
        return state, metrics

    start = begun(params, optimizer)
    return folded(options, iteration, start, fold_key, stage=stage, run=run).params
