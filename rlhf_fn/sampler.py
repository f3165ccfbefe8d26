"""How a command samples the policy that it trains: in its precision, compiled if asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from rlhf_fn import random, tree
from rlhf_fn.compiled import arranged_by
from rlhf_fn.decoding import Decoder, decoder
from rlhf_fn.engine import MemoryPlan, compiled, memory_plan
from rlhf_fn.losses import Apply
from rlhf_fn.models import Params, causal_lm
from rlhf_fn.precision import cast
from rlhf_fn.ranks import anywhere, by_first, place
from rlhf_fn.recompute import layerwise
from rlhf_fn.rollout import Engine, Prompts, Rollout, eager, sample
from rlhf_fn.room import require_room
from rlhf_fn.sharding import assembled, in_slices, model_by_rows, whole
from rlhf_fn.skeletons import skeleton
from rlhf_fn.updates import precision


class Sampling(NamedTuple):
    """A policy as a run samples it, and reads what it sampled; both take `gather(params)`.

    `gather` puts together of parameters in slices what is whole for a rollout, and `held(params)`
    are the bytes of these that are whole at once.
    """

    engine: Decoder | Engine
    apply: Apply
    gather: Callable[[Params], Params]
    held: Callable[[Params], int]


def at_once(policy: Any) -> Sampling:
    """All parameters whole."""
    apply = causal_lm(skeleton(policy).module).apply
    return Sampling(decoder(policy), apply, whole, lambda p: sum(x.nbytes for x in p.values()))


def by_layer(policy: Any) -> Sampling:
    """A layer whole at a time, and what is in none; all ranks take as many turns.

    For each token every layer is gathered: rows are what makes up for it.
    """
    reads, apply, outside, held = layerwise(policy, prepare=assembled)
    engine = eager(reads)._replace(
        size=lambda n: max(n, 1), some=lambda alive: anywhere(bool(alive.any()))
    )
    return Sampling(engine, apply, outside, held)


def sampling(policy: Any, options: Any) -> Sampling:
    """`by_layer` where the options say so, else `at_once`."""
    return by_layer(policy) if options.layerwise else at_once(policy)


def sampler(
    policy: Any,
    options: Any,
    start: Params,
    *,
    width: int,
    group: int = 1,
    merged: Callable[[Params, torch.dtype], Params] = cast,
    **how: Any,
) -> Callable[..., Rollout]:
    """`draw(params, prompts, keys)`: `sample` from a policy module, `how` being its options.

    Each rank draws for its share of the prompts. Says what memory that takes a rank, of
    `options.batch` prompts of `width` tokens at most and a group of answers to each, and refuses
    what cannot fit. With `--compile` a blank rollout of that size goes first, by which the compiler
    arranges its loops: so what a run computes does not depend on the step it was resumed at.

    Args:
        start: the module's parameters before the first step, as the run keeps them.
        merged: the module's parameters, in a dtype, from those that `draw` is given.

    Raises: ConfigError, before anything is drawn, if it needs more memory than is free.
    """
    reads, dtype, new = sampling(policy, options), precision(options), options.new_tokens
    params, engine = cast(start, dtype), reads.engine
    share = -(-options.batch // place().ranks)  # of the prompts: `ranks.by_rows` shares these out
    sizes = {"prompts": share, "group": group, "width": width, "max_new_tokens": new}
    plan = memory_plan(engine, params, **sizes)._replace(weights=reads.held(params))
    made = merged is not cast and dtype == torch.float32  # where `cast` takes no memory
    _require(plan, options, params, there=not made)
    if options.compile:
        engine = compiled(decoder(policy))
        columns = max(width + new - 2, 1)  # and two to come
        tokens = torch.zeros(share, columns, dtype=torch.int64)
        keys = random.split(random.key(0), share * group)
        blank, keys = tree.beside((Prompts(tokens, tokens == 0), keys), params)
        with arranged_by(share, group, columns):
            sample(engine, reads.gather(params), blank, keys, max_new_tokens=2, **how)
    draw = partial(sample, engine, max_new_tokens=new, **how)
    return model_by_rows(draw, lambda params: reads.gather(merged(params, dtype)))


def _require(plan: MemoryPlan, options: Any, params: Params, *, there: bool) -> None:
    """Say the plan, and refuse it where it cannot fit beside `params`, or `there` with them."""
    by_first(print)(plan)
    there = there and not in_slices(params)
    require_room(
        f"{plan}, of which the weights are there" if there else str(plan),
        plan.total - there * plan.weights,
        tree.device(params),
        f"lower --batch ({options.batch}) or --new-tokens ({options.new_tokens}), or use --dtype "
        "bfloat16" + (" or --layerwise 1" if in_slices(params) and not options.layerwise else ""),
    )
