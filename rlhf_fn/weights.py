"""Reductions, as weights: `loss = weighted_sum(per_token, weights)`, whatever the algorithm.

Weights are computed once, over the whole batch of an optimizer step, and then travel in it, so
micro-batches and ranks simply add. A row with no kept token is padding: its weights are 0 and it
counts in no denominator. A batch with no kept token has weights 0 throughout.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.turns import turn_starts, turn_sum


def token_mean(
    mask: Bool[Tensor, "*batch time"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch time"]:
    """wₜ = mₜ / Σ m: every kept token of the batch weighs the same.

    DAPO, eq. 8: https://arxiv.org/abs/2503.14476
    """
    checks.bool_mask(mask)
    return mask.to(dtype) / _at_least_one(mask.sum())


def sequence_mean(
    mask: Bool[Tensor, "*batch time"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch time"]:
    """wᵢₜ = mᵢₜ / (|yᵢ| · rows), |yᵢ| = Σₜ mᵢₜ: every sequence weighs the same, however long.

    GRPO, eq. 3: https://arxiv.org/abs/2402.03300
    """
    checks.bool_mask(mask)
    lengths = mask.sum(-1, keepdim=True)
    return mask.to(dtype) / _at_least_one(lengths) / _at_least_one((lengths > 0).sum())


def sequence_sum(
    mask: Bool[Tensor, "*batch time"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch time"]:
    """wᵢₜ = mᵢₜ / rows: the mean over sequences of their sums, so a token weighs what it weighs.

    Of whole-answer losses that stand at every token it weighs an answer by its length (LUSPO).
    """
    checks.bool_mask(mask)
    return mask.to(dtype) / _at_least_one(mask.any(-1).sum())


def token_sum(
    mask: Bool[Tensor, "*batch time"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch time"]:
    """wₜ = mₜ: the plain sum, which grows with the batch."""
    checks.bool_mask(mask)
    return mask.to(dtype)


def fixed_length(
    mask: Bool[Tensor, "*batch time"], *, length: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch time"]:
    """wᵢₜ = mᵢₜ / (length · rows): a constant, so long sequences weigh more.

    `length` is the generation budget (Dr. GRPO, https://arxiv.org/abs/2503.20783); length = 1 is
    the mean over sequences of the sum over tokens.

    Raises:
        ValueError: `length` is below 1.
    """
    checks.bool_mask(mask)
    checks.count(least=1, length=length)
    return mask.to(dtype) / (length * _at_least_one(mask.any(-1).sum()))


def group_mean(
    mask: Bool[Tensor, "*prompts group time"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*prompts group time"]:
    """wₚᵢₜ = mₚᵢₜ / (Σᵢₜ mₚᵢₜ · prompts): every prompt weighs the same; in it, every token.

    Raises:
        ValueError: `mask` has no group axis.
    """
    checks.bool_mask(mask)
    if mask.ndim < 2:
        raise ValueError(f"mask must be [..., group, time], got shape {tuple(mask.shape)}")
    tokens = mask.sum((-2, -1), keepdim=True)
    return mask.to(dtype) / _at_least_one(tokens) / _at_least_one((tokens > 0).sum())


def segment_mean(
    mask: Bool[Tensor, "*batch time"],
    segments: Int[Tensor, "*batch time"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch time"]:
    """wₜ = mₜ / (|segment of t| · segments): every example of packed rows weighs the same.

    A segment is a run of kept tokens with one number in `segments`.

    Raises: ValueError unless the shapes agree; TypeError unless segments are integers.
    """
    checks.bool_mask(mask)
    checks.same_shape(mask=mask, segments=segments)
    checks.integers(segments=segments)
    kept = mask.to(dtype)
    lengths = turn_sum(kept, segments, mask)
    return kept / _at_least_one(lengths) / _at_least_one(turn_starts(segments, mask).sum())


def weighted_sum(x: Float[Tensor, "*batch"], weights: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Σ wₜ xₜ over the positions with wₜ ≠ 0; the others are not read and may hold NaN.

    Raises:
        ValueError: the shapes differ.
        TypeError: `weights` are no weights, but a mask.
    """
    checks.same_shape(x=x, weights=weights)
    checks.floating(weights=weights)
    return (weights * torch.where(weights != 0, x, 0.0)).sum()


def _at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)
