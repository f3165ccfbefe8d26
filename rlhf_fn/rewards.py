"""Rewards per token from one score per row, and their normalisation.

A row without a kept token is padding: it gets 0, and its score is never read.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks


def shape_rewards(
    score: Float[Tensor, "*batch"],
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """A KL penalty on every kept token and the score on the last: the reward of RLHF.

    rₜ = −β (log πₜ − log π_ref,ₜ) + [t is the last kept token]·score

    `logprobs` are those of the policy that sampled. β in reward per nat.

    Raises: ValueError where shapes differ, β < 0 or a score is not finite; TypeError for a mask
    that is not bool.

    Ziegler et al. 2019, eq. 2: https://arxiv.org/abs/1909.08593
    """
    checks.same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    checks.bool_mask(mask)
    checks.floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.non_negative(beta=beta)
    checks.fits(mask, beta=beta)
    log_ratio = torch.where(mask, logprobs, 0.0) - torch.where(mask, ref_logprobs, 0.0)
    return last_token_reward(score, mask) - beta * log_ratio


def last_token_reward(
    score: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The score on the last token that the mask keeps, wherever it is; rewards sum to the score.

    rₜ = [t is the last kept token]·score

    Raises: ValueError where shapes differ or a score is not finite; TypeError for a mask that is
    not bool.
    """
    score = _score(score, mask)
    return torch.where(mask & (_later(mask) == 0), score, 0.0)


def uniform_reward(
    score: Float[Tensor, "*batch"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """The score in equal parts on every kept token; rewards sum to the score.

    rₜ = score/n,   n = the number of kept tokens in the row

    Raises: as `last_token_reward`.
    """
    score = _score(score, mask)
    number = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, score / number, 0.0)


def discounted_reward(
    score: Float[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """The score, discounted by the number of kept tokens still to come (REINFORCE++).

    rₜ = γᵏ·score,   k = the number of kept tokens after t

    γ = 1 is the score on every token, γ = 0 `last_token_reward`. These are already returns: the
    `discounted_returns` of `last_token_reward`.

    Raises: as `last_token_reward`; ValueError unless 0 ≤ γ ≤ 1.

    Hu et al. 2025: https://arxiv.org/abs/2501.03262
    """
    checks.unit_interval(discount=discount)
    checks.fits(mask, discount=discount)
    score = _score(score, mask)
    later = _later(mask).to(torch.promote_types(score.dtype, torch.float32))
    return torch.where(mask, score * (discount**later).to(score.dtype), 0.0)


def whiten(
    x: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    eps: float | Tensor,
    shift_mean: bool,
) -> Float[Tensor, "*batch time"]:
    """Shift and scale kept values to mean 0 and variance 1, over all axes of x together.

    (x − μ)/√(σ² + ε) + [not shift_mean] μ,   μ = Σ m x/n,   σ² = Σ m (x − μ)²/n,   n = Σ m

    The population variance (n, not n − 1). One kept value is its own mean and gives 0 + μ; none
    gives 0. Statistics are of the tensor as given, so whiten the whole batch, before it is split;
    this is the one function here that is not its own vmap.

    Args:
        eps: ε > 0, in the unit of σ².
        shift_mean: False puts the mean back.

    Raises: ValueError where shapes differ or ε ≤ 0; TypeError for a mask that is not bool.
    """
    checks.same_shape(x=x, mask=mask)
    checks.bool_mask(mask)
    checks.floating(x=x)
    checks.positive(eps=eps)
    number = mask.sum().clamp(min=1)
    x = torch.where(mask, x, 0.0)
    mean = x.sum() / number
    centred = torch.where(mask, x - mean, 0.0)
    centred = centred - torch.where(mask, centred.sum() / number, 0.0)  # the rounding of the mean
    white = centred * (centred.square().sum() / number + eps).rsqrt()
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


def _later(mask: Tensor) -> Tensor:
    """The number of kept tokens after t."""
    return mask.flip(-1).cumsum(-1).flip(-1) - mask.long()


def _score(score: Tensor, mask: Tensor) -> Tensor:
    """The score as `[*batch, 1]`, checked where the row keeps a token."""
    checks.bool_mask(mask)
    checks.floating(score=score)
    if score.shape != mask.shape[:-1]:
        raise ValueError(
            f"score and mask: got score {tuple(score.shape)} and mask {tuple(mask.shape)}, "
            "expected one score per row of the mask"
        )
    checks.finite(score, mask.any(-1), name="score")
    return score[..., None]
