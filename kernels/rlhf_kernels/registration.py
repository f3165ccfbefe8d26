"""One operator per kernel, right under backward, torch.func, forward mode, vmap and torch.compile.

An `autograd.Function` does not compile under `torch.func.grad` (torch drops its backward, silently)
and `torch.library.custom_op` answers forward mode with zeros. Here the *Autograd* kernel of an
operator is a single level of differentiation, which is what functorch asks of its own built-ins:
every level of every transform sees the operator and nothing else, as in
https://github.com/pytorch/pytorch/pull/184974

What kernels do not compute (forward mode, second derivatives, a gradient that has no kernel) is
derived from `reference`: the same quantity in plain torch, at the memory that plain torch takes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import _SingleLevelFunction
from torch.func import vjp

LIBRARY = torch.library.Library("rlhf_kernels", "DEF")  # lives as long as the module


def operator(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register `kernel` as `rlhf_kernels::<schema>` on CPU and CUDA; it has no derivatives yet.

    All tensors of a call have the same leading axes, any number of them: that is its vmap rule.
    `fake(*args)` makes empty outputs.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.rlhf_kernels, name).default
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"rlhf_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"rlhf_kernels::{name}", _batch_rule(op), lib=LIBRARY)
    return op


def differentiable(
    op: Callable,
    reference: Callable,
    gradients: Mapping[int | tuple[int, ...], Callable] | None = None,
    *,
    hints: int = 0,
) -> Callable:
    """Give `op` its derivatives and return it.

    Args:
        reference: its outputs but the hints, of the same arguments, in differentiable torch.
        gradients: for argument i the function (arguments, outputs, upstream) -> gradient that
            calls a kernel. It may call operators made here, never a kernel itself. For arguments
            (i, j, ...) that one kernel serves, the function (arguments, outputs, upstream, those of
            them that are wanted) -> a gradient for each, of which the others are not read.
        hints: how many of the last outputs are not part of the result but kept for `gradients`.
    """
    level = _level(op, reference, gradients or {}, hints)

    def autograd(*args: Any) -> Any:
        if any(isinstance(x, Tensor) and unpack_dual(x, level=0).tangent is not None for x in args):
            outputs = reference(*args)
            if not hints:
                return outputs
            # whoever reads a hint has the dual arguments too, and comes by here
            return (*_tuple(outputs), *[torch.zeros_like(outputs[0])] * hints)
        if not torch.is_grad_enabled() or not any(map(_requires_grad, args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        with enable_single_level_autograd_function():
            return level.apply(*args)

    LIBRARY.impl(level.__name__, autograd, "Autograd")
    return op


def _level(
    op: Callable, reference: Callable, gradients: Mapping, hints: int
) -> type[_SingleLevelFunction]:
    """One level of reverse mode over `op`."""

    def forward(ctx: Any, *args: Any) -> Any:
        # both modes are off in here, and the outer levels of a nested transform need them
        both = torch.enable_grad(), _set_fwd_grad_enabled(True)
        with both[0], both[1], torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
        each = _tuple(outputs)
        ctx.mark_non_differentiable(*each[len(each) - hints :])
        ctx.set_materialize_grads(False)  # a hint may be large, and so would be its zeros
        ctx.constants = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args), *each)
        return outputs

    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.constants)
        args = [c if t is None else t for c, t in zip(ctx.constants, saved)]
        results = saved[count : len(saved) - hints]
        upstream = [torch.zeros_like(x) if g is None else g for g, x in zip(upstream, results)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        grads = {i: gradients[i](args, saved[count:], upstream) for i in wanted if i in gradients}
        for joint in (key for key in gradients if isinstance(key, tuple)):
            if asked := [i for i in joint if i in wanted]:
                grads |= zip(joint, gradients[joint](args, saved[count:], upstream, asked))
        if others := [i for i in wanted if i not in grads]:
            grads |= zip(others, _pull(reference, args, others, upstream))
        return tuple(grads[i] if i in wanted else None for i in range(count))

    rules = {"forward": forward, "backward": backward, "vmap": _batch_rule(op)}
    name = op._schema.name.split("::")[1]
    return type(name, (_SingleLevelFunction,), {k: staticmethod(rule) for k, rule in rules.items()})


def _pull(
    reference: Callable, args: Sequence[Any], wanted: Sequence[int], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of `reference` in the wanted arguments."""

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(wanted, xs))
        return _tuple(reference(*(replaced.get(i, x) for i, x in enumerate(args))))

    return vjp(function, *(args[i] for i in wanted))[1](tuple(upstream))


def _batch_rule(op: Callable) -> Callable:
    def batch(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def front(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

        outputs = op(*(front(x, dim) for x, dim in zip(args, in_dims)))
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0

    return batch


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
