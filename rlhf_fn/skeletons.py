"""A transformers module without its weights, and how it is run on tokens and attention.

What `models.py`, `heads.py` and `decoding.py` build on: the 4-D mask and the positions are made
here, so every family computes the same whatever the padding.
"""

import copy
import inspect
import sys
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from rlhf_fn import checks, products
from rlhf_fn.turns import turn_starts

Params = dict[str, Tensor]
Attention = Bool[Tensor, "*batch time"] | Int[Tensor, "*batch time"]  # ints are segments
_SLIDING = "sliding_attention"


class Skeleton(NamedTuple):
    """A module without its weights (they are on the meta device), and what its inputs need."""

    module: PreTrainedModel
    names: frozenset[str]  # of its parameters, tied ones once
    tied: dict[str, str]  # the other names of tied ones
    vocab: int
    causal: bool  # a decoder; an encoder looks both ways
    longest: int  # real tokens in a row; a sliding window counts, as the mask made here has none
    offset: int  # where positions begin


def skeleton(module: PreTrainedModel) -> Skeleton:
    """Copy `module` without its weights, dropout off, attention through sdpa.

    Raises:
        TypeError: not a transformers model, or one that takes no positions or no sdpa attention.
    """
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"module must be a PreTrainedModel, got {type(module).__name__}")
    config, name = module.config, type(module).__name__
    takes = inspect.signature(module.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", _SLIDING}
    if "position_ids" not in takes or kinds or getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"module {name} takes no positions and 4-D mask from outside, by which padding "
            "changes nothing; use Llama, Qwen, GPT-2, GPT-NeoX, OPT, ... or an encoder such as BERT"
        )
    empty = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in module.parameters()}
    bare = copy.deepcopy(module, empty).eval()
    try:
        bare.set_attn_implementation(products.ATTENTION)
    except ValueError as error:
        raise TypeError(f"module {name} cannot attend through sdpa: {error}") from error
    products.use(bare)
    offset = _position_offset(bare)
    names = {p: name for name, p in bare.named_parameters()}
    every = bare.named_parameters(remove_duplicate=False)
    tied = {name: names[p] for name, p in every if name != names[p]}
    longest = _longest(config) - offset
    causal, canonical = is_causal(bare), frozenset(names.values())
    return Skeleton(bare, canonical, tied, config.vocab_size, causal, longest, offset)


def run(bare: Skeleton, params: Params, tokens: Tensor, attention: Tensor, **options: Any) -> Any:
    """The module's own output for these weights; its leading axes are flattened to one."""
    checks.same_shape(tokens=tokens, attention=attention)
    if attention.dtype != torch.bool:
        checks.integers(attention=attention)
    checks.token_ids(tokens, bare.vocab)
    rows = attention.reshape(-1, tokens.shape[-1])
    inputs = {
        "input_ids": tokens.reshape(rows.shape),
        "attention_mask": attention_mask(rows, causal=bare.causal),
        "position_ids": positions(rows) + bare.offset,
        "use_cache": False,
    }
    if rows.shape[-1] > bare.longest:
        short_enough(bare, rows)
    return call(bare, params, inputs | options)


def call(bare: Skeleton, params: Params, inputs: dict[str, Any]) -> Any:
    """The module's output for these weights, if they have its names, and for its own inputs."""
    require_params(bare, params)
    tied = {alias: params[name] for alias, name in bare.tied.items()}
    return functional_call(bare.module, params | tied, (), inputs, tie_weights=False)


def require_params(bare: Skeleton, params: Params) -> None:
    """Raise a `ValueError` unless `params` have the names of the module's."""
    if params.keys() != bare.names:
        wrong = sorted(params.keys() ^ bare.names)
        raise ValueError(
            f"params and {type(bare.module).__name__} differ in {', '.join(wrong[:3])}; pass what "
            "the same constructor made from the same module"
        )


def attention_mask(attention: Attention, *, causal: bool) -> Bool[Tensor, "*batch 1 time time"]:
    """Query q reads key k of its segment (if k ≤ q), or k = q, which keeps padding finite."""
    step = torch.arange(attention.shape[-1], device=attention.device)
    of_query, of_key = attention[:, None, :, None], attention[:, None, None, :]
    reads = (of_query == of_key) & (of_key != 0) & ((step <= step[:, None]) | (not causal))
    return reads | (step == step[:, None])


def positions(attention: Attention) -> Int[Tensor, "*batch time"]:
    """0, 1, 2, … over the tokens of each row, or of each of its segments, whatever its padding."""
    if attention.dtype == torch.bool:
        return (attention.cumsum(-1) - 1).clamp(min=0)
    real = attention != 0
    place = positions(real)
    starts = turn_starts(attention, real)
    return place - torch.where(starts, place, 0).cummax(-1).values


def is_causal(module: nn.Module) -> bool:
    """Whether the attention layers look back only: True of decoders, False of encoders."""
    return any(getattr(m, "is_causal", False) for m in module.modules())


def require_causal_lm(module: PreTrainedModel) -> None:
    """Raise a `TypeError` unless `module` is a decoder with a language-model head."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    if head is None or not is_causal(module):
        raise TypeError(
            f"expected a causal language model, got {type(module).__name__}; use one that "
            "AutoModelForCausalLM loads and that was trained to predict the next token"
        )


def short_enough(bare: Skeleton, attention: Tensor) -> None:
    """Raise a `ValueError` if a segment has more tokens than the model takes (or might)."""
    rows = attention.shape[-1]
    longest = int(positions(attention).max()) + 1 if checks.concrete(attention) else rows
    if longest > bare.longest:
        raise ValueError(
            f"tokens has a row of {longest}, but {type(bare.module).__name__} takes at most "
            f"{bare.longest} (its trained length or its attention window); shorten the rows"
        )


def _position_offset(module: nn.Module) -> int:
    """Where RoBERTa and its kin begin to count: after their padding index. 0 for all others."""
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    paddings = (getattr(table, "padding_idx", None) for table in tables)
    return max((p + 1 for p in paddings if p is not None), default=0)


def _longest(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None) or sys.maxsize
    kinds = getattr(config, "layer_types", None) or [_SLIDING]
    window = getattr(config, "sliding_window", None) if _SLIDING in kinds else None
    return min(length, window or length)
