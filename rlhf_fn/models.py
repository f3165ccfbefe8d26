"""Transformers modules as functions: `apply(params, tokens, attention)`, and the one shift.

A module becomes two things: a skeleton without weights, which `apply` closes over, and its weights,
a flat `dict[str, Tensor]` of copies. They share no storage with the module, which stays as it was.

`attention` is bool, of the shape of `tokens`, True where there is a token; the padding may be left,
right, both or none. The 4-D mask and the positions are made here, so every family computes the same
whatever the padding, and `torch.func` and `torch.compile` compose (the mask that transformers makes
of a 2-D one fails under `vmap(grad)`). Padding attends to itself, which keeps it finite.

In the place of `attention` may stand the integer segments of packed rows (`packing.py`): 0 where
there is padding, and tokens of one segment see no other, as if each had a row of its own. Rows that
begin alike may stand there as two `Prefixed` (`prefix.py`): what they share is read once.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fn import checks, tree
from rlhf_fn.folders import load, save
from rlhf_fn.prefix import Prefixed, each_of, joined
from rlhf_fn.skeletons import (
    Attention,
    Params,
    Skeleton,
    attention_mask,
    call,
    positions,
    require_causal_lm,
    run,
    short_enough,
    skeleton,
)

Tokens = Int[Tensor, "*batch time"] | Prefixed


class Functional(NamedTuple):
    """A function of parameters, and the parameters it starts from: detached copies."""

    apply: Callable[..., Any]
    params: Params


class Projection(NamedTuple):
    """Logits that nobody computes, hidden @ weightᵀ + bias: what `projection.py` is about."""

    hidden: Float[Tensor, "*batch time width"]
    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None


def frozen(params: Params) -> Params:
    """A detached copy that shares no storage: a reference that training cannot reach."""
    return {name: tree.own(p.detach()) for name, p in params.items()}


def on_next_token(quantity: Callable[..., Any]) -> Callable[..., Any]:
    """The one shift: a quantity of (logits, tokens), or a tuple of them, aligned with `tokens`.

    alignedₜ = quantity(logitsₜ₋₁, tokenₜ),   aligned₀ = 0: nothing predicts the first token.

    `quantity(logits [*batch time vocab], tokens [*batch time], **hyperparameters)` is per token; a
    `Projection` may take the place of the logits. Of the tokens there may be the last ones alone:
    then only these are asked about, and aligned with.
    """

    def aligned(
        logits: Float[Tensor, "*batch time vocab"] | Projection,
        tokens: Int[Tensor, "*batch last"],
        **hyperparameters: Any,
    ) -> Any:
        rows = logits.hidden if isinstance(logits, Projection) else logits
        time, last = rows.shape[-2], tokens.shape[-1]
        checks.same_shape(logits=rows[..., max(time - last, 0) :, 0], tokens=tokens)
        first = int(last == time)  # of the tokens, that some token comes before
        before = rows[..., time - last + first - 1 : -1, :]
        given = logits._replace(hidden=before) if isinstance(logits, Projection) else before
        out = quantity(given, tokens[..., first:], **hyperparameters)
        return tree.map(lambda x: F.pad(x, (first, 0)), out)

    return aligned


def causal_lm(module: PreTrainedModel) -> Functional:
    """A causal language model: `apply(params, tokens, attention) -> logits`.

    The logits are raw, those at position t predict token t + 1: `on_next_token` aligns. Dropout is
    off. Tied weights appear once. Leading axes are free. Move the module to its device first.

    Raises:
        TypeError: not a causal language model of transformers, or one that takes no 4-D mask.
    """
    require_causal_lm(module)
    bare = skeleton(module)

    def apply(
        params: Params, tokens: Tokens, attention: Attention | Prefixed
    ) -> Float[Tensor, "*batch time vocab"]:
        return logits(bare, params, tokens, attention)

    return Functional(apply, weights(module))


def hidden_states(module: PreTrainedModel) -> Functional:
    """The last hidden states, after the last norm, of a decoder or of an encoder such as BERT.

    `apply(params, tokens, attention) -> [*batch time width]`; a head of the module is left out. Of
    `Prefixed` tokens they are those of whole rows. An encoder, whose prompts see the answers, reads
    them as such.
    """
    base = cast(PreTrainedModel, module.base_model)
    bare = skeleton(base)

    def apply(
        params: Params, tokens: Tokens, attention: Attention | Prefixed
    ) -> Float[Tensor, "*batch time width"]:
        if not bare.causal:
            tokens, attention = joined(tokens), joined(attention)
        return _read(bare, params, tokens, attention, "last_hidden_state")

    return Functional(apply, weights(base))


def load_causal_lm(
    path: str | PathLike[str], *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The causal language model saved at `path`, in `dtype`; only safetensors are read, no pickle.

    Raises:
        OSError: there is no model at `path`, or none in safetensors.
        TypeError: the model there is not a causal language model.
        ValueError: the checkpoint lacks weights, which transformers would have drawn at random.
    """
    module = load(AutoModelForCausalLM, path, dtype=dtype)
    require_causal_lm(module)
    return module


