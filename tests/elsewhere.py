"""A device that is not the CPU, where there is none: tensors with numbers that refuse to mix.

Its tensors say that they are on `lazy:0`, a device of torch's that needs no hardware, and carry
CPU tensors inside. As with a GPU's, an operation on tensors here and there raises, unless those
here are single numbers or torch moves them by itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("lazy", 0)
_aten: Any = torch.ops.aten
_MOVES = {_aten._to_copy, _aten.copy_}
_READS_INDICES = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_JOINS = {_aten.cat, _aten.stack}  # these take single numbers from one device only, too


class There(Tensor):
    """A tensor on that device."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=THERE,
        )  # fmt: skip

    def __init__(self, inside: Tensor):
        self.inside = inside

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.inside})"

    def tolist(self) -> Any:
        return self.inside.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inside.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it is entered, the device is there."""

    def __enter__(self) -> Any:
        self.before = torch._C._only_lift_cpu_tensors()  # else torch.tensor() goes past a mode
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kind = operation.overloadpacket
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    if there and kind not in _MOVES:
        _refuse_to_mix(operation, kind, args, tensors)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type == THERE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    inside = tree_map(_inside, (args, kwargs))
    out = operation(*inside[0], **inside[1])
    written = {id(_inside(x)): x for x in tensors}
    wrap = There if there else lambda x: x
    return tree_map(
        lambda x: written.get(id(x)) if id(x) in written else wrap(x) if _plain(x) else x, out
    )


def _refuse_to_mix(operation: Any, kind: Any, args: Any, tensors: list[Tensor]) -> None:
    if kind in _READS_INDICES:
        tensors = [args[0], *tensors] if isinstance(args[0], There) else tensors
        here = [] if isinstance(args[0], There) else [args[0]]
    else:
        here = [x for x in tensors if _plain(x) and (x.ndim or kind in _JOINS)]
    if here:
        shapes = ", ".join(f"{tuple(x.shape)} {x.device}" for x in tensors)
        raise RuntimeError(f"{operation}: tensors on two devices, {shapes}")


def _plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, There)


def _inside(x: Any) -> Any:
    return x.inside if isinstance(x, There) else x
