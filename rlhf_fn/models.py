"""Transformers modules as functions: `apply(params, tokens, attention)`, and the one shift.

A module becomes two things: a skeleton without weights, which `apply` closes over, and its weights,
a flat `dict[str, Tensor]` of copies. They share no storage with the module, which stays as it was.

`attention` is bool, of the shape of `tokens`, True where there is a token; the padding may be left,
right, both or none. The 4-D mask and the positions are made here, so every family computes the same
whatever the padding, and `torch.func` and `torch.compile` compose (the mask that transformers makes
of a 2-D one fails under `vmap(grad)`). Padding attends to itself, which keeps it finite.
"""

import copy
import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fn import checks

Params = dict[str, Tensor]


class Functional(NamedTuple):
    """A function of parameters, and the parameters it starts from: detached copies."""

    apply: Callable[..., Any]
    params: Params


def frozen(params: Params) -> Params:
    """A detached copy that shares no storage: a reference that training cannot reach."""
    return {name: p.detach().clone() for name, p in params.items()}


def on_next_token(quantity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The one shift: a quantity of (logits, tokens), aligned with `tokens`.

    alignedₜ = quantity(logitsₜ₋₁, tokenₜ),   aligned₀ = 0: nothing predicts the first token.

    `quantity(logits [*batch time vocab], tokens [*batch time], **hyperparameters)` is per token.
    """

    def aligned(
        logits: Float[Tensor, "*batch time vocab"],
        tokens: Int[Tensor, "*batch time"],
        **hyperparameters: Any,
    ) -> Float[Tensor, "*batch time"]:
        checks.same_shape(logits=logits[..., 0], tokens=tokens)
        return F.pad(quantity(logits[..., :-1, :], tokens[..., 1:], **hyperparameters), (1, 0))

    return aligned


def causal_lm(module: PreTrainedModel) -> Functional:
    """A causal language model: `apply(params, tokens, attention) -> logits`.

    The logits are raw, those at position t predict token t + 1: `on_next_token` aligns. Dropout is
    off. Tied weights appear once. Leading axes are free.

    Raises:
        TypeError: not a causal language model of transformers, or one that takes no 4-D mask.
    """
    require_causal_lm(module)
    bare = skeleton(module)

    def apply(
        params: Params, tokens: Int[Tensor, "*batch time"], attention: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time vocab"]:
        logits = run(bare, params, tokens, attention).logits
        return logits.reshape(*tokens.shape, logits.shape[-1])

    return Functional(apply, weights(module))


def hidden_states(module: PreTrainedModel) -> Functional:
    """The last hidden states, after the last norm, of a decoder or of an encoder such as BERT.

    `apply(params, tokens, attention) -> [*batch time width]`; a head of the module, if any, is left out.
    """
    base = module.base_model
    bare = skeleton(base)

    def apply(
        params: Params, tokens: Int[Tensor, "*batch time"], attention: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time width"]:
        hidden = run(bare, params, tokens, attention).last_hidden_state
        return hidden.reshape(*tokens.shape, hidden.shape[-1])

    return Functional(apply, weights(base))


def load_causal_lm(path: str | PathLike[str]) -> PreTrainedModel:
    """The causal language model saved at `path`, in float32. Only safetensors are read, never a pickle.

    Raises:
        OSError: there is no model at `path`, or none in safetensors.
        TypeError: the model there is not a causal language model.
        ValueError: the checkpoint lacks weights, which transformers would have drawn at random.
    """
    module = load(AutoModelForCausalLM, path)
    require_causal_lm(module)
    return module


def save_policy(module: PreTrainedModel, params: Params, directory: str | PathLike[str]) -> None:
    """Write `params` of `causal_lm(module)` so that `AutoModelForCausalLM.from_pretrained` reads them.

    Raises:
        ValueError: `params` are not the parameters of `module`.
    """
    bare = skeleton(module)
    _same_names(params, dict(bare.named_parameters()))
    save(bare, params, directory)


def check_vocab(tokenizer: Any, module: PreTrainedModel) -> None:
    """Raise a `ValueError` unless every id the tokenizer can write, padding included, is one of the model's.

    A model may have more ids than its tokenizer: tables are padded to round sizes.
    """
    rows, highest = module.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"tokenizer writes ids up to {highest} but module embeds only [0, {rows}); use the tokenizer saved "
            f"with the model, or call module.resize_token_embeddings({highest + 1}) first"
        )
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(
                f"tokenizer has no {name}; set tokenizer.{name} to a token of its vocabulary"
            )


# What heads.py and decoding.py also build on.


def skeleton(module: PreTrainedModel) -> PreTrainedModel:
    """A copy of `module` without its weights (they are on the meta device): no dropout, sdpa attention.

    Raises:
        TypeError: not a transformers model, or one that does not take positions or sdpa attention.
    """
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"module must be a transformers PreTrainedModel, got {type(module).__name__}")
    if "position_ids" not in inspect.signature(module.forward).parameters or module.config.is_encoder_decoder:
        raise TypeError(
            f"module {type(module).__name__} takes no position_ids, so padding would change what it computes; "
            "use a decoder such as Llama, Qwen, GPT-2, GPT-NeoX or OPT, or an encoder such as BERT"
        )
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
    bare = copy.deepcopy(module, empty).eval()
    try:
        bare.set_attn_implementation("sdpa")
    except ValueError as error:
        raise TypeError(f"module {type(module).__name__} cannot attend through sdpa: {error}") from error
    return bare


def weights(module: nn.Module) -> Params:
    """The parameters as `named_parameters` gives them: tied ones once, detached, copied."""
    return frozen(dict(module.named_parameters()))


def run(bare: PreTrainedModel, params: Params, tokens: Tensor, attention: Tensor, **options: Any) -> Any:
    """The module's own output for these weights, its leading axes flattened to one.

    Raises:
        TypeError: `attention` is not bool or `tokens` are not integers.
        ValueError: shapes differ, ids are outside of the vocabulary, or a row is too long for the model.
    """
    checks.same_shape(tokens=tokens, attention=attention)
    checks.bool_mask(attention, name="attention")
    checks.token_ids(tokens, bare.get_input_embeddings().num_embeddings)
    time = tokens.shape[-1]
    real = attention.reshape(-1, time)
    where = positions(real)
    _short_enough(bare, where, time)
    inputs = {
        "input_ids": tokens.reshape(-1, time),
        "attention_mask": attention_mask(real, causal=is_causal(bare)),
        "position_ids": where + position_offset(bare),
    }
    return functional_call(bare, params, (), {"use_cache": False} | inputs | options)


def attention_mask(
    attention: Bool[Tensor, "batch time"], *, causal: bool
) -> Bool[Tensor, "batch 1 time time"]:
    """Whether query q may read key k: k is a token (and k ≤ q), or k = q, which keeps padding finite."""
    step = torch.arange(attention.shape[-1], device=attention.device)
    allowed = attention[:, None, None, :]
    allowed = allowed & (step <= step[:, None]) if causal else allowed
    return allowed | (step == step[:, None])


def positions(attention: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """0, 1, 2, … over the tokens of each row, whatever its padding."""
    return (attention.cumsum(-1) - 1).clamp(min=0)


def position_offset(module: PreTrainedModel) -> int:
    """Where RoBERTa and its kin begin to count: after their padding index. 0 for all others."""
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    paddings = (getattr(table, "padding_idx", None) for table in tables)
    return max((p + 1 for p in paddings if p is not None), default=0)


def is_causal(module: nn.Module) -> bool:
    """Whether the attention layers look back only: True for decoders, False for encoders."""
    return any(getattr(m, "is_causal", False) for m in module.modules())


def require_causal_lm(module: PreTrainedModel) -> None:
    """Raise a `TypeError` unless `module` is a decoder with a language-model head."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    if head is None or not is_causal(module):
        raise TypeError(
            f"expected a causal language model, got {type(module).__name__}; "
            "use one that AutoModelForCausalLM loads and that was trained to predict the next token"
        )


def load(auto: Any, path: str | PathLike[str]) -> PreTrainedModel:
    """`auto.from_pretrained(path)` in float32, from safetensors, without weights drawn at random."""
    try:
        module, info = auto.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except ValueError as error:
        raise TypeError(f"{path}: {auto.__name__} cannot load this model: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} has no weights for {', '.join(missing)}, which would be drawn at random; "
            f"expected what a model of class {type(module).__name__} saves"
        )
    return module.eval()


def save(bare: PreTrainedModel, params: Params, directory: str | PathLike[str]) -> None:
    """Write `params` in the format of the skeleton's class, as safetensors."""
    aliases = {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    buffers = {name: x for name, x in bare.state_dict().items() if name not in aliases}
    bare.save_pretrained(directory, state_dict=buffers | {n: p.detach().contiguous() for n, p in params.items()})
