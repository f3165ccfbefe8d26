"""Models and tokenizers as the commands want them: whole, of one vocabulary, and long enough."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf_fn import data, random
from rlhf_fn.config import ConfigError
from rlhf_fn.errors import TokenizerError
from rlhf_fn.folders import load, saved_dtype
from rlhf_fn.heads import classifier, last_token, load_reward_model, mean_pool, reward_model
from rlhf_fn.models import Functional, check_vocab, load_causal_lm
from rlhf_fn.skeletons import skeleton

CPU = torch.device("cpu")
POOLS = {"last": last_token, "mean": mean_pool}


def on(module: PreTrainedModel, device: torch.device, *, sliced: bool = False) -> PreTrainedModel:
    """The module, moved there; where its parameters will be in slices, without them."""
    if not sliced:
        return cast(PreTrainedModel, nn.Module.to(module, device))
    buffers = module._apply(lambda x: x if isinstance(x, nn.Parameter) else x.to(device))
    return cast(PreTrainedModel, buffers)


class Policy(NamedTuple):
    module: PreTrainedModel
    tokenizer: Any
    encoder: data.Encoder
    stop: tuple[int, ...]


class Scorer(NamedTuple):
    """A reward model as a function, and its module, without weights."""

    module: PreTrainedModel
    scores: Functional


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path`, which pads with its end of sequence where it has no pad token.

    Raises:
        TokenizerError: there is none that can be read, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise TokenizerError(
            f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error}); "
            "expected the tokenizer.json that was saved with the model"
        ) from error
    data.encoder(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(path: str, device: torch.device = CPU, *, sliced: bool = False) -> Policy:
    """A causal LM, its tokenizer, and every token that ends its generations; moved as `on` does.

    In float32, but its parameters as they are in the files where they will be in slices: these stay
    on the disk, in the pages that all ranks of a machine share, until they are read.
    """
    module = _as_saved(path) if sliced else load_causal_lm(path)
    module, tokenizer = on(module, device, sliced=sliced), load_tokenizer(path)
    check_vocab(tokenizer, module)
    ends = module.generation_config.eos_token_id if module.generation_config else None
    stop = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return Policy(module, tokenizer, data.encoder(tokenizer), tuple(sorted(stop)))


def _as_saved(path: str) -> PreTrainedModel:
    """In the dtype of its files, unless that narrows a buffer, which is computed and not read."""
    dtype = saved_dtype(path)
    module = load_causal_lm(path, dtype=dtype)
    narrow = any(x.dtype == dtype for x in module.buffers())
    return load_causal_lm(path) if narrow and dtype != torch.float32 else module


def without_weights(policy: Policy) -> Policy:
    """The policy once its weights were taken as parameters: a second copy of them goes."""
    return policy._replace(module=skeleton(policy.module).module)


def stopping(policy: Policy, texts: Sequence[str]) -> Policy:
    """The policy, whose answers also end with any token that says one of `texts`.

    Raises:
        ConfigError: no token says just that.
    """
    said = [policy.tokenizer.decode([i]).strip() for i in range(len(policy.tokenizer))]
    for text in texts:
        if text.strip() not in said:
            raise ConfigError(f"--stop {text!r}: no token of the policy says just that; choose one")
    ends = {i for i, word in enumerate(said) if word in {text.strip() for text in texts}}
    return policy._replace(stop=tuple(sorted({*policy.stop, *ends})))


def load_scores(path: str, tokenizer: Any, device: torch.device = CPU) -> Scorer:
    """A trained reward model, as `apply(params, tokens, attention) -> scores`.

    Raises:
        ConfigError: it reads other tokens than the policy writes.
    """
    module, own = on(load_reward_model(path), device), load_tokenizer(path)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"reward model {path} has another vocabulary than the policy; train it from a model "
            "with the policy's tokenizer, because it scores the sampled ids themselves"
        )
    check_vocab(own, module)
    scores = classifier(module)
    pool = POOLS[getattr(module.config, "rlhf_fn_pool", "last")]
    if pool is not last_token:
        scores = Functional(reward_model(module, random.key(0), pool=pool).apply, scores.params)
    return Scorer(skeleton(module).module, scores)


def fresh_scores(
    path: str,
    key: Tensor,
    *,
    pool: str,
    device: torch.device = CPU,
    sliced: bool = False,
    made_by: Callable[[Any], Any] = lambda make: make,
) -> Scorer:
    """A reward model to train, from a causal LM or an encoder, its head drawn from `key`.

    `made_by(make)(module)` takes the place of `make(module)`; the module is moved as `on` does.

    Raises:
        ConfigError: another `pool` than an encoder's own.
    """
    names = AutoConfig.from_pretrained(path).architectures or ()
    if any("CausalLM" in name or "LMHead" in name for name in names):
        module = on(load_causal_lm(path), device, sliced=sliced)
        module.config.rlhf_fn_pool = pool
        make = partial(reward_model, key=key, pool=POOLS[pool])
        return Scorer(skeleton(module).module, made_by(make)(module))
    if pool != "last":
        raise ConfigError(f"--pool is {pool}, but {path} is an encoder and pools by its own head")
    with torch.random.fork_rng():
        torch.manual_seed(int(key[-1]))
        module = load(AutoModelForSequenceClassification, path, num_labels=1, head=True)
    module = on(module, device, sliced=sliced)
    return Scorer(skeleton(module).module, made_by(classifier)(module))


def check_length(module: PreTrainedModel, rows: Sequence[Sequence[int]], more: int, flag: str):
    """Raise a `ConfigError` naming `flag` if a row with `more` tokens is longer than the model."""
    longest, takes = max(map(len, rows)) + more, skeleton(module).longest
    if longest > takes:
        raise ConfigError(
            f"{flag}: a row takes {longest} tokens, but {type(module).__name__} has {takes} "
            f"positions; lower {flag}, or drop the longest rows"
        )
