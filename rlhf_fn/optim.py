"""Optimizers as pairs of pure functions, after optax: `params + updates` are the new parameters.

`lr` is a number, a 0-d tensor (to vmap or differentiate), or a schedule: a function from the
number of updates made before this one to the learning rate. Except for clipping, every leaf is
updated on its own, so a driver may go leaf by leaf and reuse buffers; the result is the same bits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.tree import Tree

Schedule = Callable[[Int[Tensor, ""]], Float[Tensor, ""]]


class Transform(NamedTuple):
    """init(params) -> state, and update(grads, state, params) -> (updates, state)."""

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]


class AdamState(NamedTuple):
    count: Int[Tensor, ""]  # updates made so far
    mu: Tree  # mean of g, float32 or wider
    nu: Tree  # mean of g²


class SgdState(NamedTuple):
    count: Int[Tensor, ""]
    velocity: Tree


def adamw(
    lr: float | Tensor | Schedule,
    *,
    b1: float | Tensor,
    b2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
) -> Transform:
    """Adam with decoupled weight decay, as torch.optim.AdamW.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,
    Δθ = −lr (m̂ / (√v̂ + ε) + λ θ),  m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)

    The moments of half-precision parameters are float32. Updates have the dtype of the parameters.

    Raises:
        ValueError: `lr` or `weight_decay` is negative or not finite, b1 or b2 is outside of
            [0, 1), or eps is not positive.

    Loshchilov & Hutter 2019, algorithm 2: https://arxiv.org/abs/1711.05101
    """
    _check_lr(lr)
    checks.below_one(b1=b1, b2=b2)
    checks.positive(eps=eps)
    checks.non_negative(weight_decay=weight_decay)

    def init(params: Tree) -> AdamState:
        return AdamState(_zero_count(params), _moments(params), _moments(params))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        rate, count = _rate(lr, state.count), state.count + 1
        mean = 1 - b1 ** count.double()  # in float32, 1 − β₂ᵗ would lose half of its digits
        square = 1 - b2 ** count.double()

        def leaf(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
            s, c1, c2 = (tree.cast(x, m) for x in (rate, mean, square))
            denominator = _root(v) * (c1 / c2**0.5) + c1 * eps  # c₁ (√v̂ + ε): fewer passes
            direction = m / denominator + weight_decay * p.to(m.dtype)
            return (-s * direction).to(p.dtype)

        mu = tree.map(lambda m, g: _average(m, g.to(m.dtype), b1), state.mu, grads)
        nu = tree.map(lambda v, g: _average(v, g.to(v.dtype) ** 2, b2), state.nu, grads)
        return tree.map(leaf, mu, nu, params), AdamState(count, mu, nu)

    return Transform(init, update)


def sgd(lr: float | Tensor | Schedule, *, momentum: float | Tensor = 0.0) -> Transform:
    """Gradient descent: u ← momentum · u + g, Δθ = −lr u, as torch.optim.SGD.

    Raises:
        ValueError: `lr` is negative or not finite, or `momentum` is outside of [0, 1).
    """
    _check_lr(lr)
    checks.below_one(momentum=momentum)

    def init(params: Tree) -> SgdState:
        return SgdState(_zero_count(params), _moments(params))

    def update(grads: Tree, state: SgdState, params: Tree) -> tuple[Tree, SgdState]:
        rate = _rate(lr, state.count)
        velocity = tree.map(lambda u, g: momentum * u + g.to(u.dtype), state.velocity, grads)
        updates = tree.map(lambda u, p: (-tree.cast(rate, u) * u).to(p.dtype), velocity, params)
        return updates, SgdState(state.count + 1, velocity)

    return Transform(init, update)


def clip_by_global_norm(max_norm: float | Tensor) -> Transform:
    """g · min(1, max_norm / (‖g‖ + 10⁻⁶)), over all leaves, as torch's clip_grad_norm_.

    Raises:
        ValueError: `max_norm` is not positive and finite.
    """
    checks.positive(max_norm=max_norm)

    def update(grads: Tree, state: tuple[()], params: Tree) -> tuple[Tree, tuple[()]]:
        del params
        factor = (max_norm / (tree.global_norm(grads) + 1e-6)).clamp(max=1.0)
        return tree.scale(grads, factor), state

    return Transform(lambda params: (), update)


def chain(*transforms: Transform) -> Transform:
    """Transforms in sequence, each fed the updates of the one before; the states are a tuple."""

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Tree, state: tuple[Any, ...], params: Tree) -> tuple[Tree, tuple[Any, ...]]:
        states = []
        for transform, before in zip(transforms, state, strict=True):
            grads, after = transform.update(grads, before, params)
            states.append(after)
        return grads, tuple(states)

    return Transform(init, update)


def linear_schedule(
    peak: float | Tensor, *, steps: int, warmup: int = 0, end: float | Tensor = 0.0
) -> Schedule:
    """0 → peak over `warmup` updates, then a straight line to `end` at `steps`, then `end`.

    With warm-up the first update has learning rate 0, as in transformers and optax.

    Raises:
        TypeError: `steps` or `warmup` is not an int.
        ValueError: `peak` or `end` is negative or not finite, or `steps` ≤ `warmup`.
    """
    return _decay(lambda p: 1 - p, peak, end, steps, warmup)


def cosine_schedule(
    peak: float | Tensor, *, steps: int, warmup: int = 0, end: float | Tensor = 0.0
) -> Schedule:
    """0 → peak over `warmup` updates, then half a cosine down to `end` at `steps`, then `end`.

    With warm-up the first update has learning rate 0, as in transformers and optax.

    Raises:
        TypeError: `steps` or `warmup` is not an int.
        ValueError: `peak` or `end` is negative or not finite, or `steps` ≤ `warmup`.

    Loshchilov & Hutter 2017, eq. 5: https://arxiv.org/abs/1608.03983
    """
    return _decay(lambda p: 0.5 * (1 + torch.cos(math.pi * p)), peak, end, steps, warmup)


def _decay(
    shape: Callable[[Tensor], Tensor],
    peak: float | Tensor,
    end: float | Tensor,
    steps: int,
    warmup: int,
) -> Schedule:
    checks.non_negative(peak=peak, end=end)
    checks.count(least=0, warmup=warmup)
    checks.count(least=warmup + 1, steps=steps)

    def schedule(step: Int[Tensor, ""]) -> Float[Tensor, ""]:
        now = torch.as_tensor(step).double()
        rising = peak * now / max(warmup, 1)
        falling = shape(((now - warmup) / (steps - warmup)).clamp(0.0, 1.0))
        return torch.where(now < warmup, rising, end + (peak - end) * falling)

    return schedule


def _check_lr(lr: float | Tensor | Schedule) -> None:
    if not callable(lr):
        checks.non_negative(lr=lr)


def _rate(lr: float | Tensor | Schedule, count: Tensor) -> float | Tensor:
    return lr(count) if callable(lr) else lr


def _zero_count(params: Tree) -> Tensor:
    found = tree.leaves(params)
    if not found:
        raise ValueError("params has no leaves: there is nothing to optimize")
    return torch.zeros((), dtype=torch.int64, device=found[0].device)


def _moments(params: Tree) -> Tree:
    return tree.map(lambda p: torch.zeros_like(p, dtype=tree.wide(p)), params)


def _average(old: Tensor, new: Tensor, b: float | Tensor) -> Tensor:
    """b · old + (1 − b) · new."""
    return torch.lerp(old, new, tree.cast(1 - b, old))


def _root(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0, where a gradient of 0 meets it: one can differentiate a step."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
