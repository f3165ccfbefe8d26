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
    """Pairs as `pad_answers` has them; each weighs the same."""
    return PairBatch(*pad_answers(pairs, pad), torch.full((len(pairs),), 1 / len(pairs)))


def pad_answers(rows: Sequence[Sequence[Example]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention and mask of answers to prompts, [batch answers time].

    As wide as the longest, T tokens. What the answers to a prompt have before column c is read once
    (`prefix.shared`): c + answers (T − c) tokens, fewest if c is as late as the longest answer
    allows. A row with a shorter prompt begins later, in the room that it would pad on the right.
    """
    prompts = torch.tensor([prompt_length(row) for row in rows])
    longest = torch.tensor([max(len(x.tokens) for x in row) for row in rows])
    column, answers = longest.max() - (longest - prompts).max(), len(rows[0])
    padded = data.pad([x for row in rows for x in row], side="right", pad=pad)
    start = (column - prompts).clamp(min=0).repeat_interleave(answers)[:, None]
    turned = (torch.arange(padded.tokens.shape[-1]) - start) % padded.tokens.shape[-1]
    tokens, attention, mask = (x.gather(-1, turned).unflatten(0, (-1, answers)) for x in padded)
    return tokens, attention, mask


def keep_ends(row: Sequence[Example], length: int, *, head: int = 0) -> tuple[Example, ...]:
    """At most `length` tokens of each: a preference is read off answers, at the end of a dialogue.

    They keep one prompt: what is cut from that of the longest is cut from all, but for the first
    `head` tokens, a BOS.
    """
    cut = min(max(len(x.tokens) for x in row) - length, prompt_length(row) - head)

    def end(x: Example) -> Example:
        at = head + max(cut, len(x.tokens) - length, 0)
        return Example(x.tokens[:head] + x.tokens[at:], x.mask[:head] + x.mask[at:])

    return tuple(end(x) for x in row)


def prompt_length(row: Sequence[Example]) -> int:
    """The tokens that come before any answer of a row."""
    return min([*x.mask, True].index(True) for x in row)


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
