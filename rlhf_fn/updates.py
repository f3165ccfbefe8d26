"""What the step of every command is made of: its optimizer, and a state that it writes over."""

from typing import Any

from rlhf_fn import optim
from rlhf_fn.fused import InPlace, fused_adamw
from rlhf_fn.models import Params, frozen
from rlhf_fn.steps import Loss, Step, TrainState, donating_step, train_state

ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}


def adamw(lr: optim.Schedule, *, max_norm: float, weight_decay: float = 0.0) -> optim.Transform:
    """AdamW with β = (0.9, 0.95), after clipping by the global norm."""
    return optim.chain(
        optim.clip_by_global_norm(max_norm),
        optim.adamw(lr, **ADAM, weight_decay=weight_decay),
    )


def fused(lr: optim.Schedule, options: Any, *, weight_decay: float = 0.0) -> InPlace:
    """`adamw`, written over the state of a run."""
    return fused_adamw(lr, **ADAM, weight_decay=weight_decay, max_norm=options.max_norm)


def cosine(options: Any) -> optim.Schedule:
    """Linear warm-up to the peak, then a cosine to 0."""
    warmup = min(options.warmup, options.steps - 1)
    return optim.cosine_schedule(options.lr, steps=options.steps, warmup=warmup)


def step_of(loss: Loss, optimizer: InPlace, options: Any, **more: Any) -> Step:
    """The step of a command: in micro-batches, over the state it is given."""
    return donating_step(loss, optimizer, microbatches=options.accumulate, **more)


def begun(params: Params, optimizer: InPlace) -> TrainState:
    """The state before the first step, in memory of its own: steps will write to it."""
    return train_state(frozen(params), optimizer)
