"""The gradient of a compiled loss: one graph, whatever the number of rows and their length.

Forward and backward pass are compiled, the optimizer is not: `steps.donating_step` runs torch's
fused kernel, which no graph can hold.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.losses import Loss, Metrics
from rlhf_fn.models import Params
from rlhf_fn.steps import autograd_gradient


def compiled_gradient(
    loss: Loss, *, rows: int, time: int, backend: str | Callable = "inductor"
) -> Callable:
    """`autograd_gradient` of the compiled loss, for `gradient_step` and `donating_step`.

    The first and the last axis of a batch's fields may change without another compilation, except
    from and to 1. What is compiled depends on no batch: a blank one of `rows` rows of `time` tokens
    goes first, by whose size the compiler arranges its loops. So a run that is resumed at any step
    computes the same bits, and if those sizes are the largest, memory runs out at once or never.
    """
    checks.count(least=2, rows=rows, time=time)

    def without_graph(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Metrics]:
        total, metrics = loss(params, batch, key)
        return total, tree.stop(metrics)

    gradient = autograd_gradient(torch.compile(without_graph, fullgraph=True, backend=backend))
    compiled: set[Any] = set()

    def of_any_size(params: Params, batch: Any, key: Tensor) -> Any:
        kind = tuple(_kind(x) for x in tree.leaves(batch))
        if kind not in compiled:
            blank = tree.map(partial(_blank, rows=rows, time=time), batch)
            gradient(params, tree.map(_resizable, blank), key)
            compiled.add(kind)
        return gradient(params, tree.map(_resizable, batch), key)

    return of_any_size


def _free(x: Tensor) -> list[int]:
    """The axes whose size is left open: of rows, and of tokens."""
    return [axis for axis in sorted({0, x.ndim - 1}) if x.ndim and x.shape[axis] > 1]


def _kind(x: Tensor) -> Any:
    shape = tuple(None if axis in _free(x) else size for axis, size in enumerate(x.shape))
    return x.dtype, x.device, shape


def _blank(x: Tensor, rows: int, time: int) -> Tensor:
    shape = list(x.shape)
    for axis in _free(x):
        shape[axis] = time if axis else rows
    return torch.ones(shape, dtype=x.dtype, device=x.device)


def _resizable(x: Tensor) -> Tensor:
    """A view of `x`, marked for the compiler."""
    view = x.detach()
    for axis in _free(x):
        torch._dynamo.mark_dynamic(view, axis)
    return view
