"""Log-probs where every rank has some tokens of the vocabulary: rows of the weight, and its bias.

With L_r = log Σ_v e^{z_v} and H_r over the tokens of rank r, and its share q_r = e^{L_r − L},

L = log Σ_r e^{L_r},   log π(y) = z_y − L,   H = Σ_r q_r (H_r − log q_r)

1 − π is summed of what is not y, so that log π = log(1 − (1 − π)) keeps its digits where π → 1.
https://arxiv.org/abs/1909.08053 (vocabulary-parallel cross-entropy)
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

from rlhf_kernels import linear
from rlhf_kernels.logprobs import Statistics


def vocab_parallel_token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *, first: int,
    group: Any = None, temperature: float | Tensor = 1.0, softcap: float | None = None,
    memory: int = 2**28,
) -> Statistics:  # fmt: skip
    """`linear_token_logprobs_and_entropy` of a weight whose rows are split over ranks.

    Every rank of `group` calls it, with the same hidden, tokens and upstream gradient, and gets the
    same numbers: the gradient of hidden whole, those of its own weight and bias. Numbers of a row
    are exchanged, no logits. A token that no rank has makes its row NaN.

    First derivatives alone, by `backward()` or `torch.autograd.grad`: what ranks exchange is seen
    by no transform.

    Args:
        weight: `[vocab of this rank, width]`; ranks may have different numbers of tokens, not none.
        tokens: ids in the whole vocabulary.
        first: the id of this rank's first token.
        group: of `torch.distributed`; None is everyone.

    Raises: as `linear_token_logprobs`; NotImplementedError under `torch.func`, in forward mode
    and for second derivatives.
    """
    _check_first_order(
        peek_interpreter_stack() is not None or any(map(_has_tangent, (hidden, weight, bias)))
    )
    mine = (tokens >= first) & (tokens < first + len(weight))
    local = torch.where(mine, tokens - first, 0)
    hidden = _Shared.apply(hidden, group)
    own = linear.statistics(hidden, weight, local, bias, temperature, softcap, memory, True)
    return Statistics(*_Merged.apply(*own, mine, group))


def _check_first_order(transformed: bool) -> None:
    if transformed and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "vocab_parallel_token_logprobs_and_entropy has first derivatives by backward() alone: "
            "torch.func, forward mode and create_graph=True cannot follow what ranks exchange; use "
            "torch.autograd.grad, or linear_token_logprobs_and_entropy with the whole weight"
        )


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and unpack_dual(x, level=0).tangent is not None


class _Shared(torch.autograd.Function):
    """What all ranks use: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(g, ctx.group), None


class _Merged(torch.autograd.Function):
    """(log π, H) of every rank's (log π and H among its tokens, z of one of them)."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor, logit: Tensor, mine: Tensor, group: Any):
        own = torch.stack([torch.where(mine, logit, 0.0), mine.to(logit.dtype)])
        chosen, owners = _sum(own, group)
        chosen = torch.where(owners == 1, chosen, torch.nan)
        part = logit - logp  # L_r
        top = _reduce(part, group, "MAX")
        total = top + _sum((part - top).exp(), group).log()
        log_share = part - total
        share = log_share.exp()
        gain = entropy - log_share
        others = torch.where(mine, 0.0, share)  # what other ranks have beside the one that has y
        rest = torch.where(mine, -share * logp.expm1(), share)
        others, rest, merged = _sum(torch.stack([others, rest, share * gain]), group)
        ctx.save_for_backward(mine, share, others, share * (gain - merged))
        return torch.where(rest < 0.5, (-rest).log1p(), chosen - total) + 0 * chosen, merged

    @staticmethod
    def backward(ctx: Any, g: Tensor, gh: Tensor):  # type: ignore[override]
        _check_first_order(torch.is_grad_enabled())
        mine, share, others, moves = ctx.saved_tensors
        of_logit = g * torch.where(mine, others, -share) + gh * moves
        return g * share - gh * moves, gh * share, of_logit, None, None


def _sum(x: Tensor, group: Any) -> Tensor:
    return _reduce(x, group, "SUM")


def _reduce(x: Tensor, group: Any, operation: str) -> Tensor:
    import torch.distributed as dist  # not every build of torch has it

    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, getattr(dist.ReduceOp, operation), group)
    return x
