"""Rows of tokens as the batches of a run: padded, weighed, and in an order of their own."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import data
from rlhf_fn.batches import SftBatch
from rlhf_fn.data import Example
from rlhf_fn.pair_losses import PairBatch
from rlhf_fn.rollout import Prompts
from rlhf_fn.weights import token_mean

PairExample = tuple[Example, Example]


def sft_batch(examples: Sequence[Example], pad: int) -> SftBatch:
    """Right-padded rows; every token of a completion weighs the same."""
    tokens, attention, mask = data.pad(examples, side="right", pad=pad)
    return SftBatch(tokens, attention, token_mean(mask))


def pair_batch(pairs: Sequence[PairExample], pad: int) -> PairBatch:
    """Right-padded pairs; every pair weighs the same."""
    chosen, rejected = (data.pad(side, side="right", pad=pad) for side in zip(*pairs))
    return PairBatch(*chosen, *rejected, torch.full((len(pairs),), 1 / len(pairs)))


def prompt_batch(rows: Sequence[Sequence[int]], pad: int) -> Prompts:
    """Left-padded prompts: the tokens to come stand in one column."""
    return Prompts(*data.pad_prompts([list(row) for row in rows], pad=pad))


def prompt_batches(rows: Sequence[Sequence[int]], pad: int) -> list[Prompts]:
    """All prompts, 64 at a time."""
    return [prompt_batch(part, pad) for part in chunks(rows)]


def batches(
    rows: Sequence[Any],
    size: int,
    key: Tensor,
    make: Callable[[list[Any]], Any],
    *,
    window: int = 1,
    examples: Callable[[Any], Iterable[Example]] = tuple,
):
    """`batch(step)`: every row once an epoch, in an order that is a function of (key, step).

    Rows are as long as the longest of their `examples`; `window` as in `data.bucketed_indices`.
    """
    size = min(size, len(rows))
    order = partial(data.batch_indices, rows=len(rows))
    if window > 1:
        longest = [max(len(x.tokens) for x in examples(row)) for row in rows]
        order = partial(data.bucketed_indices, lengths=torch.tensor(longest), window=window)

    def batch(step: int) -> Any:
        return make([rows[i] for i in order(key, step, batch=size).tolist()])

    return batch


def chunks(rows: Sequence[Any], size: int = 64):
    """The rows, so many at a time."""
    return (rows[i : i + size] for i in range(0, len(rows), size))
