"""Models with a head of their own: values, rewards, and an actor and a critic on one backbone.

Rewards and values have the same parameters (those of the backbone and `head.weight`), so a critic
starts from a reward model by taking its params. A head is linear without a bias, as transformers'
sequence classifiers have it, and starts at N(0, 1 / (width + 1)) (Stiennon et al. 2020,
https://arxiv.org/abs/2009.01325).
"""

import copy
from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_fn import random
from rlhf_fn.folders import load, save
from rlhf_fn.models import Functional, Params, Tokens, hidden_states, weights
from rlhf_fn.prefix import Prefixed, joined
from rlhf_fn.products import linear
from rlhf_fn.skeletons import is_causal, require_causal_lm, run, skeleton

HEAD, VALUE_HEAD = "head.weight", "value_head.weight"
Pool = Callable[[Tensor, Tensor], Tensor]


class ActorCritic(NamedTuple):
    """Raw logits, of the next token, and values, aligned with tokens."""

    logits: Float[Tensor, "*batch time vocab"]
    values: Float[Tensor, "*batch time"]


def last_token(
    hidden: Float[Tensor, "*batch time width"], attention: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch width"]:
    """hiddenₜ at the last token of the row, wherever the padding is; at 0 if it has none."""
    step = torch.arange(attention.shape[-1], device=attention.device)
    last = torch.where(attention, step, 0).amax(-1)
    index = last[..., None, None].expand(*last.shape, 1, hidden.shape[-1])
    return hidden.gather(-2, index).squeeze(-2)


def first_token(
    hidden: Float[Tensor, "*batch time width"], attention: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch width"]:
    """hiddenₜ at the first token of the row: an encoder's [CLS]."""
    return last_token(hidden.flip(-2), attention.flip(-1))


def mean_pool(
    hidden: Float[Tensor, "*batch time width"], attention: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch width"]:
    """Σₜ hiddenₜ / n over the n tokens of the row; 0 if it has none."""
    kept = torch.where(attention[..., None], hidden, 0.0).sum(-2)
    return kept / attention.sum(-1, keepdim=True).clamp(min=1)


def value_model(module: PreTrainedModel, key: Int64[Tensor, " 2"]) -> Functional:
    """V(state before tokenₜ): `apply(params, tokens, attention) -> values [*batch time]`.

    Vₜ = w · hiddenₜ₋₁,   V₀ = 0: nothing comes before the first token.

    `module` is a decoder, whose own head is left out.
    """
    _require_decoder(module, "value_model")
    score, params = token_reward(module, key)

    def apply(
        params: Params, tokens: Int[Tensor, "*batch time"], attention: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time"]:
        return _before(score(params, tokens, attention))

    return Functional(apply, params)


def token_reward(module: PreTrainedModel, key: Int64[Tensor, " 2"]) -> Functional:
    """A score of every prefix: `apply(params, tokens, attention) -> scores [*batch time]`.

    scoreₜ = w · hiddenₜ.   Position t has read token t: this one is not shifted.
    """
    states, params = hidden_states(module)

    def apply(
        params: Params, tokens: Int[Tensor, "*batch time"], attention: Bool[Tensor, "*batch time"]
    ) -> Float[Tensor, "*batch time"]:
        return _linear(*_states(states, params, tokens, attention))

    return Functional(apply, params | {HEAD: _fresh(module, key)})


def reward_model(
    module: PreTrainedModel, key: Int64[Tensor, " 2"], *, pool: Pool = last_token
) -> Functional:
    """A score of every row: `apply(params, tokens, attention) -> scores [*batch]`.

    score = w · pool(hidden, attention)

    `module` is a decoder or an encoder such as BERT; `pool(hidden, attention)` is `last_token`,
    `first_token`, `mean_pool` or your own. Rows may be `Prefixed`.
    """
    states, params = hidden_states(module)

    def apply(
        params: Params, tokens: Tokens, attention: Bool[Tensor, "*batch time"] | Prefixed
    ) -> Float[Tensor, "*batch"]:
        hidden, weight = _states(states, params, tokens, attention)
        return _linear(pool(hidden, joined(attention)), weight)

    return Functional(apply, params | {HEAD: _fresh(module, key)})


def actor_critic(module: PreTrainedModel, key: Int64[Tensor, " 2"]) -> Functional:
    """Both from one pass: `apply(params, tokens, attention) -> ActorCritic(logits, values)`.

    The parameters are those of `causal_lm(module)` and `value_head.weight`; `policy_params` are the
    first alone. Logits are raw and values aligned, as `causal_lm` and `value_model` give them.
    """
    require_causal_lm(module)
    bare = skeleton(module)
    bare.module.get_decoder().register_forward_hook(_pass_on_hidden)

    def apply(
        params: Params, tokens: Int[Tensor, "*batch time"], attention: Bool[Tensor, "*batch time"]
    ) -> ActorCritic:
        out = run(bare, policy_params(params), tokens, attention)
        logits, values = out.logits, _linear(out.hidden_states[-1], params[VALUE_HEAD])
        return ActorCritic(
            logits.reshape(*tokens.shape, logits.shape[-1]), _before(values.reshape(tokens.shape))
        )

    return Functional(apply, weights(module) | {VALUE_HEAD: _fresh(module, key)})


def policy_params(params: Params) -> Params:
    """The parameters of an `actor_critic` that `causal_lm` and `decoder` take."""
    return {name: p for name, p in params.items() if name != VALUE_HEAD}


def classifier(module: PreTrainedModel) -> Functional:
    """A trained sequence classifier with one label, as a reward: `apply -> scores [*batch]`.

    A decoder's has the parameters of `reward_model(…, pool=last_token)`; an encoder's keeps its own
    head (BERT's pooler and classifier) and its own names.

    Raises:
        ValueError: `module` has more than one label.
    """
    _one_label(module)
    if (head := getattr(module, "score", None)) is not None:
        apply, params = reward_model(module, random.key(0))
        return Functional(apply, params | {HEAD: head.weight.detach().clone()})
    bare = skeleton(module)

    def apply_encoder(
        params: Params, tokens: Tokens, attention: Bool[Tensor, "*batch time"] | Prefixed
    ) -> Float[Tensor, "*batch"]:
        tokens, attention = joined(tokens), joined(attention)
        front = (~attention).int().argsort(dim=-1, stable=True)  # its head reads position 0
        tokens, attention = tokens.gather(-1, front), attention.gather(-1, front)
        return run(bare, params, tokens, attention).logits.reshape(tokens.shape[:-1])

    return Functional(apply_encoder, weights(module))


def load_reward_model(path: str | PathLike[str]) -> PreTrainedModel:
    """The sequence classifier with one label saved at `path`, in float32, for `classifier`.

    Raises:
        OSError: there is no model at `path`, or none in safetensors.
        TypeError: transformers has no classifier for it.
        ValueError: it lacks weights (a policy has no score), or has more than one label.
    """
    module = load(AutoModelForSequenceClassification, path)
    _one_label(module)
    return module


def save_reward_model(
    module: PreTrainedModel, params: Params, directory: str | PathLike[str]
) -> None:
    """Write a reward so that `AutoModelForSequenceClassification.from_pretrained` gives its scores.

    `params` are of `reward_model(module, key, pool=last_token)` on a decoder, or of
    `classifier(module)`. Transformers takes the last token that is not `module.config.pad_token_id`
    as the end of a row.

    Raises:
        ValueError: `params` do not fit, or the config has no `pad_token_id`.
        TypeError: a `reward_model` on an encoder, which transformers has no class for.
    """
    if HEAD not in params:
        _one_label(module)
        return save(skeleton(module).module, params, directory)
    _require_decoder(module, "save_reward_model of a linear head")
    config = copy.deepcopy(module.config)
    config.num_labels = 1
    if config.pad_token_id is None:
        raise ValueError(
            "module.config has no pad_token_id, by which transformers finds the end of a row; set "
            "it to the tokenizer's, an id that no text ends with"
        )
    with torch.device("meta"):
        target = AutoModelForSequenceClassification.from_config(config, dtype=params[HEAD].dtype)
    prefix = target.base_model_prefix
    names = {name: f"{prefix}.{name}" for name in params} | {HEAD: "score.weight"}
    save(target, {names[name]: p for name, p in params.items()}, directory)


def _states(
    states: Callable[..., Tensor], params: Params, tokens: Tokens, attention: Tensor | Prefixed
) -> tuple[Tensor, Tensor]:
    """The hidden states and the head."""
    backbone = {name: p for name, p in params.items() if name != HEAD}
    return states(backbone, tokens, attention), params[HEAD]


def _pass_on_hidden(module: Any, inputs: Any, output: Any) -> Any:
    """Make the backbone's last hidden states part of the language model's own output."""
    output.hidden_states = (output.last_hidden_state,)
    return output


def _linear(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear(hidden, weight).squeeze(-1)


def _before(x: Tensor) -> Tensor:
    """What position t − 1 says, at t; 0 at the first."""
    return F.pad(x[..., :-1], (1, 0))


def _fresh(module: PreTrainedModel, key: Tensor) -> Tensor:
    config, like = module.config, next(module.parameters())
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return (random.normal(key, (1, width)) / (width + 1) ** 0.5).to(like)


def _require_decoder(module: PreTrainedModel, what: str) -> None:
    if not is_causal(module):
        raise TypeError(
            f"{what} needs a decoder, got {type(module).__name__}, whose states see the future"
        )


def _one_label(module: PreTrainedModel) -> None:
    if module.config.num_labels != 1:
        raise ValueError(
            f"module {type(module).__name__} has num_labels = {module.config.num_labels}, expected "
            "1: a reward is one number; pass num_labels=1 to AutoModelForSequenceClassification"
        )
