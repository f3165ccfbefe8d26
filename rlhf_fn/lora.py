"""Low-rank adaptation: few parameters beside many frozen ones, and both are dicts.

    W' = W + s B A,   A [rank, in], B [out, rank]

Hu et al. 2021: https://arxiv.org/abs/2106.09685. An adapter is a flat dict of the A and B of every
target, under the names that PEFT gives them. It is trained instead of the parameters:

    low_rank = Lora(rank=8, alpha=16.0, targets=("q_proj", "v_proj"), scale=by_rank)
    base = causal_lm(module).params
    apply, adapter = lora(causal_lm, module, base, low_rank, key)  # a loss's, a step's, ...

W' never exists: a layer adds s (x Aᵀ) Bᵀ to its output. The adapter starts with B = 0, where
`apply` is that of `base`: kept, it is the frozen reference. `adapter | {"lm_head.weight": ...}`
trains other parameters, too. There is no dropout here either.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fn import checks, random, tree
from rlhf_fn.models import Functional, Params
from rlhf_fn.precision import cast
from rlhf_fn.products import linear
from rlhf_fn.skeletons import skeleton

A, B = "lora_A", "lora_B"


def by_rank(alpha: float, rank: int) -> float:
    """s = α / r, as LoRA has it."""
    return alpha / rank


def by_root_rank(alpha: float, rank: int) -> float:
    """s = α / √r, rank-stabilised: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732."""
    return alpha / rank**0.5


class Lora(NamedTuple):
    """What is adapted, and how far.

    Args:
        rank: r of A and B.
        alpha: α > 0 of the scale.
        targets: names of linear layers, or their ends: "q_proj" is every layer's. `all_linear`
            lists all.
        scale: (α, r) -> s; `by_rank` or `by_root_rank`.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    scale: Callable[[float, int], float]


def lora(
    make: Callable[[PreTrainedModel], Functional],
    module: PreTrainedModel,
    base: Params,
    low_rank: Lora,
    key: Int64[Tensor, " 2"],
) -> Functional:
    """`make(module)` as a function of an adapter, and the adapter it starts from.

    A ~ U(−1/√in, 1/√in),   B = 0.   float32 from half precision; the products are in the dtype of
    what the layer reads.

    Args:
        make: `causal_lm`, `projected_lm`, or `value_model` and its like with their key.
        base: the parameters of `make(module)`; closed over, neither copied nor differentiated.

    Raises:
        TypeError: `targets` is one string, or `rank` is no int.
        ValueError: a target that is no linear layer of the backbone, `rank` < 1 or `alpha` ≤ 0.
    """
    apply, params = make(adapted(module, low_rank))
    low = {name: p.shape for name, p in params.items() if is_low_rank(name)}
    if wrong := sorted((params.keys() - low) ^ base.keys()):
        raise ValueError(
            f"base and make(module) differ in {', '.join(wrong[:3])}; pass the params of "
            "make(module), without an adapter"
        )
    return Functional(on_base(apply, base), _start(low, base, key))


def adapted(module: PreTrainedModel, low_rank: Lora) -> PreTrainedModel:
    """The module with A and B beside its targets, and without numbers: its weights are on "meta".

    It goes where a module goes (`causal_lm`, `decoder`, ...); the parameters of what comes out are
    `base | adapter`. Raises as `lora` does.
    """
    bare = skeleton(module).module
    layers = target_layers(bare, low_rank)
    s = low_rank.scale(low_rank.alpha, low_rank.rank)
    for name, layer in layers.items():
        if hasattr(layer, A):
            raise ValueError(f"module is adapted already, at {name}; pass the one it was made from")
        out, into = _sizes(layer)
        layer.add_module(A, nn.Linear(into, low_rank.rank, bias=False, device="meta"))
        layer.add_module(B, nn.Linear(low_rank.rank, out, bias=False, device="meta"))
        layer.register_forward_hook(partial(_beside, s=s))
    return bare


def on_base(function: Callable[..., Any], base: Params) -> Callable[..., Any]:
    """function(params, ...) as a function of those parameters that are not `base`'s, or instead.

    `on_base(f, base)(trained, ...) = f(base | trained, ...)`, of `apply`, of `partial(sample,
    decoder(adapted(module, low_rank)))`, of anything that takes parameters first.
    """

    def on(trained: Params, *args: Any, **kwargs: Any) -> Any:
        return function(base | trained, *args, **kwargs)

    return on


