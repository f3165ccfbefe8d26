"""The scans in plain torch: what forward mode falls back on, and the path on a CPU.

There a row is cut into strips, and all strips of some rows are walked at once, one step at a time:
a step is a few operations on vectors that stay in the cache. What is left is a scan over the ends.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 32  # steps
FEW = 2**14  # elements; below this the passes of `doubling` take less time than the steps
CACHED = 2**17  # elements of the rows that are walked together

# yₜ = xₜ + aₜ y of the next step, which is t + 1 or, for a prefix, t − 1


def doubling(x: Tensor, a: Tensor, *, prefix: bool) -> Tensor:
    """In ⌈log₂ time⌉ passes that any transform can follow."""
    stride = 1
    while stride < x.shape[-1]:
        x = x + a * _moved(x, stride, prefix)
        a = a * _moved(a, stride, prefix)
        stride *= 2
    return x


def strips(x: Tensor, a: Tensor, *, prefix: bool) -> Tensor:
    """In three passes, of rows `[some, time]`."""
    if x.numel() < FEW:
        return doubling(x, a, prefix=prefix)
    number, time = x.shape
    padded = (F.pad(each, (0, -time % STRIP)) for each in (x, a))
    x, a = (each.reshape(-1, STRIP).t().contiguous() for each in padded)  # [STRIP, strips]
    xs, decays = x.unbind()[:: 1 if prefix else -1], a.unbind()[:: 1 if prefix else -1]
    for i in range(1, STRIP):
        xs[i].addcmul_(decays[i], xs[i - 1])
        decays[i].mul_(decays[i - 1])
    ends = doubling(xs[-1].view(number, -1), decays[-1].view(number, -1), prefix=prefix)
    x.addcmul_(a, _moved(ends, 1, prefix).reshape(-1))
    return x.t().reshape(number, -1)[:, :time]


def _moved(x: Tensor, by: int, prefix: bool) -> Tensor:
    """x of `by` steps on, and 0 past the end."""
    return F.pad(x[..., :-by], (by, 0)) if prefix else F.pad(x[..., by:], (0, by))


def in_float32(function: Callable) -> Callable:
    """`function` of float32 or wider, in and out of the dtype of its first argument."""

    def run(*args: Tensor | float | None, **how: Callable) -> Any:
        dtype = args[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        floats = (isinstance(x, Tensor) and x.is_floating_point() for x in args)
        out = function(*(x.to(wide) if yes else x for x, yes in zip(args, floats)), **how)
        return tuple(x.to(dtype) for x in out) if isinstance(out, tuple) else out.to(dtype)

    return run


# suffix and prefix scan


@in_float32
def suffix_scan(x: Tensor, a: Tensor) -> Tensor:
    """yₜ = xₜ + aₜ yₜ₊₁."""
    return doubling(x, a, prefix=False)


@in_float32
def prefix_scan(x: Tensor, a: Tensor) -> Tensor:
    """Its transpose, zₜ = xₜ + aₜ₋₁ zₜ₋₁."""
    return doubling(x, _moved(a, 1, True), prefix=True)


def suffix_forward(x: Tensor, a: Tensor) -> Tensor:
    """`suffix_scan`, on a CPU."""
    return _by_rows(in_float32(lambda x, a: (strips(x, a, prefix=False),)), x, a)[0]


def prefix_forward(x: Tensor, a: Tensor) -> Tensor:
    """`prefix_scan`, on a CPU."""
    scan = in_float32(lambda x, a: (strips(x, _moved(a, 1, True), prefix=True),))
    return _by_rows(scan, x, a)[0]


# a backup and its gradient: the formulas, and the path on a CPU


def where(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True, else 0, for any transform."""
    return torch.where(mask, x, 0.0)


def bits(x: Tensor, mask: Tensor) -> Tensor:
    """`where`, in less time on a CPU: x's bits and those of the mask."""
    integers = torch.int64 if x.dtype == torch.float64 else torch.int32
    return (x.view(integers) & -mask.to(integers)).view(x.dtype)


@in_float32
def backup(
    rewards: Tensor, values: Tensor | None, mask: Tensor, bootstrap: Tensor | None,
    discounts: Tensor | None, decays: Tensor | None, discount: float, decay: float,
    scan: Callable = doubling, kept: Callable = where,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(A, R) of `backups.py`; A has no time where there are no values."""
    gamma, decay = _rates(discounts, decays, discount, decay, rewards)
    rewards = kept(rewards, mask)
    state = decay * rewards
    if values is not None:
        values = kept(values, mask)
        state = state + (gamma - decay) * values
    past = torch.zeros_like(gamma) if bootstrap is None else gamma * bootstrap[..., None]
    past = past.expand(*mask.shape[:-1], min(mask.shape[-1], 1))
    through = _through(decay, mask, kept)
    last = state[..., -1:] + through[..., -1:] * past
    state = scan(torch.cat([state[..., :-1], last], -1), through, prefix=False)
    out = kept(rewards + torch.cat([state[..., 1:], past], -1), mask)
    return out[..., :0] if values is None else out - values, out


@in_float32
def backup_gradient(
    g_returns: Tensor, g_advantages: Tensor | None, mask: Tensor, discounts: Tensor | None,
    decays: Tensor | None, discount: float, decay: float,
    scan: Callable = doubling, kept: Callable = where,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of (A, R) in rewards, values and bootstrap."""
    gamma, decay = _rates(discounts, decays, discount, decay, g_returns)
    g = kept(g_returns, mask)
    if g_advantages is not None:
        g_advantages = kept(g_advantages, mask)
        g = g + g_advantages
    state = scan(g, _through(decay, mask, kept), prefix=True)
    d_rewards, d_bootstrap = kept(state, mask), (gamma * state[..., -1:]).sum(-1)
    if g_advantages is None:
        return d_rewards, d_rewards[..., :0], d_bootstrap
    d_values = kept((gamma - decay) * _moved(state, 1, True), mask) - g_advantages
    return d_rewards, d_values, d_bootstrap


def _rates(
    discounts: Tensor | None, decays: Tensor | None, discount: float, decay: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """γ and γλ, `[*batch, 1]` or `[1]`."""
    if discounts is None or decays is None:
        return like.new_full((1,), discount), like.new_full((1,), decay)
    return discounts[..., None], decays[..., None]


def _through(decay: Tensor, mask: Tensor, kept: Callable) -> Tensor:
    """How much of what comes after a step passes it by: γλ, or all if it is hidden."""
    return kept(decay, mask) + (~mask).to(decay.dtype)


def backup_forward(*args: Tensor | float | None) -> tuple[Tensor, ...]:
    """`backup`, on a CPU."""
    return _by_rows(partial(backup, scan=strips, kept=bits), *args)


def backup_backward(*args: Tensor | float | None) -> tuple[Tensor, ...]:
    """`backup_gradient`, on a CPU."""
    return _by_rows(partial(backup_gradient, scan=strips, kept=bits), *args)


def _by_rows(function: Callable, *args: Tensor | float | None) -> tuple[Tensor, ...]:
    """`function` of some rows at a time."""
    batch, size = args[0].shape[:-1], max(CACHED // max(args[0].shape[-1], 1), 1)

    def parts(x: Tensor | float | None) -> Iterable:
        if not isinstance(x, Tensor):
            return repeat(x)
        return x.reshape(batch.numel(), *x.shape[len(batch) :]).split(size)

    outputs = zip(*(function(*part) for part in zip(*map(parts, args))))
    return tuple(torch.cat(each).view(batch + each[0].shape[1:]) for each in outputs)
