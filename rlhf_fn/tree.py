"""Pytrees: nested dicts, tuples, lists and NamedTuples of tensors.

The one module that touches torch's pytree, which is private; everything else says `tree.map`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils import _pytree

Tree = Any  # a tensor, or a dict, tuple, list or NamedTuple of trees


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """f(x, y, ...) at every leaf of trees of one structure; the structure is kept.

    Raises:
        ValueError: the structures differ.
    """
    return _pytree.tree_map(f, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in the order of the structure (dicts: of insertion)."""
    return _pytree.tree_leaves(tree)


def filled(tree: Tree, leaves: Iterable[Any]) -> Tree:
    """The structure of `tree` with other leaves, in the order of its own."""
    return _pytree.tree_unflatten([*leaves], _pytree.tree_structure(tree))


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""
    return map(torch.add, a, b)


def scale(tree: Tree, factor: float | Float[Tensor, ""]) -> Tree:
    """factor · x at every leaf x, in the dtype of x."""
    return map(lambda x: x * cast(factor, x), tree)


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros with the shapes, dtypes and devices of `tree`."""
    return map(torch.zeros_like, tree)


def stop(tree: Tree) -> Tree:
    """sg[x] at every leaf: the same values, no gradient."""
    return map(torch.detach, tree)


def global_norm(tree: Tree) -> Float[Tensor, ""]:
    """‖tree‖ = √(Σ over all leaves of Σ x²), in float32 from half precision; 0 for an empty tree.

    The gradient at 0 is 0. Of DTensors it is that of the whole, as a plain tensor.
    """
    norms = [torch.linalg.vector_norm(x, dtype=wide(x)) for x in leaves(tree)]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    return full(norm)


def full(x: Shaped[Tensor, "..."]) -> Tensor:
    """A DTensor as a plain tensor, whole on every rank; a plain tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def cast(factor: float | Tensor, x: Shaped[Tensor, "..."]) -> float | Tensor:
    """A number ready to meet `x`: a tensor takes its dtype, so the result has the dtype of `x`."""
    return factor.to(x.dtype) if isinstance(factor, Tensor) else factor


def like(x: Shaped[Tensor, "..."], number: float | Tensor) -> Tensor:
    """A number as a tensor of the dtype and the device of `x`."""
    return torch.as_tensor(number, dtype=x.dtype, device=x.device)


def device(tree: Tree) -> torch.device:
    """Where the first leaf is."""
    return leaves(tree)[0].device


def beside(tree: Tree, params: Tree) -> Tree:
    """Every leaf where the first of `params` is: what is there already is the same tensor."""
    return map(lambda x: x.to(device(params)), tree)


def own(x: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """A copy in memory of its own, with the strides that its shape alone gives it.

    `contiguous` leaves those of axes of length 1 as they are, which a compiled graph looks at.
    """
    return x.clone(memory_format=torch.contiguous_format)


def wide(x: Shaped[Tensor, "..."]) -> torch.dtype:
    """The dtype to compute in: float32 for half precision, else that of `x`."""
    return torch.promote_types(x.dtype, torch.float32)
