"""Products of matrices in the order in which a CPU is fastest; on a GPU they are torch's own.

Half precision on a CPU without units for it is multiplied in float32 and rounded afterwards, as
such units do: torch's own products take many times as long there (`examples/benchmark_trl.py`). Few
rows are multiplied from the right, as BLAS copies its left factor before it begins
(`kernels/benchmarks/decode.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

ATTENTION = "rlhf_fn_sdpa"  # the name of `attention` in a config of transformers
_UNITS = {  # by their names in `torch.cpu.get_capabilities`, of x86 and of ARM
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
_known = getattr(torch.cpu, "get_capabilities", dict)()  # empty: nobody knows
_WIDENED = frozenset(x for x, units in _UNITS.items() if _known and not any(map(_known.get, units)))
_LARGE = 2**16  # numbers of a weight


def linear(
    x: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "out inner"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """y = x Wᵀ + b: `torch.nn.functional.linear`.

    Of one token a row, and of a large W on a CPU, it is (W xᵀ)ᵀ + b. Half precision on a CPU
    without units for it is rounded once, after b.
    """
    if _widened(x) and x.dtype == weight.dtype:
        wide = None if bias is None else bias.float()
        return linear(x.float(), weight.float(), wide).to(x.dtype)
    if x.ndim < 2 or x.shape[-2] > 1 or x.device.type != "cpu" or weight.numel() < _LARGE:
        return F.linear(x, weight, bias)
    out = (weight @ x.flatten(0, -2).mT).mT.contiguous().unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def attention(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention through sdpa, as layers of transformers call it."""
    if not _widened(query):
        return sdpa_attention_forward(layer, query, key, value, *rest, **options)
    wide = query.float(), key.float(), value.float()
    out, weights = sdpa_attention_forward(layer, *wide, *rest, **options)
    return out.to(query.dtype), weights


def use(module: nn.Module) -> None:
    """Let the linear layers of a module be `linear`. Their classes are replaced, in place."""
    for layer in module.modules():
        layer.__class__ = _OURS.get(type(layer), type(layer))


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Conv1D(Conv1D):
    """Its weight is stored the other way round: of few rows, too, torch's order is the faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not _widened(x):
            return super().forward(x)
        return F.linear(x.float(), self.weight.mT.float(), self.bias.float()).to(x.dtype)


def _widened(x: Tensor) -> bool:
    return x.dtype in _WIDENED and x.device.type == "cpu"


_OURS: dict[type, type] = {nn.Linear: _Linear, Conv1D: _Conv1D}
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
