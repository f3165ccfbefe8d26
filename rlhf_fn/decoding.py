"""Reading a prompt once, then one token at a time: what sampling asks of a model.

Keys and values live in one buffer per layer, `[batch heads length width]`, written in place; a
layer attends to the part that is filled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fn import checks
from rlhf_fn.models import Params
from rlhf_fn.skeletons import (
    Skeleton,
    attention_mask,
    call,
    positions,
    require_causal_lm,
    short_enough,
    skeleton,
)

Cache = tuple[tuple[Tensor, Tensor], ...]  # (keys, values) of every layer


class Decoder(NamedTuple):
    """A language model that remembers. Its logits are those of `causal_lm`, without gradients.

    `prefill(params, tokens [batch prompt], attention [batch prompt], length) -> (logits, cache)`
    reads left-padded prompts. The logits `[batch vocab]` predict the token at index `prompt`;
    `length` is the room for prompt and answer together.

    `decode(params, tokens [batch], attention [batch filled], index, cache) -> (logits, cache)`
    reads the token at `index`, of which the first is `prompt`. `attention` speaks of all tokens so
    far, this one included; `filled` may be more than that, `index + 1`, and is False there. `index`
    is an int, or a 0-d tensor where one graph is to serve all. **The cache is donated**: it is
    written in place; use the one returned.
    """

    prefill: Callable[..., tuple[Tensor, Cache]]
    decode: Callable[..., tuple[Tensor, Cache]]


def decoder(module: PreTrainedModel) -> Decoder:
    """`Decoder(prefill, decode)` of a causal language model; its params are `causal_lm(module)`'s.

    Raises:
        TypeError: not a causal language model of transformers.
    """
    require_causal_lm(module)
    bare = skeleton(module)
    return Decoder(partial(_prefill, bare), partial(_decode, bare))


def _prefill(
    bare: Skeleton,
    params: Params,
    tokens: Int[Tensor, "batch prompt"],
    attention: Bool[Tensor, "batch prompt"],
    length: int,
) -> tuple[Float[Tensor, "batch vocab"], Cache]:
    checks.same_shape(tokens=tokens, attention=attention)
    checks.bool_mask(attention, name="attention")
    checks.token_ids(tokens, bare.vocab)
    prompt = tokens.shape[-1]
    checks.count(least=prompt, length=length)
    if length > bare.longest:
        short_enough(bare, F.pad(attention, (0, length - prompt), value=True))
    mask = attention_mask(attention, causal=True)
    return _read(bare, params, tokens, mask, positions(attention), _Filled([], 0, prompt, length))


def _decode(
    bare: Skeleton,
    params: Params,
    tokens: Int[Tensor, " batch"],
    attention: Bool[Tensor, "batch filled"],
    index: int | Int[Tensor, ""],
    cache: Cache,
) -> tuple[Float[Tensor, "batch vocab"], Cache]:
    columns = attention.shape[-1]
    if not isinstance(index, Tensor) and columns <= index:
        raise ValueError(
            f"attention has {columns} columns, expected at least index + 1 = {index + 1}: all "
            "tokens so far, with the one at index"
        )
    itself = torch.arange(columns, device=attention.device) == index
    mask = (attention | itself)[:, None, None, :]
    filled = _Filled(list(cache), index, columns, cache[0][0].shape[-2])
    return _read(bare, params, tokens[:, None], mask, positions(attention)[:, -1:], filled)


def _read(
    bare: Skeleton, params: Params, tokens: Tensor, mask: Tensor, where: Tensor, filled: "_Filled"
) -> tuple[Tensor, Cache]:
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": where + bare.offset,
        "past_key_values": filled,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    with torch.no_grad():
        logits = call(bare, params, inputs).logits
    return logits[:, -1], tuple(filled.layers)


class _Filled:
    """The buffers as an attention layer sees them: it writes from `start` on, reads [0, stop)."""

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], start: int | Tensor, stop: int, length: int
    ):
        self.layers, self.start, self.stop, self.length = layers, start, stop, length

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any):
        if layer == len(self.layers):
            self.layers.append((_room(keys, self.length), _room(values, self.length)))
        at, new = self.start, keys.shape[-2]
        here = at[None] if isinstance(at, Tensor) else slice(at, at + new)
        for buffer, read in zip(self.layers[layer], (keys, values)):
            buffer[:, :, here] = read
        return tuple(buffer[:, :, : self.stop] for buffer in self.layers[layer])

    def get_seq_length(self, layer: int = 0) -> int | Tensor:
        return self.start


def _room(x: Tensor, length: int) -> Tensor:
    return x.new_zeros(*x.shape[:2], length, x.shape[-1])
