"""How a command samples the policy that it trains: in its precision, compiled if asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import random, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.engine import compiled, memory_plan
from rlhf_fn.models import Params
from rlhf_fn.precision import cast
from rlhf_fn.ranks import by_first, place
from rlhf_fn.rollout import Prompts, Rollout, sample
from rlhf_fn.room import require_room
from rlhf_fn.sharding import in_slices
from rlhf_fn.updates import precision


def sampler(
    policy: Any,
    options: Any,
    start: Params,
    *,
    width: int,
    group: int = 1,
    **how: Any,
) -> Callable[..., Rollout]:
    """`draw(params, prompts, keys)`: `sample` from a policy module, `how` being its options.

    Says what memory that takes a rank, of `options.batch` prompts of `width` tokens at most and a
    group of answers to each, and refuses what cannot fit. With `--compile` a blank rollout of that
    size goes first, by which the compiler arranges its loops: so what a run computes does not
    depend on the step it was resumed at.

    Args:
        start: the module's parameters before the first step.

    Raises: ConfigError, before anything is drawn, if it needs more memory than is free.
    """
    reads, dtype, new = decoder(policy), precision(options), options.new_tokens
    params = cast(start, dtype)
    share = -(-options.batch // place().ranks)  # of the prompts: `ranks.by_rows` shares these out
    sizes = {"prompts": share, "group": group, "width": width, "max_new_tokens": new}
    plan = memory_plan(reads, params, **sizes)
    by_first(print)(plan)
    there = 0 if in_slices(params) else plan.weights
    require_room(
        f"{plan}, of which the weights are there" if there else str(plan),
        plan.total - there,
        tree.device(params),
        f"lower --batch ({options.batch}) or --new-tokens ({new}), or use --dtype bfloat16",
    )
    if not options.compile:
        return partial(_draw, reads, dtype, max_new_tokens=new, **how)
    turns = compiled(reads)
    columns = max(width + new - 2, 1)  # and two to come
    tokens = torch.zeros(share, columns, dtype=torch.int64)
    keys = random.split(random.key(0), share * group)
    blank, keys = tree.beside((Prompts(tokens, tokens == 0), keys), params)
    sample(turns, params, blank, keys, max_new_tokens=2, **how)
    return partial(_draw, turns, dtype, max_new_tokens=new, **how)


def _draw(
    reads: Any, dtype: torch.dtype, params: Params, prompts: Prompts, keys: Tensor, **how: Any
) -> Rollout:
    return sample(reads, cast(params, dtype), prompts, keys, **how)
