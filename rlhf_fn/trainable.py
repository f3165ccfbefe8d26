"""What a command trains of a policy: all of it, or an adapter beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fn.adapters import save_adapter
from rlhf_fn.frame import save_tuned
from rlhf_fn.loading import Policy
from rlhf_fn.lora import A, Lora, all_linear, by_rank, lora, merge
from rlhf_fn.models import Functional, Params, causal_lm
from rlhf_fn.precision import cast
from rlhf_fn.ranks import by_first
from rlhf_fn.sharding import on_first, replicated


class Trainable(NamedTuple):
    """A causal language model as a function of what is trained of it.

    `start` are the parameters of the module before the first step, `merged(params, dtype)` those of
    later, kept alike; `low_rank` is None where all are trained.
    """

    model: Functional
    start: Params
    merged: Callable[[Params, torch.dtype], Params]
    low_rank: Lora | None


def trainable(
    module: PreTrainedModel,
    base: Functional,
    rank: int,
    key: Int64[Tensor, " 2"],
    *,
    make: Callable[..., Functional] = causal_lm,
    dtype: torch.dtype = torch.float32,
    keep: Callable[[Functional], Functional] = lambda model: model,
) -> Trainable:
    """W + B A of that rank in every linear layer of `base`, as `make(module)` has it; 0: all of W.

    α is the rank, so s = 1: how far an adapter goes is left to the learning rate. What is trained
    is in float32, an adapter's base in `dtype`; `keep` says how a run keeps both
    (`updates.resident`).
    """
    base = keep(base)
    if not rank:
        return Trainable(base, base.params, cast, None)
    low_rank = Lora(rank, float(rank), all_linear(module), by_rank)
    model = lora(make, module, cast(base.params, dtype), low_rank, key)

    def merged(adapter: Params, dtype: torch.dtype) -> Params:
        each = {name: replicated(x) if f".{A}." in name else x for name, x in adapter.items()}
        # a row of W' is of one of W and of B
        return merge(module, base.params, each, low_rank, dtype=dtype)

    return Trainable(keep(model), base.params, merged, low_rank)


def save_trained(directory: Path, policy: Policy, tuned: Trainable, params: Params) -> None:
    """`policy/`, whole, as transformers loads it, and `adapter/`, if that is what was trained."""
    if tuned.low_rank is None:
        return save_tuned(directory / "policy", policy, params)
    adapter = on_first(params)  # before anything is written, for which nobody waits
    save_tuned(directory / "policy", policy, tuned.merged(params, torch.float32))
    by_first(save_adapter)(policy.module, adapter, tuned.low_rank, directory / "adapter")
