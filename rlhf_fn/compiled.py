"""The gradient of a compiled loss: one graph, whatever the number of rows and their length.

Forward and backward pass are compiled, the optimizer is not: `steps.donating_step` runs torch's
fused kernel, which no graph can hold.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.losses import Loss, Metrics
from rlhf_fn.models import Params
from rlhf_fn.prefix import Prefixed, is_shared
from rlhf_fn.steps import autograd_gradient


def compiled_gradient(
    loss: Loss, *, rows: int, time: int, backend: str | Callable = "inductor"
) -> Callable:
    """`autograd_gradient` of the `compiled_loss`, for `gradient_step` and `donating_step`."""
    return autograd_gradient(compiled_loss(loss, rows=rows, time=time, backend=backend))


def compiled_loss(
    loss: Loss, *, rows: int, time: int, backend: str | Callable = "inductor"
) -> Loss:
    """The loss as one graph, and its derivative by `autograd_gradient` as another.

    The first and the last axis of a batch's fields may change without another compilation, except
    from and to 1. What is compiled depends on no batch: a blank one of `rows` rows of `time` tokens
    goes first, by whose size the compiler arranges its loops. So a run that is resumed at any step
    computes the same bits, and if those sizes are the largest, memory runs out at once or never.
    Fields that are cut to what is asked about (`steps.of_asked`) are one token shorter there; rows
    that share a prompt (`steps.of_shared`) part in the middle.

    With `sharding.fully_sharded` the graph begins behind the gathering, and ends before gradients,
    whole until all are there, are scattered.

    Raises:
        TypeError, ValueError: `rows` and `time` are no integers above 1.
        RuntimeError: when called under a transform of `torch.func`.
    """
    checks.count(least=2, rows=rows, time=time)

    def without_graph(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Metrics]:
        total, metrics = loss(params, batch, key)
        return total, tree.stop(metrics)

    graph = torch.compile(without_graph, fullgraph=True, backend=backend)
    compiled: set[Any] = set()

    def of_any_size(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Metrics]:
        alone = _one_prefix(batch)
        free = [_free(x, alone) for x in tree.leaves(batch)]
        sizes = _sizes(batch, rows, time)
        kind = tuple(zip(map(_kind, tree.leaves(batch), free), sizes))
        if kind not in compiled:
            blank = map(_blank, tree.leaves(batch), free, sizes)
            with arranged_by(rows, time):
                blanks = _resizable(tree.filled(batch, blank), free)
                autograd_gradient(graph)(params, blanks, key)
            compiled.add(kind)
        return graph(params, _resizable(batch, free), key)

    return of_any_size


def arranged_by(*sizes: int) -> AbstractContextManager:
    """Where the compiler takes no code from its cache but what was compiled for these sizes.

    By itself it takes any of the same graph, whatever the sizes by which the loops were arranged,
    and so what a run computes would depend on what has been compiled on its machine before.
    """
    config: Any = torch.compiler.config
    return config.patch(cache_key_tag=" ".join([config.cache_key_tag, *map(str, sizes)]))


def _sizes(batch: Any, rows: int, time: int) -> list[tuple[int, int]]:
    """Rows and tokens of the fields of a blank batch; half of them before `Prefixed` rows part."""
    tokens, number = getattr(batch, "tokens", None), len(tree.leaves(batch))
    if not isinstance(tokens, Prefixed):
        return [(rows, time - _is_cut(x, tokens)) for x in tree.leaves(batch)]
    each = len(batch.weights) // len(tokens.prefix)  # rows to a prefix; a `DpoBatch` has one
    prefixes, before, after = max(rows // each, 2), max(time // 2, 2), max(time - time // 2, 2)
    read = [(prefixes, before), (prefixes, after)]  # the fields of tokens, of attention
    return [*read, *read, *[(prefixes * each, after)] * (number - len(read) * 2)]


def _is_cut(x: Tensor, tokens: Tensor | None) -> bool:
    """Whether a field begins later than the tokens do (`batches.asked`)."""
    return tokens is not None and x.ndim > 1 and x.shape[-1] < tokens.shape[-1]


def _one_prefix(batch: Any) -> bool:
    return is_shared(batch) and len(batch.tokens.prefix) == 1


def _free(x: Tensor, alone: bool) -> list[int]:
    """The axes whose size is left open: of rows, unless one prefix has them all, and of tokens."""
    axes = {0, x.ndim - 1} - ({0} if alone else set())
    return [axis for axis in sorted(axes) if x.ndim and x.shape[axis] > 1]


def _kind(x: Tensor, free: list[int]) -> Any:
    shape = tuple(None if axis in free else size for axis, size in enumerate(x.shape))
    return x.dtype, x.device, shape


def _blank(x: Tensor, free: list[int], size: tuple[int, int]) -> Tensor:
    shape = list(x.shape)
    for axis in free:
        shape[axis] = size[axis > 0]
    return torch.ones(shape, dtype=x.dtype, device=x.device)


def _resizable(batch: Any, free: list[list[int]]) -> Any:
    """Views of the fields, marked for the compiler."""
    views = [x.detach() for x in tree.leaves(batch)]
    for view, axes in zip(views, free):
        for axis in axes:
            torch._dynamo.mark_dynamic(view, axis)
    return tree.filled(batch, views)
