"""`sampling.py` in plain torch: the path on a CPU, a few rows at a time, so that they stay cached.

Inversion in two steps, float64 sums of blocks and then one block, needs no cumulative sum of the
vocabulary. Nor is it sorted: the k-th largest maximum of a block is at most the k-th largest logit,
and parts the few that top-k chooses from; for top-p tokens are weighed in buckets of their distance
to the maximum, and the one that the support ends in is sorted.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.cpu import CACHED
from rlhf_kernels.formulas import capped
from rlhf_kernels.threefry import units

BLOCK = 256
BUCKETS = 4096


def sample(
    x: Tensor, keys: Tensor, scale: Tensor | None, cap: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """(tokens, log p) of `rlhf_kernels.sample`."""
    u = units(keys.reshape(-1, 2))[:, None]

    def some(z: Tensor, rows: slice, t: Tensor | None) -> tuple[Tensor, Tensor]:
        ids = None
        if top_k and top_k < z.shape[-1]:
            z, ids = _largest(z, top_k)
        d = _tempered(z - z.amax(-1, keepdim=True), t)
        e = d.exp()
        if top_p < 1:
            e = _shortest(z, d, e, top_p)
        place, total = _invert(e, u[rows])
        logp = d.gather(-1, place) - total.log()
        return place if ids is None else ids.gather(-1, place), logp

    return _by_rows(some, x, scale, cap)


def greedy(x: Tensor, scale: Tensor | None, cap: float) -> tuple[Tensor, Tensor]:
    """(tokens, log p) of `rlhf_kernels.greedy`."""

    def some(z: Tensor, rows: slice, t: Tensor | None) -> tuple[Tensor, Tensor]:
        block = _maxima(z, BLOCK).argmax(-1, keepdim=True)
        v, w = _block(z, block, -torch.inf)
        top, lane = w.max(-1, keepdim=True)
        token = v.gather(-1, lane)
        e = _tempered(z - top, t).exp_().scatter_(-1, token, 0.0)
        return token, 0 - e.sum(-1, keepdim=True).log1p()  # precise where p → 1 too

    return _by_rows(some, x, scale, cap)


def _by_rows(function: Callable, x: Tensor, scale: Tensor | None, cap: float):
    """(tokens, log p) of rows; 0 and NaN for those that have no distribution."""
    batch, vocab = x.shape[:-1], x.shape[-1]
    x, t = x.reshape(-1, vocab), None if scale is None else scale.reshape(-1, 1)
    tokens = x.new_empty(len(x), 1, dtype=torch.int64)
    logp = x.new_empty(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))
    size = max(1, CACHED // vocab)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        z = capped(x[rows], cap)
        lost = ~z.amax(-1, keepdim=True).isfinite()
        if lost.any():
            z = torch.where(lost, 0.0, z)
        tokens[rows], logp[rows] = function(z, rows, t if t is None else t[rows])
        tokens[rows].masked_fill_(lost, 0)
        logp[rows].masked_fill_(lost, torch.nan)
    return tokens.view(batch), logp.view(batch)


def _tempered(d: Tensor, t: Tensor | None) -> Tensor:
    return d if t is None else d.mul_(t)


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their ids, in the order of the vocabulary; others are −∞."""
    size = z.shape[-1] // (2 * k)
    parted = _maxima(z, min(max(size, 1), 64)).topk(k, sorted=False).values
    row, v, place, width = _ragged(z >= parted.amin(-1, keepdim=True))
    ids = torch.zeros(len(z), width, dtype=torch.int64)
    ids[row, place] = v
    few = z.new_full((len(z), width), -torch.inf)
    few[row, place] = z[row, v]
    cut = few.topk(k, sorted=False).values.amin(-1, keepdim=True)
    at, above = few == cut, few > cut
    keep = above | (at & (at.cumsum(-1) + above.sum(-1, keepdim=True) <= k))
    return torch.where(keep, few, -torch.inf), ids


def _shortest(z: Tensor, d: Tensor, e: Tensor, p: float) -> Tensor:
    """e, with 0 for tokens that have p Σ e or more before them, by descending z and then by index.

    d = (z − max z)/τ.
    """
    buckets = BUCKETS if z.shape[-1] > BUCKETS else 1
    bucket = _bucket(d).clamp_(max=buckets - 1)
    rows = torch.arange(len(z), dtype=torch.int32)[:, None]
    flat = (bucket + rows * buckets).flatten()
    held = torch.bincount(flat, e.double().flatten(), len(z) * buckets)
    upto = F.pad(held.view(-1, buckets).cumsum(-1), (1, 0))
    goal = p * upto[:, -1:]
    edge = (upto[:, 1:] < goal).sum(-1, keepdim=True).clamp_(max=buckets - 1)
    inner = edge.int()
    row, v, place, width = _ragged(bucket == inner)
    window = z.new_full((len(z), width), -torch.inf)
    window[row, place] = z[row, v]
    order = window.sort(dim=-1, descending=True, stable=True).indices
    weight = torch.zeros_like(window, dtype=torch.float64)
    weight[row, place] = e[row, v].double()
    weight = weight.gather(-1, order)
    likelier = upto.gather(-1, edge) + (weight.cumsum(-1) - weight) < goal
    keep = torch.empty_like(likelier).scatter_(-1, order, likelier)[row, place]
    shorter = torch.where(bucket < inner, e, 0.0)
    shorter[row, v] = torch.where(keep, e[row, v], 0.0)
    return shorter


def _bucket(d: Tensor) -> Tensor:
    """256 buckets to each octave of ½ − d: 1/512 at the maximum, 1/32 eight nats below it."""
    bits = (0.5 - d).float().view(torch.int32) >> 15
    return bits.sub_(0x3F000000 >> 15)


def _ragged(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(row, column, place among the row's) of each that is True, and the most that a row has."""
    flat = torch.from_numpy(np.flatnonzero(chosen.numpy()))  # torch's takes ten times as long
    row, v = flat // chosen.shape[-1], flat % chosen.shape[-1]
    count = torch.bincount(row, minlength=len(chosen))
    return row, v, torch.arange(len(row)) - (count.cumsum(0) - count)[row], int(count.max())


def _maxima(z: Tensor, size: int) -> Tensor:
    """The maximum of each block of `size`, the last one ragged."""
    whole = z.shape[-1] // size * size
    blocks, rest = z[:, :whole].unflatten(-1, (-1, size)).amax(-1), z[:, whole:]
    return torch.cat([blocks, rest.amax(-1, keepdim=True)], -1) if rest.numel() else blocks


def _block(z: Tensor, block: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """(ids, values) of one block of each row; `fill` beyond the vocabulary."""
    v, size = block * BLOCK + torch.arange(BLOCK), z.shape[-1]
    return v, torch.where(v < size, z.gather(-1, v.clamp(max=size - 1)), fill)


def _invert(e: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(the first token with Σ_{v≤token} e_v > u Σ e, Σ e), [rows, 1] each."""
    whole = e.shape[-1] // BLOCK * BLOCK
    blocks = e[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    tail = e[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    upto = F.pad(torch.cat([blocks, tail], -1).cumsum(-1), (1, 0))
    total = upto[:, -1:]
    goal = u * total
    block = (upto[:, 1:] <= goal).sum(-1, keepdim=True)
    v, w = _block(e, block, 0.0)
    first = (upto.gather(-1, block) + w.double().cumsum(-1) <= goal).sum(-1, keepdim=True)
    # rounding may leave the sum of the block at the goal: then its last possible token
    last = ((w > 0) * torch.arange(BLOCK)).amax(-1, keepdim=True)
    return v[:, :1] + torch.minimum(first, last), total
