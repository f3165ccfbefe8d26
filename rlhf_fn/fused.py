"""AdamW that writes: one pass over parameters, moments and gradients, and no second copy of any.

`optim.adamw` is the formula, to vmap and to differentiate. Here the kernel behind
`torch.optim.AdamW(fused=True)` computes the same; it runs outside of compiled graphs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.optim import AdamState, Schedule, adamw
from rlhf_fn.tree import Tree

_adamw: Any = torch._fused_adamw_  # type: ignore[attr-defined]


class InPlace(NamedTuple):
    """An optimizer that writes: init(params) -> state, write(grads, state, params, norm, made).

    `norm` is ‖grads‖₂. Where `made` is False parameters and state stay as they are, to the bit;
    `grads` is used up either way. Nothing is returned.
    """

    init: Callable[[Tree], Any]
    write: Callable[[Tree, Any, Tree, Float[Tensor, ""], Bool[Tensor, ""]], None]


def fused_adamw(
    lr: float | Tensor | Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_norm: float = math.inf,
) -> InPlace:
    """`chain(clip_by_global_norm(max_norm), adamw(...))`, written over what it is given.

    The state is the `AdamState` of `adamw`. Clipping divides each gradient by
    max(1, (‖g‖ + 10⁻⁶) / max_norm) where the kernel reads it, so it costs no pass of its own.

    Raises:
        ValueError: as `adamw` and `clip_by_global_norm`; from `init`, a parameter whose elements
            do not stand in order.
        TypeError: from `init`, a parameter in half precision: its moments would be in it, too.

    Loshchilov & Hutter 2019, algorithm 2: https://arxiv.org/abs/1711.05101
    """
    formula = adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if max_norm != math.inf:
        checks.positive(max_norm=max_norm)
    settings = {"beta1": float(b1), "beta2": float(b2), "eps": float(eps)}
    settings |= {"weight_decay": float(weight_decay), "amsgrad": False, "maximize": False}

    def init(params: Tree) -> AdamState:
        tree.map(_require_plain, params)
        return formula.init(params)

    @torch.no_grad()
    def write(grads: Tree, state: AdamState, params: Tree, norm: Tensor, made: Tensor) -> None:
        rate = _rate(lr, state.count)
        state.count.add_(made)
        scale = None if max_norm == math.inf else ((norm + 1e-6) / max_norm).clamp(min=1.0)
        skipped, count = (~made).float(), state.count.float()
        for ps, gs, ms, vs in _alike(params, _owned(grads), state.mu, state.nu):
            _adamw(
                ps, gs, ms, vs, [], [count] * len(ps), lr=rate, **settings,
                grad_scale=_for_kernel(scale, gs), found_inf=skipped,
            )  # fmt: skip

    return InPlace(init, write)


def _rate(lr: float | Tensor | Schedule, count: Tensor) -> float | Tensor:
    rate = lr(count) if callable(lr) else lr
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return rate.float()  # as the kernel reads it there
    return rate


def _for_kernel(scale: Tensor | None, grads: list[Tensor]) -> Tensor | None:
    """What the kernel is to divide by: a float32, too few digits for wider gradients."""
    if scale is None or grads[0].dtype == torch.float32:
        return None if scale is None else scale.float()
    for g in grads:
        g.div_(scale)
    return None


def _require_plain(p: Tensor) -> None:
    if torch.finfo(p.dtype).bits < 32:
        raise TypeError(
            f"params has a leaf of {p.dtype}, {tuple(p.shape)}; keep it in float32, so that small "
            "steps move it, and let the model compute in half precision"
        )
    if not p.is_contiguous():
        raise ValueError(
            f"params has a leaf {tuple(p.shape)} with strides {p.stride()}, which the kernel would "
            "misread; pass a copy, p.clone(memory_format=torch.contiguous_format)"
        )


def _owned(grads: Tree) -> Tree:
    """The gradients, each in memory that it has to itself.

    autograd may return one tensor for two leaves, as of f(a + b), or one number for a whole leaf.
    """
    seen: set[int] = set()

    def own(g: Tensor) -> Tensor:
        where = g.untyped_storage().data_ptr()
        mine = g.is_contiguous() and where not in seen
        seen.add(where)
        return g if mine else tree.own(g)

    return tree.map(own, grads)


def _alike(*trees: Tree) -> list[list[list[Tensor]]]:
    """The leaves of every tree, apart by device and dtype: a kernel takes those of one kind."""
    kinds: dict[Any, list[tuple[Tensor, ...]]] = {}
    tree.map(
        lambda *leaf: kinds.setdefault((leaf[0].device, leaf[0].dtype), []).append(leaf), *trees
    )
    return [[list(each) for each in zip(*leaves)] for leaves in kinds.values()]
