"""A step is a loss and an optimizer: `gradient_step(loss, optimizer)(state, batch, key)`.

The losses and their batches live in `losses.py` and `pair_losses.py`; their names are here too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.func import grad_and_value

from rlhf_fn import checks, tree
from rlhf_fn.batches import asked
from rlhf_fn.fused import InPlace
from rlhf_fn.losses import (
    ActorCriticBatch,
    Loss,
    Metrics,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    actor_critic_loss,
    next_token_logprobs,
    policy_loss,
    sft_loss,
    value_loss,
)
from rlhf_fn.models import Params
from rlhf_fn.optim import Transform
from rlhf_fn.pair_losses import (
    DpoBatch,
    PairBatch,
    preference_loss,
    reward_loss,
)
from rlhf_fn.prefix import shared
from rlhf_fn.random import fold_in

__all__ = [
    "ActorCriticBatch", "DpoBatch", "Gradient", "Loss", "Metrics", "PairBatch", "Params",
    "PolicyBatch", "SftBatch", "Step", "TrainState", "ValueBatch", "actor_critic_loss",
    "autograd_gradient", "averages", "donating_step", "every_update", "functional_gradient",
    "gradient_step", "next_token_logprobs", "of_asked", "of_shared", "on_copies", "policy_loss",
    "preference_loss", "reward_loss", "sft_loss", "train_state", "value_loss",
]  # fmt: skip


class TrainState(NamedTuple):
    """What a step carries on: the parameters, the optimizer's memory, how many steps were taken."""

    params: Params
    opt_state: Any
    step: Int[Tensor, ""]


Step = Callable[[TrainState, Any, Tensor], tuple[TrainState, Metrics]]
Gradient = Callable[[Loss], Callable[[Params, Any, Tensor], tuple[Params, tuple[Tensor, Metrics]]]]


def train_state(params: Params, optimizer: Transform | InPlace) -> TrainState:
    """The state before the first step."""
    step = torch.zeros((), dtype=torch.int64, device=tree.device(params))
    return TrainState(params, optimizer.init(params), step)


def functional_gradient(loss: Loss) -> Callable:
    """∇L, (L, metrics) by `torch.func`: for steps that are vmapped, nested or compiled whole."""
    return grad_and_value(loss, has_aux=True)


def autograd_gradient(loss: Loss) -> Callable:
    """∇L, (L, metrics) by `torch.autograd.grad`: the same numbers.

    For checkpointed activations and sharded parameters, which `torch.func` cannot differentiate.
    Compile the loss that goes in, not the step that comes out.
    """

    def gradient(params: Params, batch: Any, key: Tensor) -> tuple[Params, tuple[Tensor, Metrics]]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            total, metrics = loss(leaves, batch, key)
        grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads)), (total.detach(), tree.stop(metrics))

    return gradient


def of_asked(gradient: Gradient) -> Gradient:
    """`gradient` of what a batch asks about alone: the same numbers, without the other logits.

    Prompts are read, but their logits are not made where `apply` returns a `Projection`; nor are
    their log-probs. Every batch is cut by itself (`batches.asked`), so this goes around a compiled
    gradient and not into it.
    """

    def cut(loss: Loss) -> Callable:
        whole = gradient(loss)
        return lambda params, batch, key: whole(params, asked(batch), key)

    return cut


def of_shared(gradient: Gradient) -> Gradient:
    """`gradient` where prompts that rows share are read once (`prefix.shared`): the same numbers.

    For a loss of `causal_lm` or `projected_lm`, inside of `of_asked`, which finds where rows part.
    """

    def once(loss: Loss) -> Callable:
        whole = gradient(loss)
        return lambda params, batch, key: whole(params, shared(batch), key)

    return once


