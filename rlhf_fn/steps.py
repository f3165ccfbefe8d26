"""A step is a loss and an optimizer: `gradient_step(loss, optimizer)(state, batch, key) -> (state, metrics)`.

The losses and their batches live in `losses.py` and are re-exported here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import grad_and_value

from rlhf_fn import tree
from rlhf_fn.losses import (
    ActorCriticBatch,
    DpoBatch,
    Loss,
    Metrics,
    PairBatch,
    Params,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    actor_critic_loss,
    next_token_logprobs,
    policy_loss,
    preference_loss,
    reward_loss,
    sequence_logprobs,
    sft_loss,
    value_loss,
)
from rlhf_fn.optim import Transform
from rlhf_fn.random import fold_in

__all__ = [
    "ActorCriticBatch", "DpoBatch", "Gradient", "Loss", "Metrics", "PairBatch", "Params", "PolicyBatch",
    "SftBatch", "Step", "TrainState", "ValueBatch", "actor_critic_loss", "autograd_gradient",
    "functional_gradient", "gradient_step", "next_token_logprobs", "policy_loss", "preference_loss",
    "reward_loss", "sequence_logprobs", "sft_loss", "train_state", "value_loss",
]  # fmt: skip


class TrainState(NamedTuple):
    """What a step carries: the parameters, what the optimizer remembers, how many steps were taken."""

    params: Params
    opt_state: Any
    step: Int[Tensor, ""]


Step = Callable[[TrainState, Any, Tensor], tuple[TrainState, Metrics]]
Gradient = Callable[[Loss], Callable[[Params, Any, Tensor], tuple[Params, tuple[Tensor, Metrics]]]]


def train_state(params: Params, optimizer: Transform) -> TrainState:
    """The state before the first step."""
    device = next(iter(params.values())).device
    return TrainState(params, optimizer.init(params), torch.zeros((), dtype=torch.int64, device=device))


def functional_gradient(loss: Loss) -> Callable:
    """(∂loss/∂params, (loss, metrics)) by `torch.func`: for steps that are vmapped, nested or compiled whole."""
    return grad_and_value(loss, has_aux=True)


def autograd_gradient(loss: Loss) -> Callable:
    """The same numbers by `torch.autograd.grad`: for checkpointed activations and sharded parameters.

    Neither of those works under `torch.func`. Compile the loss inside, not the step around.
    """

    def gradient(params: Params, batch: Any, key: Tensor) -> tuple[Params, tuple[Tensor, Metrics]]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            total, metrics = loss(leaves, batch, key)
        grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads)), (total.detach(), metrics)

    return gradient


def gradient_step(
    loss: Loss,
    optimizer: Transform,
    *,
    microbatches: int = 1,
    gradient: Gradient = functional_gradient,
) -> Step:
    """Turn `loss(params, batch, key) -> (scalar, metrics)` into one update of the parameters.

        g = Σᵢ ∇ loss(θ, batchᵢ, keyᵢ),   u, s' = optimizer(g, s, θ),   θ' = θ + u

    The step is pure: it writes to none of its arguments. The batch is cut along its first axis into at most
    `microbatches` parts, which changes the memory needed and not the result, because a loss is a weighted sum
    and sums add: the weights in the batch were normalised once, over the whole of it. Part i is given
    `fold_in(key, i)`; a loss that draws random numbers carries one key per row in its batch instead.

    Metrics are sums without a graph: those of the loss, and two of the step's own, `grad/norm` = ‖g‖₂ and
    `finite` = 1 if the loss and ‖g‖₂ are finite, else 0. The update is made either way: a driver that finds
    `finite` lower than the number of steps keeps the old state, which is intact, and says so.

    Raises:
        ValueError: microbatches < 1, a batch without rows, or fields with different numbers of rows.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    gradients = gradient(loss)

    def step(state: TrainState, batch: Any, key: Tensor) -> tuple[TrainState, Metrics]:
        parts = _cut(batch, microbatches)
        sums = gradients(state.params, parts[0], fold_in(key, 0))
        for i, part in enumerate(parts[1:], start=1):
            sums = tree.add(sums, gradients(state.params, part, fold_in(key, i)))
        grads, (total, metrics) = sums
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        norm = tree.global_norm(grads)
        finite = total.isfinite() & norm.isfinite()
        metrics = metrics | {"grad/norm": norm, "finite": finite.to(norm.dtype)}
        new = TrainState(tree.add(state.params, updates), opt_state, state.step + 1)
        return new, tree.map(torch.detach, metrics)

    return step


def _cut(batch: Any, parts: int) -> list[Any]:
    rows = {leaf.shape[0] if leaf.ndim else None for leaf in tree.leaves(batch)}
    if len(rows) != 1 or not (count := rows.pop()):
        names = getattr(batch, "_fields", range(len(tree.leaves(batch))))
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(names, tree.leaves(batch)))
        raise ValueError(f"every field of a batch needs the same number of rows, at least 1; got {shapes}")
    size = -(-count // parts)
    return [tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, count, size)]
