"""Products of matrices in the order in which a CPU is fastest; on a GPU they are torch's own.

Half precision on a CPU without units for it is multiplied in float32 and rounded afterwards, as
such units do: torch's own products take many times as long there (`examples/benchmark_trl.py`).
Attention is so also where the units are of vectors and not of matrices, as in AVX-512: a query by
itself and short rows take longer in them. Few rows are multiplied from the right, as BLAS copies
its left factor before it begins (`kernels/benchmarks/decode.py`).
"""

from collections.abc import Callable
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
_LARGE = 2**16  # numbers of a weight

# by their names in `torch.cpu.get_capabilities`, of x86 and of ARM
_VECTORS = {torch.bfloat16: ("avx512_bf16",), torch.float16: ("avx512_fp16",)}
_MATRICES = {torch.bfloat16: ("amx_bf16", "bf16"), torch.float16: ("amx_fp16", "fp16_arith")}


def _without(*units: dict[torch.dtype, tuple[str, ...]]) -> frozenset[torch.dtype]:
    """The dtypes for which this CPU has none of the units, as far as torch knows."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    has = {x: any(known.get(unit) for kind in units for unit in kind[x]) for x in units[0]}
    return frozenset(x for x in has if known and not has[x])


_WIDENED, _WIDELY_ATTENDED = _without(_VECTORS, _MATRICES), _without(_MATRICES)


def linear(
    x: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "out inner"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """y = x Wᵀ + b: `torch.nn.functional.linear`.

    Of one token a row, and of a large W on a CPU, it is (W xᵀ)ᵀ + b. Half precision on a CPU
    without units for it is rounded once, after b.
    """
    if _on_cpu(x, _WIDENED) and x.dtype == weight.dtype:
        return _rounded(linear, x, weight, bias)
    if x.ndim < 2 or x.shape[-2] > 1 or x.device.type != "cpu" or weight.numel() < _LARGE:
        return F.linear(x, weight, bias)
    out = (weight @ x.flatten(0, -2).mT).mT.contiguous().unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def attention(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention through sdpa, as layers of transformers call it.

    Half precision on a CPU without matrix units for it is rounded once, after the mean of values.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention_forward(layer, query, key, value, *rest, **options)[0]

    given = query, key, value
    return _rounded(attend, *given) if _on_cpu(query, _WIDELY_ATTENDED) else attend(*given), None


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
        if not _on_cpu(x, _WIDENED):
            return super().forward(x)
        return _rounded(F.linear, x, self.weight.mT, self.bias)


def _on_cpu(x: Tensor, dtypes: frozenset[torch.dtype]) -> bool:
    return x.dtype in dtypes and x.device.type == "cpu"


def _rounded(product: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
    """The product in float32, rounded to the dtype of what is given."""
    wide = (None if x is None else x.float() for x in given)
    return product(*wide).to(given[0].dtype)  # type: ignore[union-attr]


_OURS: dict[type, type] = {nn.Linear: _Linear, Conv1D: _Conv1D}
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
