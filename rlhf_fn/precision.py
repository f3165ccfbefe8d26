"""Half precision to compute in, float32 to learn in: a model as another function of its params."""

from typing import Any

import torch

from rlhf_fn import tree
from rlhf_fn.models import Functional, Params


def cast(params: Params, dtype: torch.dtype) -> Params:
    """The parameters in `dtype`; those that are in it already are the same tensors.

    Of a frozen model this is done once and halves it; of one to sample from, once per rollout.
    """
    return {name: p.to(dtype) for name, p in params.items()}


def in_dtype(
    model: Functional, dtype: torch.dtype, *, out: torch.dtype | None = None
) -> Functional:
    """The model whose parameters are cast where it computes: θ stays as wide as it is.

    f'(θ, x) = f(cast(θ), x),   ∇f' in the dtype of θ

    So gradients, moments and updates are float32 where θ is: a step too small for half precision
    still counts. Log-probs of half-precision logits are float32 (`logprobs.py`).

    Args:
        out: of what the model returns; None leaves it. Values and scores want float32.
    """

    wide, start = model

    def apply(params: Params, *inputs: Any) -> Any:
        return wide(cast(params, dtype), *inputs)

    return returning(Functional(apply, start), out)


def returning(model: Functional, dtype: torch.dtype | None) -> Functional:
    """The model, what it returns in `dtype`; None leaves it."""
    if dtype is None:
        return model

    plain, start = model

    def apply(params: Params, *inputs: Any) -> Any:
        return tree.map(lambda x: x.to(dtype), plain(params, *inputs))

    return Functional(apply, start)