def save_policy(module: PreTrainedModel, params: Params, directory: str | PathLike[str]) -> None:
    """Write `params` of `causal_lm(module)` for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: `params` are not the parameters of `module`.
    """
    save(skeleton(module).module, params, directory)


def check_vocab(tokenizer: Any, module: PreTrainedModel) -> None:
    """Raise a `ValueError` unless the model embeds every id that the tokenizer can write.

    A model may have more ids than its tokenizer: tables are padded to round sizes.
    """
    rows, highest = module.config.vocab_size, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"tokenizer writes ids up to {highest} but module embeds only [0, {rows}); use the "
            f"tokenizer saved with it, or module.resize_token_embeddings({highest + 1}) first"
        )


def weights(module: nn.Module) -> Params:
    """The parameters as `named_parameters` gives them: tied ones once, detached, copied."""
    return frozen(dict(module.named_parameters()))


def logits(
    bare: Skeleton, params: Params, tokens: Tokens, attention: Attention | Prefixed
) -> Float[Tensor, "*batch time vocab"]:
    """The module's logits; of `Prefixed` tokens those of `[rows 1+rest]` positions."""
    return _read(bare, params, tokens, attention, "logits", logits_to_keep=1)


def _read(
    bare: Skeleton,
    params: Params,
    tokens: Tokens,
    attention: Attention | Prefixed,
    what: str,
    **of_prefix: Any,
) -> Float[Tensor, "*batch time size"]:
    """That field of the module's output. `of_prefix` is asked of prefixes alone."""
    if isinstance(tokens, Prefixed) and isinstance(attention, Prefixed):
        return _after_prefix(bare, params, tokens, attention, what, of_prefix)
    if isinstance(tokens, Prefixed) or isinstance(attention, Prefixed):
        raise TypeError(
            "tokens and attention: only one of them is Prefixed; make both by prefix.with_prefix"
        )
    out = run(bare, params, tokens, attention)[what]
    return out.reshape(*tokens.shape, out.shape[-1])


def _after_prefix(
    bare: Skeleton,
    params: Params,
    tokens: Prefixed,
    attention: Prefixed,
    what: str,
    of_prefix: dict[str, Any],
) -> Float[Tensor, "rows last size"]:
    """Each prefix is read once; what comes after it attends to the keys and values of that."""
    checks.same_shape(tokens=tokens.rest, attention=attention.rest)
    width, group = tokens.prefix.shape[-1], tokens.rest.shape[1]
    whole = joined(attention)
    if whole.shape[-1] > bare.longest:
        short_enough(bare, whole)
    kept, (first, rest) = _Kept(), _embedded(bare, params, tokens)
    of_prefix = of_prefix | {"past_key_values": kept, "use_cache": True}
    of_prefix |= {"input_ids": None, "inputs_embeds": first}
    before = run(bare, params, tokens.prefix, attention.prefix, **of_prefix)[what]
    inputs = {
        "inputs_embeds": rest,
        "attention_mask": attention_mask(whole, causal=True)[:, :, width:],
        "position_ids": positions(whole)[:, width:] + bare.offset,
        "past_key_values": _After(kept, group),
        "use_cache": True,
    }
    return torch.cat([each_of(before, group), call(bare, params, inputs)[what]], 1)


def _embedded(bare: Skeleton, params: Params, tokens: Prefixed) -> tuple[Tensor, Tensor]:
    """Of the prefixes and of the rows after them: one lookup, so the table has one gradient."""
    table = bare.module.get_input_embeddings()
    name = next(name for name, m in bare.module.named_modules() if m is table)
    own = {leaf: params[f"{name}.{leaf}"] for leaf, _ in table.named_parameters()}
    ids = tokens.prefix.flatten(), tokens.rows.flatten()
    for part, each in zip(tokens._fields, tokens):
        checks.token_ids(each, bare.vocab, name=f"tokens.{part}")
    first, rest = functional_call(table, own, (torch.cat(ids),)).split([len(x) for x in ids])
    return first.unflatten(0, tokens.prefix.shape), rest.unflatten(0, tokens.rows.shape)


class _Kept:
    """The keys and values of prefixes, as attention layers see them."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any):
        self.layers[layer] = keys, values  # once more where activations are computed again
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class _After(NamedTuple):
    """What comes after prefixes attends to theirs and to its own."""

    kept: _Kept
    group: int

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any):
        before = (each_of(x, self.group) for x in self.kept.layers[layer])
        return tuple(torch.cat(both, -2) for both in zip(before, (keys, values)))

    def get_seq_length(self, layer: int = 0) -> int:
        return self.kept.layers[layer][0].shape[-2]