def gradient_step(
    loss: Loss,
    optimizer: Transform,
    *,
    microbatches: int = 1,
    gradient: Gradient = functional_gradient,
) -> Step:
    """Turn `loss(params, batch, key) -> (scalar, metrics)` into one update of the parameters.

    g = Σᵢ ∇L(θ, batchᵢ, keyᵢ),   (u, s') = optimizer(g, s, θ),   θ' = θ + u

    Pure: it writes to none of its arguments. The batch is cut along its first axis into
    `microbatches` parts, or fewer if it has fewer rows. That changes the memory it needs and not
    the result, because losses are weighted sums with weights normalised over the whole batch. Part
    i has the key `fold_in(key, i)`; a loss that draws randomly carries a key per row instead.

    Metrics are those of the loss, summed over the parts and cut from the graph, and two more:
    grad/norm = ‖g‖₂, and finite = 1 if L and ‖g‖₂ are finite, else 0. The update is made either
    way: a driver that reads `finite` < 1 keeps the old state, which is intact, or stops.

    Raises:
        TypeError: `microbatches` is not an int.
        ValueError: `microbatches` < 1; later, a batch whose fields differ in rows or have none.
    """
    gradients = _summed(gradient(loss), microbatches)

    def step(state: TrainState, batch: Any, key: Tensor) -> tuple[TrainState, Metrics]:
        grads, (total, metrics) = gradients(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        norm = tree.global_norm(grads)
        finite = total.isfinite() & norm.isfinite()
        new = TrainState(tree.add(state.params, updates), opt_state, state.step + 1)
        return new, _measured(metrics, norm, finite)

    return step


def every_update(metrics: Metrics) -> bool:
    """Nothing that a finite loss has to say of a step is against it."""
    del metrics
    return True


def donating_step(
    loss: Loss,
    optimizer: InPlace,
    *,
    microbatches: int = 1,
    gradient: Gradient = autograd_gradient,
    accept: Callable[[Metrics], bool | Tensor] = every_update,
) -> Step:
    """`gradient_step` that writes the new state over the old one, with no second copy of it.

    The state that comes back is the one that went in: the same tensors, which hold the new numbers,
    for the old name too. So nothing else may live in them, such as a reference or the best
    parameters so far: `frozen` copies. Where L or ‖g‖₂ is not finite, or `accept(metrics)` is
    False, nothing is written and no step is counted.

    For a driver that keeps only the newest state. Neither `vmap` nor a compiled graph may hold it:
    compile the loss.

    Raises: as `gradient_step`.
    """
    gradients = _summed(gradient(loss), microbatches)

    @torch.no_grad()
    def step(state: TrainState, batch: Any, key: Tensor) -> tuple[TrainState, Metrics]:
        grads, (total, metrics) = gradients(state.params, batch, key)
        norm = tree.global_norm(grads)
        finite = total.isfinite() & norm.isfinite()
        made = finite & accept(metrics)
        optimizer.write(grads, state.opt_state, state.params, norm, made)
        state.step.add_(made)
        return state, _measured(metrics, norm, finite)

    return step


def on_copies(step: Step) -> Step:
    """A step on a copy of its state, which stays as it was: what a donating step does, purely."""
    return lambda state, batch, key: step(tree.map(torch.clone, state), batch, key)


def _summed(gradient: Callable, microbatches: int) -> Callable:
    """Σᵢ gradient(θ, batchᵢ, keyᵢ), with what it says of the loss."""
    checks.count(least=1, microbatches=microbatches)

    def gradients(params: Params, batch: Any, key: Tensor) -> Any:
        first, *others = _cut(batch, microbatches)
        sums = gradient(params, first, fold_in(key, 0))
        for i, part in enumerate(others, start=1):
            sums = tree.add(sums, gradient(params, part, fold_in(key, i)))
        return sums

    return gradients


def _measured(metrics: Metrics, norm: Tensor, finite: Tensor) -> Metrics:
    return tree.stop(metrics | {"grad/norm": norm, "finite": finite.to(norm.dtype)})


def averages(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of every metric over the steps that were taken; of none, none."""
    names = metrics[0] if metrics else ()
    return {name: torch.stack([each[name] for each in metrics]).mean() for name in names}


def _cut(batch: Any, parts: int) -> list[Any]:
    """`batch` in at most `parts` parts of ⌈rows / parts⌉ rows, the last one shorter."""
    leaves = tree.leaves(batch)
    rows = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(rows) != 1 or 0 in rows:
        names = getattr(batch, "_fields", range(len(leaves)))
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, leaves))
        raise ValueError(
            f"batch: every field needs the same number of rows, and some; got {shapes}"
        )
    count = rows.pop()
    size = -(-count // parts)
    return [tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, count, size)]
