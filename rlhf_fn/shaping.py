"""What is added to a score for how an answer is written: its length, its end, its repetitions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import checks


def overlong_penalty(
    lengths: Int[Tensor, "*batch"],
    *,
    limit: int,
    buffer: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch"]:
    """DAPO's soft punishment: from 0 down to −1 over the last tokens before the limit.

    clip((L_max − L_cache − |y|)/L_cache, −1, 0),   lengths in tokens

    verl, NeMo and AReaL go on falling past −1.

    Raises: ValueError unless L_max ≥ L_cache ≥ 1; TypeError unless all are integers.

    Yu et al. 2025, eq. 13: https://arxiv.org/abs/2503.14476
    """
    checks.integers(lengths=lengths)
    checks.count(least=1, buffer=buffer)
    checks.count(least=buffer, limit=limit)
    return ((limit - buffer - lengths).to(dtype) / buffer).clamp(-1, 0)


def missing_eos_penalty(
    score: Float[Tensor, "*batch"],
    ended: Bool[Tensor, "*batch"],
    *,
    penalty: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """A score that an answer which was cut off pays for.

    r − c where the answer did not end by itself

    Raises: ValueError unless the shapes agree and c ≥ 0; TypeError unless `ended` is bool.

    Ziegler et al. 2019 give such answers a fixed score instead: https://arxiv.org/abs/1909.08593
    """
    checks.same_shape(score=score, ended=ended)
    checks.floating(score=score)
    checks.bool_mask(ended, name="ended")
    checks.non_negative(penalty=penalty)
    checks.fits(score, penalty=penalty)
    return torch.where(ended, score, score - penalty)


def length_reward(
    lengths: Int[Tensor, "*prompts group"],
    correct: Bool[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*prompts group"]:
    """Kimi k1.5's reward for a short answer among those to the same prompt: from ½ down to −½.

    λ = ½ − (l − min l)/(max l − min l); min(0, λ) where the answer is wrong; 0 if all are as long

    Raises: ValueError unless the shapes agree; TypeError unless lengths are integers, the rest
    bool.

    Kimi Team 2025, §2.3.3: https://arxiv.org/abs/2501.12599
    """
    checks.same_shape(lengths=lengths, correct=correct, mask=mask)
    checks.integers(lengths=lengths)
    checks.bool_mask(correct, name="correct")
    checks.bool_mask(mask)
    top = torch.iinfo(lengths.dtype).max
    shortest = torch.where(mask, lengths, top).amin(-1, keepdim=True)
    longest = torch.where(mask, lengths, -top).amax(-1, keepdim=True)
    span = (longest - shortest).clamp(min=1)
    share = 0.5 - torch.where(mask, lengths - shortest, 0).to(dtype) / span
    reward = torch.where(correct, share, share.clamp(max=0))
    return torch.where(mask & (longest > shortest), reward, 0.0)


def repeated_share(
    tokens: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    n: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch"]:
    """The share of an answer's n-grams that were there before: 0 if all are new; 0 below n tokens.

    1 − (different n-grams)/(n-grams), of the kept tokens; a penalty is −c times this

    Compares every place with every earlier one: a bool for each of time² pairs in a row.

    Raises: ValueError unless the shapes agree and n ≥ 1; TypeError unless tokens are integers.

    Yeo et al. 2025: https://arxiv.org/abs/2502.03373
    """
    checks.same_shape(tokens=tokens, mask=mask)
    checks.integers(tokens=tokens)
    checks.bool_mask(mask)
    checks.count(least=1, n=n)
    front = (~mask).long().argsort(dim=-1, stable=True)  # kept tokens, in their order, come first
    row = tokens.gather(-1, front)
    grams = mask.sum(-1, keepdim=True) - n + 1
    place = torch.arange(mask.shape[-1], device=mask.device)
    same = (place < grams)[..., None] & (place < place[:, None])  # [this, an earlier one]
    for k in range(n):
        shifted = row.roll(-k, -1)
        same = same & (shifted[..., :, None] == shifted[..., None, :])
    repeats = same.any(-1).sum(-1)
    return repeats.to(dtype) / grams.squeeze(-1).clamp(min=1)


def combined_reward(
    rewards: Float[Tensor, "*batch kinds"],
    mask: Bool[Tensor, "*batch kinds"] | None = None,
    *,
    weights: Float[Tensor, " kinds"],
) -> Float[Tensor, "*batch"]:
    """Several rewards of one answer as one: a sum over the kinds of reward that the answer has.

    r = Σₖ mₖ wₖ rₖ

    Raises: ValueError unless there is one weight per kind and the shapes agree, or where a reward
    that counts is not finite.
    """
    checks.floating(rewards=rewards, weights=weights)
    if weights.shape != rewards.shape[-1:]:
        raise ValueError(
            f"weights are {tuple(weights.shape)} and rewards {tuple(rewards.shape)}: expected one "
            "weight for each kind of reward, the last axis"
        )
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    checks.same_shape(rewards=rewards, mask=mask)
    checks.bool_mask(mask)
    checks.finite(rewards, mask, name="rewards")
    return (torch.where(mask, rewards, 0.0) * weights.to(rewards.dtype)).sum(-1)


def safe_reward(
    reward: Float[Tensor, "*batch"], cost: Float[Tensor, "*batch"], *, multiplier: float | Tensor
) -> Float[Tensor, "*batch"]:
    """Helpfulness at the price of harm: the reward of Safe RLHF.

    (r − λ c)/(1 + λ),   λ ≥ 0 the multiplier of the constraint E[c] ≤ limit

    Raises: ValueError unless the shapes agree and λ ≥ 0.

    Dai et al. 2023: https://arxiv.org/abs/2310.12773
    """
    checks.same_shape(reward=reward, cost=cost)
    checks.floating(reward=reward, cost=cost)
    checks.non_negative(multiplier=multiplier)
    checks.fits(reward, multiplier=multiplier)
    return (reward - multiplier * cost) / (1 + multiplier)
