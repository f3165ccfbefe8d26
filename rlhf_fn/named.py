"""Trees of tensors by name, as a checkpoint holds them: `params/weight`."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fn.errors import IncompatibleCheckpoint
from rlhf_fn.manifest import Tensors, kind
from rlhf_fn.sharding import shard


def flatten(tree: Any) -> Tensors:
    """Name each tensor of a tree of dicts, tuples and NamedTuples by its path: `params/weight`.

    Raises:
        TypeError: a leaf that is neither a tensor nor None.
        ValueError: two leaves with one name.
    """
    named: Tensors = {}
    for name, leaf in _leaves(tree, ""):
        if name in named:
            raise ValueError(f"tree: two leaves are called {name!r}; rename a key")
        named[name] = leaf
    return named


def unflatten(like: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree `like` with its tensors replaced by those of `tensors`, as `flatten` named them.

    Each goes to the device of the tensor it replaces, and is sharded as that is; nothing is cast or
    reshaped.

    Raises:
        IncompatibleCheckpoint: with every name, shape and dtype that differs.
    """
    wanted = flatten(like)
    found = {name: kind(x) for name, x in tensors.items()}
    require(found, {name: kind(x) for name, x in wanted.items()}, what="tensors")
    return _replace(like, {name: _placed(tensors[name], x) for name, x in wanted.items()}, "")


def require(found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str = "meta") -> None:
    """Check that a checkpoint is of this run: the same keys with equal values.

    Raises:
        IncompatibleCheckpoint: with a diff, one line per key.
    """
    missing = "nothing"
    lines = [
        f"  {key}: the checkpoint has {found.get(key, missing)}, "
        f"this run has {expected.get(key, missing)}"
        for key in sorted({*found, *expected})
        if key not in found or key not in expected or found[key] != expected[key]
    ]
    if lines:
        head = f"{what}: the checkpoint is of another run; use its settings or another directory"
        raise IncompatibleCheckpoint("\n".join([head, *lines]))


def _placed(x: Tensor, like: Tensor) -> Tensor:
    moved = x.to(like.device)
    return shard(moved, like.device_mesh) if isinstance(like, DTensor) else moved


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), part) for key, part in tree.items()]
    if isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", range(len(tree)))
        return [(str(name), part) for name, part in zip(names, tree)]
    return None


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    children = _children(tree)
    if children is not None:
        for name, part in children:
            yield from _leaves(part, f"{path}/{name}" if path else name)
    elif isinstance(tree, Tensor):
        yield path, tree
    elif tree is not None:
        raise TypeError(f"tree: {path!r} is {type(tree).__name__}, expected a Tensor or None")


def _replace(tree: Any, tensors: Tensors, path: str) -> Any:
    children = _children(tree)
    if children is None:
        return None if tree is None else tensors[path]
    parts = [_replace(part, tensors, f"{path}/{name}" if path else name) for name, part in children]
    if isinstance(tree, Mapping):
        return dict(zip(tree, parts))
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
