"""Models a layer at a time: its parameters are prepared when it runs, its activations not kept.

They are computed again in the backward pass. Chen et al. 2016: https://arxiv.org/abs/1604.06174
"""

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_fn.decoding import Decoder, decoder
from rlhf_fn.models import Functional, Params, causal_lm
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
    bare, layer_of = _layered(module, prepare)
    whole = make(bare)

    def apply(params: Params, *inputs: Any) -> Any:
        return whole.apply(_outside(params, layer_of, prepare), *inputs)

    return Functional(apply, make(module).params)


class Layerwise(NamedTuple):
    """`decoder` and `apply` of parameters that are `outside(params)`; how many bytes are whole."""

    decoder: Decoder
    apply: Callable[..., Tensor]
    outside: Prepare
    held: Callable[[Params], int]


def layerwise(module: PreTrainedModel, *, prepare: Prepare) -> Layerwise:
    """`decoder(module)` and `causal_lm(module).apply`, a layer's parameters prepared when it runs.

    That is at every token. The same bits. `outside` prepares the parameters of no layer, once for a
    rollout; `held` are the bytes of these and of the largest layer.

    Raises: as `checkpointed`.
    """
    bare, layer_of = _layered(module, prepare)

    def held(params: Params) -> int:
        sizes = Counter({"": 0})
        for name, p in params.items():
            sizes[layer_of(name)] += p.nbytes
        return sizes.pop("") + max(sizes.values(), default=0)

    def outside(params: Params) -> Params:
        return _outside(params, layer_of, prepare)

    return Layerwise(decoder(bare), causal_lm(bare).apply, outside, held)


def _outside(params: Params, layer_of: Callable[[str], str], prepare: Prepare) -> Params:
    return params | prepare({name: p for name, p in params.items() if not layer_of(name)})


def _layered(
    module: PreTrainedModel, prepare: Prepare
) -> tuple[PreTrainedModel, Callable[[str], str]]:
    """The module, whose layers prepare, and the layer of a parameter, by its name; else "".

    By the names of the module or of its backbone.
    """
    bare = skeleton(module).module
    named = {n: m for n, m in bare.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not named:
        raise TypeError(f"module {type(module).__name__} has no layers that can be checkpointed")
    for layer in named.values():
        plain = type(layer)
        more = {"plain": plain, "prepare": staticmethod(prepare)}
        layer.__class__ = type(plain.__name__, (_Recomputed, plain), more)
    layers = [f"{name}." for name in named]
    layers += [name.removeprefix(f"{bare.base_model_prefix}.") for name in layers]

    @cache
    def layer_of(name: str) -> str:
        return next((layer for layer in layers if name.startswith(layer)), "")

    return bare, layer_of


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
