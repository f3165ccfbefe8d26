"""Rows that begin alike, whose beginning is read once: the answers to a prompt.

Of G answers of A tokens to a prompt of P a model reads P + G A tokens and not G (P + A), forward
and backward, and has the same log-probs: what comes after attends to the prefix's keys and values.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from rlhf_fn import tree


class Prefixed(NamedTuple):
    """Tokens, or their attention: what the rows of a group begin with, and what comes after it.

    `causal_lm` and `projected_lm` take two of these in the place of `tokens` and `attention` and
    return one row for each of the rest, of 1 + rest positions: the prefix's last, and its own.
    """

    prefix: Shaped[Tensor, "groups prefix"]
    rest: Shaped[Tensor, "groups group rest"]

    @property
    def rows(self) -> Shaped[Tensor, "rows rest"]:
        """What comes after, the groups one after the other."""
        return self.rest.flatten(0, 1)


def shared(batch: Any) -> Any:
    """The batch with `tokens` and `attention` as `Prefixed` where rows agree before what is asked.

    That is where its other fields begin (`batches.asked`). Groups are of rows that follow each
    other, all of one size, the largest there is; in a batch of pairs, of the answers to a prompt. A
    batch of other rows stays as it is. It looks at the numbers, so not inside of a graph.
    """
    if "weights" not in getattr(batch, "_fields", ()) or "tokens" not in batch._fields:
        return batch
    per_token = batch.mask if "mask" in batch._fields else batch.weights
    both = with_prefix(batch.tokens, batch.attention, per_token.shape[-1])
    return batch._replace(tokens=both[0], attention=both[1])


def is_shared(batch: Any) -> bool:
    """Whether its tokens are `Prefixed`."""
    return isinstance(getattr(batch, "tokens", None), Prefixed)


def with_prefix(
    tokens: Shaped[Tensor, "*batch time"], attention: Shaped[Tensor, "*batch time"], last: int
) -> tuple[Any, Any]:
    """Both as `Prefixed` if rows agree in all but the `last` columns, as in `shared`."""
    first = tokens.shape[-1] - last
    if first < 2 or last < 2 or attention.dtype != torch.bool:
        return tokens, attention
    before = torch.where(attention, tokens + 1, 0)[..., :first]
    group = _group(before) if tokens.ndim == 2 else _of_answers(before)
    if group < 2:
        return tokens, attention
    return _parted(tokens, group, first), _parted(attention, group, first)


def _parted(x: Tensor, group: int, first: int) -> Prefixed:
    rows = x.reshape(-1, group, x.shape[-1])
    return Prefixed(tree.own(rows[:, 0, :first]), tree.own(rows[..., first:]))


def joined(x: Prefixed | Tensor) -> Tensor:
    """The rows as they are: each with what it begins with."""
    if isinstance(x, Prefixed):
        return torch.cat([each_of(x.prefix, x.rest.shape[1]), x.rows], -1)
    return x


def each_of(x: Shaped[Tensor, "groups *rest"], group: int) -> Shaped[Tensor, "rows *rest"]:
    """Every row as many times as a group has rows."""
    return x[:, None].expand(-1, group, *x.shape[1:]).flatten(0, 1)


def _group(rows: Tensor) -> int:
    """The largest number of rows that is all alike, of the first so many, of the next, …"""
    starts = (rows[1:] != rows[:-1]).any(-1).nonzero()[:, 0] + 1
    return gcd(len(rows), *starts.tolist())


def _of_answers(rows: Tensor) -> int:
    return rows.shape[1] if bool((rows == rows[:, :1]).all()) else 1
