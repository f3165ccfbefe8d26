"""What the step of every command is made of: its optimizer, and a state that it writes over."""

from typing import Any

import torch

from rlhf_fn import optim
from rlhf_fn.compiled import compiled_loss
from rlhf_fn.config import ConfigError
from rlhf_fn.fused import InPlace, fused_adamw
from rlhf_fn.models import Functional, Params, frozen
from rlhf_fn.precision import cast, in_dtype, returning
from rlhf_fn.ranks import data_parallel, place
from rlhf_fn.room import planned
from rlhf_fn.sharding import (
    device_mesh,
    fully_sharded,
    gathered,
    on_shards,
    shard,
    shared_alike,
    slices,
    whole,
)
from rlhf_fn.steps import (
    Loss,
    Step,
    TrainState,
    autograd_gradient,
    donating_step,
    of_asked,
    of_shared,
    train_state,
)

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


def computing(model: Functional, options: Any, *, out: torch.dtype | None = None) -> Functional:
    """The model in the precision of a run; `out`, where it is not that, is what it returns.

    One that recomputes casts for itself, layer by layer (`reading.made_by`).
    """
    dtype = precision(options)
    if dtype == torch.float32:
        return model
    return returning(model, out) if options.recompute else in_dtype(model, dtype, out=out)


def device(options: Any) -> torch.device:
    """What a run computes on: what `--device` names, else the GPU where there is one.

    Raises:
        ConfigError: there is no such device, or `--shards` are no divisor of the ranks.
    """
    shards, ranks = getattr(options, "shards", 1), place().ranks
    if ranks % shards:
        raise ConfigError(
            f"--shards is {shards}, which does not divide the {ranks} ranks; start a multiple of "
            "it with torchrun, or leave it out"
        )
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks > 1 and ":" in name:
        raise ConfigError(f"--device {name} is one, for {ranks} ranks; say cuda: each has its own")
    try:
        return torch.empty((), device=name).device
    except (RuntimeError, AssertionError) as error:  # by name, or by what torch was built with
        raise ConfigError(
            f"--device {name}: {str(error).splitlines()[0]}; leave it out, or say cpu or cuda"
        ) from error


def precision(options: Any) -> torch.dtype:
    """What a run computes in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def step_of(
    loss: Loss, optimizer: InPlace, options: Any, *, rows: int, time: int, share: bool = False,
    **more: Any,
) -> Step:  # fmt: skip
    """The step of a command: in micro-batches, over the state it is given, compiled if asked for.

    Of so many rows, and of the longest row. `share`: the loss is of a policy that reads prompts
    that rows share once.
    """
    gradient = autograd_gradient
    if options.compile:
        each = max(-(-rows // options.accumulate), 2)
        loss = compiled_loss(loss, rows=each, time=max(time, 2))
    else:
        gradient = planned(gradient, microbatches=options.accumulate)
    if options.shards > 1:
        gather = slices if options.recompute else gathered
        part = {"share": shared_alike} if share else {}  # which is of what is asked, too
        gradient = fully_sharded(gradient if share else of_asked(gradient), gather=gather, **part)
        optimizer = on_shards(optimizer)
    else:
        gradient = data_parallel(of_asked(of_shared(gradient) if share else gradient))
    parts = options.accumulate
    return donating_step(loss, optimizer, microbatches=parts, gradient=gradient, **more)


def resident(model: Functional, options: Any) -> Functional:
    """The model, and its parameters as a run keeps them: in slices, where the options say so.

    These in float32, in which they are trained.
    """
    if options.shards == 1:
        return model
    mesh = device_mesh(shards=options.shards, kind=device(options).type)
    return model._replace(params=cast(shard(model.params, mesh), torch.float32))


def readable(params: Params, options: Any) -> Params:
    """What a model reads outside of a loss: all of them whole, or what the run keeps of them.

    The latter where it gathers for itself, a layer's where that computes (`reading.made_by`).
    """
    return params if options.recompute else whole(params)


def begun(params: Params, optimizer: InPlace) -> TrainState:
    """The state before the first step, in memory of its own: steps will write to it."""
    return train_state(frozen(params), optimizer)
