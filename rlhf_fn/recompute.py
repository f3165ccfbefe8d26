"""Activations that are computed again in the backward pass, and so need not be kept.

Chen et al. 2016: https://arxiv.org/abs/1604.06174
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_fn.models import Functional, Params
from rlhf_fn.skeletons import skeleton

Prepare = Callable[[Params], Params]
_transform: Any = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]


def checkpointed(
    make: Callable[[PreTrainedModel], Functional],
    module: PreTrainedModel,
    *,
    prepare: Prepare = lambda params: params,
) -> Functional:
    """`make(module)`, each of whose layers keeps what goes into it and nothing else.

    The same bits, forward and backward, for one forward pass more. The gradient is that of
    `autograd_gradient`, eager.

    Args:
        make: `causal_lm`, `projected_lm`, or `value_model` and its like with their key.
        prepare: parameters -> what is computed with: in half precision (`precision.cast`), gathered
            from slices (`sharding.assembled`). A layer's are prepared when it runs, forward and
            backward, and so one layer's at a time; those of no layer are before the first.

    Raises:
        TypeError: a model without layers that transformers would checkpoint; later, under a
            transform of `torch.func`, or in a compiled loss.
    """
    bare = skeleton(module).module
    layers = [m for m in bare.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TypeError(f"module {type(module).__name__} has no layers that can be checkpointed")
    for layer in layers:
        plain = type(layer)
        more = {"plain": plain, "prepare": staticmethod(prepare)}
        layer.__class__ = type(plain.__name__, (_Recomputed, plain), more)
    whole, params = make(bare), make(module).params
    later = _in_layers(bare, params)

    def apply(params: Params, *inputs: Any) -> Any:
        first = prepare({name: p for name, p in params.items() if name not in later})
        return whole.apply(params | first, *inputs)

    return Functional(apply, params)


def _in_layers(bare: PreTrainedModel, params: Params) -> frozenset[str]:
    """The parameters that are a layer's, by the names of the module or of its backbone."""
    named = bare.named_modules()
    layers = [f"{name}." for name, m in named if isinstance(m, GradientCheckpointingLayer)]
    layers += [name.removeprefix(f"{bare.base_model_prefix}.") for name in layers]
    return frozenset(name for name in params if name.startswith(tuple(layers)))


class _Recomputed:
    """A layer whose parameters are those of the moment, also when it runs once more."""

    plain: type
    prepare: Prepare

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or _transform() is not None:
            raise TypeError(
                "a checkpointed model runs eager and without torch.func: take its gradient with "
                "autograd_gradient, or use the model as it was"
            )
        layer = copy.copy(self)
        layer.__class__ = self.plain

        def run(params: Params, *inputs: Any, **options: Any) -> Any:
            return functional_call(layer, self.prepare(params), inputs, options)

        params = dict(self.named_parameters())
        return checkpoint(
            run, params, *inputs, use_reentrant=False, preserve_rng_state=False, **options
        )
