"""A language model up to its logits: what the losses need of them, they need of one token each.

`projected_lm` is `causal_lm`, with the same parameters, whose `apply` returns a `Projection`. A
function of hidden states and weight reads it, so that `[*batch, time, vocab]` never exists:

    apply, params = projected_lm(module)
    statistics = of_projection(rlhf_fn.linear_token_logprobs_and_entropy)  # or rlhf_kernels'
    loss = policy_loss(apply, ..., token_logprobs=statistics)
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fn.logprobs import entropy
from rlhf_fn.models import Functional, Params, Projection, Tokens, logits, weights
from rlhf_fn.prefix import Prefixed
from rlhf_fn.products import linear
from rlhf_fn.skeletons import Attention, require_causal_lm, require_params, skeleton

__all__ = [
    "Projection",
    "likeliest",
    "logprobs_and_entropy",
    "logprobs_and_hits",
    "of_projection",
    "projected_lm",
]
CHUNK = 4096  # tokens of the vocabulary that are compared at a time


def projected_lm(module: PreTrainedModel) -> Functional:
    """A causal language model without its logits: `apply(params, tokens, attention) -> Projection`.

    The parameters are those of `causal_lm(module)`, the head's weight among them: tied to the
    embedding, it has the gradients of both. Frozen, it is a leaf that nobody differentiates.

    Raises:
        TypeError: as `causal_lm`, and where the model does something to its logits after the head
            (a softcap, a scale).
    """
    require_causal_lm(module)
    _require_bare_head(module)
    bare = skeleton(module)
    names = {id(p): name for name, p in bare.module.named_parameters()}
    head: Any = bare.module.get_output_embeddings()
    weight, bias = names[id(head.weight)], names.get(id(getattr(head, "bias", None)))
    bare.module.set_output_embeddings(nn.Identity())
    left = frozenset(name for name, _ in bare.module.named_parameters())
    below = bare._replace(names=left, tied={})

    def apply(params: Params, tokens: Tokens, attention: Attention | Prefixed) -> Projection:
        require_params(bare, params)
        hidden = logits(below, {name: params[name] for name in left}, tokens, attention)
        return Projection(hidden, params[weight], None if bias is None else params[bias])

    return Functional(apply, weights(module))


def of_projection(quantity: Callable[..., Any]) -> Callable[..., Any]:
    """Of `linear_token_logprobs` and its like: the quantity of (projection, tokens)."""

    def read(
        projection: Projection, tokens: Int[Tensor, "*batch time"], **hyperparameters: Any
    ) -> Any:
        if not isinstance(projection, Projection):
            raise TypeError(
                f"of_projection reads a Projection, got {type(projection).__name__}; make `apply` "
                "with projected_lm"
            )
        hidden, weight, bias = projection
        return quantity(hidden, weight, tokens, bias, **hyperparameters)

    return read


def logprobs_and_entropy(
    token_logprobs: Callable[..., Any], *, temperature: float | Tensor, spare: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """(log π, H) of (outputs, tokens), from `token_logprobs` if it returns both.

    From logits floor 0 has H otherwise. `spare` detaches H.

    Raises:
        TypeError: later, of a `Projection` that `token_logprobs` gives no entropy of.
    """

    def both(outputs: Tensor | Projection, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = token_logprobs(outputs, tokens, temperature=temperature)
        if isinstance(out, tuple):
            out, other = out
            if other.is_floating_point():  # hits are not
                return out, other.detach() if spare else other
        if isinstance(outputs, Projection):
            raise TypeError(
                "token_logprobs of a Projection must return (log π, H); pass of_projection("
                "linear_token_logprobs_and_entropy)"
            )
        return out, entropy(outputs.detach() if spare else outputs, temperature=temperature)

    return both


def logprobs_and_hits(
    token_logprobs: Callable[..., Any],
) -> Callable[[Tensor | Projection, Tensor], tuple[Tensor, Bool[Tensor, "*batch"]]]:
    """(log π, whether the token is the likeliest) of (outputs, tokens), without a gradient of that.

    From `token_logprobs` if it returns both, as `rlhf_kernels.linear_token_logprobs_and_hits` does;
    else, and if the other is an entropy, by `likeliest`, at another product of a projection.
    """

    def both(outputs: Tensor | Projection, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = token_logprobs(outputs, tokens)
        if isinstance(out, tuple):
            out, other = out
            if other.dtype == torch.bool:  # an entropy is not
                return out, other
        return out, likeliest(outputs) == tokens

    return both


def likeliest(outputs: Tensor | Projection) -> Int[Tensor, "*batch time"]:
    """argmax of the logits; a projection's are compared a part of the vocabulary at a time."""
    if not isinstance(outputs, Projection):
        return outputs.detach().argmax(-1)
    hidden, weight, bias = outputs.hidden.detach(), outputs.weight.detach(), outputs.bias
    best = torch.full_like(hidden[..., 0], -torch.inf)
    token = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, weight.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        z = linear(hidden, weight[part])
        top, at = (z if bias is None else z + bias.detach()[part]).max(-1)
        token = torch.where(top > best, start + at, token)
        best = torch.maximum(top, best)
    return token


def _require_bare_head(module: PreTrainedModel) -> None:
    """Raise a `TypeError` unless the logits are what the head returns, tried with large ones.

    A module without numbers, on the meta device or fake, cannot be tried.
    """
    head: Any = module.get_output_embeddings()
    if head.weight.is_meta or isinstance(head.weight, torch._subclasses.FakeTensor):
        return
    width, like = head.weight.shape[0], head.weight
    probe = torch.linspace(-1e3, 1e3, width, dtype=like.dtype, device=like.device).view(1, 1, -1)
    handle = head.register_forward_hook(lambda *_: probe)
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=like.device)
        with torch.no_grad():
            logits = module(input_ids=token, use_cache=False).logits
    finally:
        handle.remove()
    if not torch.equal(logits.to(probe.dtype), probe):
        raise TypeError(
            f"module {type(module).__name__} changes its logits after the head (a softcap or a "
            "scale), which a Projection does not; use causal_lm"
        )
