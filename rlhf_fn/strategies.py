"""What laws draw from: small, ragged, readable inputs, each a dict of tensors by name.

Numbers are eighths, so that they print short and add up without rounding; rows are [rows ≤ 3,
time ≤ 4]. A tensor is one draw, a byte for an entry, which shrinks to the first of its choices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

Tensors = st.SearchStrategy[Tensor]
Strategy = st.SearchStrategy[dict[str, Any]]

EIGHTHS = sorted(
    (n / 8 for n in range(-16, 17)), key=lambda x: (x % 1 > 0, x % 0.5 > 0, abs(x), -x)
)
LOGPROBS = [-n / 8 for n in range(1, 25)]
REWARDS = [0.0, 1.0, 0.5, 0.25, -1.0, 2.0]


def tensor(
    *shape: int, among: Sequence[int | float] = EIGHTHS, dtype: torch.dtype = torch.float32
) -> Tensors:
    """A tensor of one shape, each entry among these.

    An entry has its own byte, whatever the shape: a smaller one is a corner of a larger one.
    """
    base = max(5, *shape)
    strides = [base**axis for axis in reversed(range(len(shape)))]
    size = max(64, 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)))

    def corner(drawn: bytes) -> Tensor:
        entries = torch.tensor([among[b % len(among)] for b in drawn], dtype=dtype)
        return entries.as_strided(shape, strides).clone()

    return st.binary(min_size=size, max_size=size).map(corner)


def shapes(*most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """A shape with at least 1 and at most so many entries along each axis."""
    return st.tuples(*(st.integers(1, size) for size in most))


def padded(rows: int, time: int, *, least: int = 1) -> Tensors:
    """A mask of answers padded on the right: every row keeps its first n ≥ `least` tokens."""
    lengths = tensor(rows, 1, among=range(least, time + 1), dtype=torch.long)
    return lengths.map(lambda length: torch.arange(time) < length)


def ragged(rows: int, time: int) -> Tensors:
    """A mask with holes anywhere, at either end too; a row that kept nothing keeps its first."""
    holes = tensor(rows, time, among=[True, False], dtype=torch.bool)
    return holes.map(lambda mask: mask | (~mask.any(-1, keepdim=True) & (torch.arange(time) == 0)))


def named(**strategies: st.SearchStrategy[Any]) -> Strategy:
    """A dict of what each strategy draws, in this order."""
    drawn = st.fixed_dictionaries(strategies)
    return drawn.map(lambda case: {name: case[name] for name in strategies})


def logits(*, vocab: int = 5, among: Sequence[int | float] = EIGHTHS) -> Strategy:
    """`logits` [rows, time, vocab] and `tokens` [rows, time], aligned."""
    return shapes(2, 3).flatmap(
        lambda shape: named(
            logits=tensor(*shape, vocab, among=among),
            tokens=tensor(*shape, among=range(vocab), dtype=torch.long),
        )
    )


def trajectories(*names: str, mask: Any = padded, **extra: st.SearchStrategy[Any]) -> Strategy:
    """Tensors [rows, time] of these names, `mask`, and whatever is drawn besides."""
    return shapes(3, 4).flatmap(
        lambda shape: named(**{n: tensor(*shape) for n in names}, mask=mask(*shape), **extra)
    )


def policies(**extra: st.SearchStrategy[Any]) -> Strategy:
    """`logprobs`, `old_logprobs`, `advantages` (the same at all tokens of a row) and `mask`."""
    return shapes(3, 4).flatmap(
        lambda shape: named(
            logprobs=tensor(*shape, among=LOGPROBS),
            old_logprobs=tensor(*shape, among=LOGPROBS),
            advantages=tensor(shape[0], 1).map(lambda a: a.expand(shape).clone()),
            mask=ragged(*shape),
            **extra,
        )
    )


def scored(**extra: st.SearchStrategy[Any]) -> Strategy:
    """`score` [rows], `logprobs`, `ref_logprobs` and `mask`."""
    return shapes(3, 4).flatmap(
        lambda shape: named(
            score=tensor(shape[0], among=REWARDS),
            logprobs=tensor(*shape, among=LOGPROBS),
            ref_logprobs=tensor(*shape, among=LOGPROBS),
            mask=padded(*shape),
            **extra,
        )
    )


def spread() -> Strategy:
    """`x` and `mask`, with two kept values that differ by half or more."""
    return shapes(3, 3).flatmap(
        lambda shape: named(
            x=tensor(shape[0], shape[1] + 1).map(_spread),
            mask=padded(*shape).map(lambda mask: pad(mask, (1, 0), value=True)),
        )
    )


def _spread(x: Tensor) -> Tensor:
    x[0, 1] = x[0, 0] + 0.5 + x[0, 1].abs()
    return x


def micro_batches() -> Strategy:
    """`x`, `mask` with rows that keep nothing, though not all, and a row to `cut` them at."""
    return shapes(3, 3).flatmap(
        lambda shape: named(
            x=tensor(shape[0] + 1, shape[1]),
            mask=padded(shape[0] + 1, shape[1], least=0).map(_last_kept),
            cut=st.integers(1, shape[0]),
        )
    )


def _last_kept(mask: Tensor) -> Tensor:
    mask[-1, 0] = True
    return mask


def groups(*, among: Sequence[int | float] = REWARDS, **extra: st.SearchStrategy[Any]) -> Strategy:
    """`rewards` [prompts, group], two samples or more to a group."""
    shape = st.tuples(st.integers(1, 3), st.integers(2, 5))
    return shape.flatmap(lambda shape: named(rewards=tensor(*shape, among=among), **extra))


def pairs(
    *names: str, among: Sequence[int | float] = EIGHTHS, **extra: st.SearchStrategy[Any]
) -> Strategy:
    """Tensors [pairs] of these names: scores, or log-probs of whole answers."""
    return st.integers(1, 3).flatmap(
        lambda rows: named(**{n: tensor(rows, among=among) for n in names}, **extra)
    )


def distributions(*, vocab: int = 4) -> Strategy:
    """`logits` and `ref_logits` [1, vocab] of two policies over a vocabulary to enumerate."""
    return named(logits=tensor(1, vocab), ref_logits=tensor(1, vocab))