def merge(
    module: PreTrainedModel,
    base: Params,
    adapter: Params,
    low_rank: Lora,
    *,
    dtype: torch.dtype | None = None,
) -> Params:
    """W' = W + s B A of every target, in the dtype of W; the others are the tensors of `base`.

    Of slices W' is in slices, as W is. In another `dtype`, which all are then, each is rounded as
    soon as it is summed, so that no more than one is there as wide as W.

    The parameters of the module itself. Whatever else `adapter` holds takes its place in `base`.

    Raises:
        ValueError: A or B of a target is missing or of another shape.
    """
    layers = target_layers(module, low_rank)
    low = {name: x for name, x in adapter.items() if is_low_rank(name)}
    require_fit(layers, low, low_rank, "adapter")
    params = base | {name: x for name, x in adapter.items() if name not in low}
    s = low_rank.scale(low_rank.alpha, low_rank.rank)
    for name, layer in layers.items():
        weight = params[f"{name}.weight"]
        narrow = dtype or weight.dtype
        change = s * low[f"{name}.{B}.weight"] @ low[f"{name}.{A}.weight"]
        change = change.mT if isinstance(layer, Conv1D) else change
        params[f"{name}.weight"] = (weight + change).to(narrow)
    return params if dtype is None else cast(params, dtype)


def all_linear(module: PreTrainedModel) -> tuple[str, ...]:
    """The ends of the names of all linear layers of the backbone: targets for `Lora`."""
    return tuple(sorted({name.rpartition(".")[2] for name in _linear_layers(module)}))


def _beside(layer: Any, inputs: tuple[Tensor], out: Tensor, *, s: float) -> Tensor:
    """out + s (x Aᵀ) Bᵀ"""
    (x,) = inputs
    a, b = (low.weight.to(x.dtype) for low in (layer.lora_A, layer.lora_B))
    return out + linear(s * linear(x, a), b)


def _start(shapes: Mapping[str, torch.Size], base: Params, key: Tensor) -> Params:
    """B = 0, and A of a key for every name: Kaiming's uniform of slope √5, as PEFT draws it."""
    adapter = {}
    for (name, shape), each in zip(shapes.items(), random.split(key, len(shapes))):
        like = base[name.replace(f".{A}.", ".").replace(f".{B}.", ".")]
        bound = shape[-1] ** -0.5 if f".{A}." in name else 0.0
        x = bound * (2 * random.uniform(each, shape) - 1)
        adapter[name] = x.to(like.device, tree.wide(like))
    return adapter


# What adapters.py also builds on.


def target_layers(module: PreTrainedModel, low_rank: Lora) -> dict[str, nn.Module]:
    """The layers that are meant, by name. Raises as `lora` does."""
    rank, alpha, targets, _ = low_rank
    checks.count(least=1, rank=rank)
    checks.positive(alpha=alpha)
    if isinstance(targets, str):
        raise TypeError(f"targets must be a sequence of names; write ({targets!r},)")
    known, ends = _linear_layers(module), ", ".join(all_linear(module))
    if not targets:
        raise ValueError(f"targets is empty; choose from {ends}")
    for target in targets:
        if any(named(name, (target,)) for name in known):
            continue
        head = module.get_output_embeddings()
        if head is not None and any(
            m is head and named(name, (target,)) for name, m in module.named_modules()
        ):
            raise ValueError(
                f"targets has {target!r}, the head, which takes no adapter: its weight may be that "
                "of the embedding, and a Projection has the weight alone. Leave it out; it is "
                "trained whole where it is put into the adapter under its own name"
            )
        raise ValueError(
            f"targets has {target!r}, which is no linear layer of the backbone of "
            f"{type(module).__name__}; choose from {ends}, or longer names"
        )
    return {name: layer for name, layer in known.items() if named(name, targets)}


def named(name: str, targets: Sequence[str]) -> bool:
    """Whether a name is one of `targets`, or ends with one at a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def is_low_rank(name: str) -> bool:
    """Whether a parameter is an A or a B."""
    return f".{A}." in name or f".{B}." in name


def require_fit(
    layers: Mapping[str, nn.Module], adapter: Params, low_rank: Lora, what: str
) -> None:
    """Raise a `ValueError` unless `adapter` has the A and the B of every layer, and no more."""
    expected = {}
    for name, layer in layers.items():
        out, into = _sizes(layer)
        expected[f"{name}.{A}.weight"] = (low_rank.rank, into)
        expected[f"{name}.{B}.weight"] = (out, low_rank.rank)
    got = {name: tuple(x.shape) for name, x in adapter.items()}
    if wrong := sorted(dict(expected.items() ^ got.items())):
        first = wrong[0]
        raise ValueError(
            f"{what} does not fit: {first} is {got.get(first)}, expected {expected.get(first)}; "
            "it belongs to the module and the Lora that it was made with"
        )


def _linear_layers(module: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of the backbone, by name; heads stand outside of it."""
    inside = {id(m) for m in module.base_model.modules()}
    return {
        name: m
        for name, m in module.named_modules()
        if id(m) in inside and isinstance(m, nn.Linear | Conv1D) and not is_low_rank(f"{name}.")
    }


def _sizes(layer: Any) -> tuple[int, int]:
    """(out, in); a `Conv1D` has its weight the other way round."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else tuple(layer.weight.shape)
