"""Short rows in the room of a long one: packing, with nothing seen across.

    loss(params, pack(batch, length=2048), key)     # = loss(params, batch, key), with less padding

`attention` of what comes out holds segments: 0 is padding, and 1, 2, … are the rows that share a
row. Every `apply` of `models.py` reads it. What must not is a function of whole rows, to which a
packed one is one answer: a pooled reward; a surrogate of answers, with which `policy_loss` raises.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.skeletons import positions

Batch = TypeVar("Batch", bound=Any)
_WEIGHTS = ("weights", "imitation")  # the fields of batches that weigh what is predicted


def pack(batch: Batch, *, length: int) -> Batch:
    """The rows of an `SftBatch`, a `PolicyBatch` or their like, packed into rows of `length`.

    Every field moves with its tokens, so a sum of weights · log-probs is the same sum. The rows go
    first-fit-decreasing, longest first, each to the first packed row with room: at most
    11/9 of the fewest rows possible and 6/9 more (Dósa 2007,
    https://doi.org/10.1007/978-3-540-74450-4_1).

    Raises:
        TypeError: `attention` is not bool: it is packed already.
        ValueError: a row has more than `length` tokens; a field is not per token; a token that
            follows none, as the first of a row, has a weight: packed it would follow a stranger.
    """
    checks.same_shape(**batch._asdict())
    checks.bool_mask(batch.attention, name="attention")
    checks.count(least=1, length=length)
    attention = batch.attention
    for name, weights in batch._asdict().items():
        if name in _WEIGHTS:
            _only_on_predicted(name, weights, attention)
    places = first_fit_decreasing(attention.sum(-1).tolist(), length)
    rows = max((row for row, _, _ in places), default=-1) + 1
    table = torch.tensor(places, dtype=torch.int64, device=attention.device)
    row, start, segment = table.reshape(-1, 3, 1).unbind(1)
    to = (row * length + start + positions(attention))[attention]

    def moved(x: Tensor) -> Tensor:
        return x.new_zeros(rows * length).scatter(0, to, x[attention]).view(rows, length)

    return tree.map(moved, batch._replace(attention=segment.expand(attention.shape)))


def first_fit_decreasing(lengths: list[int], room: int) -> list[tuple[int, int, int]]:
    """Of each length where it goes: (row, start in it, its number among those in it, from 1).

    Raises:
        ValueError: a length is above `room`.
    """
    filled: list[int] = []
    counts: list[int] = []
    places = [(0, 0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            raise ValueError(
                f"length is {room}, but row {i} has {lengths[i]} tokens; cut or drop it"
            )
        fits = (row for row, used in enumerate(filled) if used + lengths[i] <= room)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
            counts.append(0)
        counts[row] += 1
        places[i] = row, filled[row], counts[row]
        filled[row] += lengths[i]
    return places


def _only_on_predicted(name: str, weights: Tensor, attention: Bool[Tensor, "batch time"]) -> None:
    """Raise a `ValueError` unless `weights` are 0 where there is no token, or none right before."""
    follows = attention & F.pad(attention, (1, 0))[:, :-1]
    wrong = (weights != 0) & ~follows
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(where)} is {float(weights[where])}, but no token of its row is right "
            "before it to predict it; expected 0 there, and on padding"
        )
