"""`sampling.py` in plain torch: the path on a CPU, a few rows at a time, so that they stay cached.

Inversion in two steps, float64 sums of blocks and then one block, needs no cumulative sum of the
vocabulary. Top-k and top-p need no sort of it: tokens are counted, or weighed, in buckets of their
distance to the maximum, and only the bucket that the support ends in is sorted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.cpu import CACHED, capped
from rlhf_kernels.threefry import units

BLOCK = 256
BUCKETS = 4096


def sample(
    x: Tensor, keys: Tensor, scale: Tensor | None, cap: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """(tokens, log p) of `rlhf_kernels.sample`."""
    u = units(keys.reshape(-1, 2))

    def some(z: Tensor, rows: slice, t: Tensor | None) -> tuple[Tensor, Tensor]:
        d = _tempered(z - z.amax(-1, keepdim=True), t)
        e = d.exp()
        if top_k and top_k < z.shape[-1]:
            # products, as NaN must stay
            e *= _shortest(z, d, None, torch.full((), top_k, dtype=torch.float64))
        if top_p < 1:
            e *= _shortest(z, d, e, top_p * e.sum(-1, keepdim=True, dtype=torch.float64))
        token, total = _invert(e, u[rows])
        return token[:, 0], (d.gather(-1, token) - total.log())[:, 0]

    return _by_rows(some, x, scale, cap)


def greedy(x: Tensor, scale: Tensor | None, cap: float) -> tuple[Tensor, Tensor]:
    """(tokens, log p) of `rlhf_kernels.greedy`."""

    def some(z: Tensor, rows: slice, t: Tensor | None) -> tuple[Tensor, Tensor]:
        top, token = z.max(-1, keepdim=True)
        total = _tempered(z - top, t).exp_().sum(-1, dtype=torch.float64)
        return torch.where(total.isnan(), 0, token[:, 0]), 0 - total.log()

    return _by_rows(some, x, scale, cap)


def _by_rows(function: Callable, x: Tensor, scale: Tensor | None, cap: float):
    batch, vocab = x.shape[:-1], x.shape[-1]
    x, t = x.reshape(-1, vocab), None if scale is None else scale.reshape(-1, 1)
    tokens = x.new_empty(len(x), dtype=torch.int64)
    logp = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    size = max(1, CACHED // vocab)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        tokens[rows], logp[rows] = function(capped(x[rows], cap), rows, t if t is None else t[rows])
    return tokens.view(batch), logp.view(batch)


def _tempered(d: Tensor, t: Tensor | None) -> Tensor:
    return d if t is None else d.mul_(t)


def _shortest(z: Tensor, d: Tensor, weights: Tensor | None, goal: Tensor) -> Tensor:
    """Which tokens have less than the goal before them, by descending z and then by index.

    A token weighs 1 without `weights`. d = (z − max z)/τ.
    """
    rows = torch.arange(len(z))[:, None]
    bucket = _bucket(d)
    held = torch.bincount(
        (bucket + rows * BUCKETS).flatten(),
        None if weights is None else weights.double().flatten(),
        len(z) * BUCKETS,
    )
    upto = F.pad(held.view(-1, BUCKETS).cumsum(-1), (1, 0))
    edge = (upto[:, 1:] < goal).sum(-1, keepdim=True).clamp_(max=BUCKETS - 1)
    keep = bucket < edge
    row, v = (bucket == edge).nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(z))
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    window = z.new_full((len(z), int(count.max())), -torch.inf)
    window[row, place] = z[row, v]
    weight = torch.zeros_like(window, dtype=torch.float64)
    weight[row, place] = 1.0 if weights is None else weights[row, v].double()
    order = window.sort(dim=-1, descending=True, stable=True).indices
    weight = weight.gather(-1, order)
    likelier = upto.gather(-1, edge) + (weight.cumsum(-1) - weight) < goal
    keep[row, v] = torch.empty_like(likelier).scatter_(-1, order, likelier)[row, place]
    return keep


def _bucket(d: Tensor) -> Tensor:
    """256 buckets to each octave of ½ − d: 1/512 at the maximum, 1/32 eight nats below it."""
    bits = (0.5 - d).float().view(torch.int32) >> 15
    return (bits - (0x3F000000 >> 15)).clamp_(0, BUCKETS - 1)


def _invert(e: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(the first token with Σ_{v≤token} e_v > u Σ e, Σ e), [rows, 1] each."""
    size, whole = e.shape[-1], e.shape[-1] // BLOCK * BLOCK
    blocks = e[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    tail = e[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    upto = F.pad(torch.cat([blocks, tail], -1).cumsum(-1), (1, 0))
    total = upto[:, -1:]
    goal = u[:, None] * total
    block = (upto[:, 1:] <= goal).sum(-1, keepdim=True)
    lane = torch.arange(BLOCK)
    v = block * BLOCK + lane
    w = torch.where(v < size, e.gather(-1, v.clamp(max=size - 1)), 0.0).double()
    first = (upto.gather(-1, block) + w.cumsum(-1) <= goal).sum(-1, keepdim=True)
    # rounding may leave the sum of the block at the goal: then its last possible token
    last = ((w > 0) * lane).amax(-1, keepdim=True)
    return block * BLOCK + torch.minimum(first, last), total
