"""The batches that losses read.

Position t of every field speaks of token t. Where a weight is 0 no field but `tokens` and
`attention` is read, and no gradient flows: that is where the policy did not choose the token. So
the other fields may begin later and speak of the last tokens alone; what nobody asks about costs no
logits, and `asked` leaves it out.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import tree
from rlhf_fn.prefix import Prefixed


class SftBatch(NamedTuple):
    """Instructions with their answers; `weights` is 0 on the prompt."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    weights: Float[Tensor, "batch last"]


class PolicyBatch(NamedTuple):
    """Rollouts with the log-probs they were sampled at and what each token was worth."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch last"]
    ref_logprobs: Float[Tensor, "batch last"]
    advantages: Float[Tensor, "batch last"]
    weights: Float[Tensor, "batch last"]


class ImitationBatch(NamedTuple):
    """A `PolicyBatch`, and what −log π of each token weighs besides: of answers to imitate."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch last"]
    ref_logprobs: Float[Tensor, "batch last"]
    advantages: Float[Tensor, "batch last"]
    weights: Float[Tensor, "batch last"]
    imitation: Float[Tensor, "batch last"]


class ValueBatch(NamedTuple):
    """Rollouts with the values they were given when sampled and the returns that followed."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_values: Float[Tensor, "batch last"]
    returns: Float[Tensor, "batch last"]
    weights: Float[Tensor, "batch last"]


class ActorCriticBatch(NamedTuple):
    """Every field of a `PolicyBatch` and of a `ValueBatch`."""

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch last"]
    ref_logprobs: Float[Tensor, "batch last"]
    advantages: Float[Tensor, "batch last"]
    old_values: Float[Tensor, "batch last"]
    returns: Float[Tensor, "batch last"]
    weights: Float[Tensor, "batch last"]


WHOLE = ("tokens", "attention")
MARKS = ("weights", "mask", "imitation")  # fields that are 0 where a token is not asked about


def asked(batch: Any) -> Any:
    """The batch with all fields but `tokens` and `attention` from the first token asked about on.

    That is the first that weighs something in any row; no loss reads what is left out. At least two
    columns remain, so that one graph serves all. A batch without fields for each token stays as it
    is. It looks at the numbers, so not inside of a graph.
    """
    fields = {name: x for name, x in batch._asdict().items() if x.ndim > 1}
    marks = [fields[name] != 0 for name in MARKS if name in fields]
    if "tokens" not in fields or not marks:
        return batch
    read = torch.stack(marks).flatten(0, -2).any(0)
    first = int(read.int().argmax()) if read.any() else len(read)
    start = max(min(first, len(read) - 2), 0)
    later = {name: x[..., start:] for name, x in fields.items() if name not in WHOLE}
    return batch._replace(**tree.map(tree.own, later))


def last_tokens(x: Tensor | Prefixed, like: Tensor) -> Tensor:
    """As many of the last columns of `x` as `like` has."""
    x = x.rows if isinstance(x, Prefixed) else x
    return x[..., x.shape[-1] - like.shape[-1] :]
