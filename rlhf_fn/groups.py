"""Advantages from comparing the samples of one prompt: the group is the last axis, not a stride.

`mask` says which samples there are, for groups of different sizes; a hidden reward is never read
and its advantage is 0. Where all rewards of a group are equal, or only one is kept, its advantages
are exactly 0 and their gradient is finite. The advantages of whole answers meet the log-probs of
their tokens as `advantages[..., None]`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import checks


def grpo_advantages(
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    ddof: int,
    eps: float | Tensor,
) -> Float[Tensor, "*prompts group"]:
    """Score every sample against the other samples of its own prompt.

    Aᵢ = (rᵢ − mean r)/(std r + ε),   std² = Σᵢ (rᵢ − mean r)²/(n − ddof), n the samples kept

    The paper says neither ddof nor ε: most divide by n − 1, open-instruct and HALOs by n; ε runs
    from 1e-9 (OpenRLHF) to 1e-2 (HALOs). NeMo leaves rᵢ out of its own mean and std.

    Raises: ValueError where a group has room for fewer than 2 samples, for there is nothing to
    compare with, where a kept reward is not finite, for it would poison its whole group, and where
    ε < 0 or ddof is not 0 or 1; TypeError where rewards are not floating point or the mask not
    bool.

    Shao et al. 2024, §4.1.2: https://arxiv.org/abs/2402.03300
    """
    checks.non_negative(eps=eps)
    centred, number = _centred(rewards, mask)
    scale = _std(centred, number, ddof) + eps
    return centred / torch.where(scale > 0, scale, 1.0)


def dr_grpo_advantages(
    rewards: Float[Tensor, "*prompts group"], mask: Bool[Tensor, "*prompts group"] | None = None
) -> Float[Tensor, "*prompts group"]:
    """GRPO done right: no division, so a hard prompt and an easy one weigh what they are worth.

    Aᵢ = rᵢ − mean r

    Raises: as `grpo_advantages`.

    Liu et al. 2025: https://arxiv.org/abs/2503.20783
    """
    return _centred(rewards, mask)[0]


def rloo_advantages(
    rewards: Float[Tensor, "*prompts group"], mask: Bool[Tensor, "*prompts group"] | None = None
) -> Float[Tensor, "*prompts group"]:
    """Leave one out: the baseline of a sample is the mean reward of the others.

    Aᵢ = rᵢ − Σⱼ≠ᵢ rⱼ/(n − 1) = (rᵢ − mean r) n/(n − 1)

    Raises: as `grpo_advantages`.

    Ahmadian et al. 2024: https://arxiv.org/abs/2402.14740
    """
    centred, number = _centred(rewards, mask)
    return centred * number / (number - 1).clamp(min=1)


def remax_advantages(
    rewards: Float[Tensor, "*prompts group"], greedy_rewards: Float[Tensor, "*prompts"]
) -> Float[Tensor, "*prompts group"]:
    """The reward above that of the greedy answer to the same prompt; a group of one will do.

    Aᵢ = rᵢ − r(greedy answer)

    Raises: ValueError unless there is one greedy reward per group and all are finite.

    Li et al. 2023: https://arxiv.org/abs/2310.10505
    """
    checks.floating(rewards=rewards, greedy_rewards=greedy_rewards)
    if greedy_rewards.shape != rewards.shape[:-1]:
        raise ValueError(
            f"greedy_rewards are {tuple(greedy_rewards.shape)} and rewards {tuple(rewards.shape)}: "
            "expected one greedy reward per prompt, and the group as the last axis of rewards"
        )
    checks.finite(rewards, name="rewards")
    checks.finite(greedy_rewards, name="greedy_rewards")
    return rewards - greedy_rewards[..., None]


def opo_advantages(
    rewards: Float[Tensor, "*prompts group"],
    lengths: Int[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
) -> Float[Tensor, "*prompts group"]:
    """On-policy with the baseline of least variance, where a longer answer has a longer gradient.

    Aᵢ = rᵢ − Σⱼ lⱼ rⱼ / Σⱼ lⱼ,   l in tokens

    Raises: as `grpo_advantages`; ValueError where a kept length is below 1.

    Hao et al. 2025: https://arxiv.org/abs/2505.23585
    """
    checks.same_shape(rewards=rewards, lengths=lengths)
    checks.integers(lengths=lengths)
    relative, mask = _relative(rewards, mask)
    if checks.concrete(lengths) and checks.concrete(mask) and (lengths[mask] < 1).any():
        raise ValueError("lengths must be at least 1 for every kept answer; hide the empty ones")
    weight = torch.where(mask, lengths, 0)
    total = weight.sum(-1, keepdim=True).clamp(min=1)
    baseline = (weight * relative).sum(-1, keepdim=True) / total
    return torch.where(mask, relative - baseline, 0.0)


def maxrl_advantages(
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    eps: float | Tensor,
) -> Float[Tensor, "*prompts group"]:
    """Maximum-likelihood RL: a success weighs by how rare it is, as the gradient of log p does.

    Aᵢ = (rᵢ − mean r)/(mean r + ε)

    Raises: as `grpo_advantages`; ValueError where a kept reward is negative, for there is no
    likelihood to maximise.

    MaxRL, 2026: https://arxiv.org/abs/2602.02710
    """
    checks.non_negative(eps=eps)
    centred, number = _centred(rewards, mask)
    kept = rewards if mask is None else torch.where(mask, rewards, 0.0)
    if checks.concrete(kept) and (kept < 0).any():
        raise ValueError(f"rewards must be >= 0, got {kept.min().item()}; shift or clip them")
    mean = kept.sum(-1, keepdim=True) / number + eps
    return centred / torch.where(mean > 0, mean, 1.0)


def pass_at_k_advantages(
    rewards: Float[Tensor, "*prompts group"], mask: Bool[Tensor, "*prompts group"] | None = None
) -> Float[Tensor, "*prompts group"]:
    """What the best of the group owes to each sample: only a single best one gets anything.

    Aᵢ = maxⱼ rⱼ − maxⱼ≠ᵢ rⱼ

    The policy gradient of the best of k = n samples, with a leave-one-out baseline.

    Raises: as `grpo_advantages`.

    Tang et al. 2025: https://arxiv.org/abs/2503.19595
    """
    relative, mask = _relative(rewards, mask)
    best, second = torch.where(mask, relative, -torch.inf).topk(2, dim=-1).values.split(1, -1)
    lead = torch.where(second > -torch.inf, best - second, 0.0)  # of one sample alone: none
    return torch.where(mask & (relative == best), lead, 0.0)


def informative_groups(
    rewards: Float[Tensor, "*prompts group"], mask: Bool[Tensor, "*prompts group"] | None = None
) -> Bool[Tensor, "*prompts"]:
    """The prompts whose kept rewards are not all equal: DAPO's dynamic sampling keeps only those.

    The others have advantage 0. Make the weights of `mask & informative[..., None, None]` to leave
    them out of the denominator, too; that is GPG's factor α = B/(B − M).

    Raises: as `grpo_advantages`.

    Yu et al. 2025, §3.2: https://arxiv.org/abs/2503.14476; GPG, Chu et al. 2025:
    https://arxiv.org/abs/2504.02546
    """
    return (_relative(rewards, mask)[0] != 0).any(-1)


def _relative(rewards: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kept rewards above the first of them, so equal ones are 0 before any rounding."""
    if rewards.ndim == 0 or rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards are {tuple(rewards.shape)}: expected [*prompts, group] with 2 samples or "
            "more in a group; sample more per prompt, or use a baseline that needs no group"
        )
    checks.floating(rewards=rewards)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    checks.same_shape(rewards=rewards, mask=mask)
    checks.bool_mask(mask)
    checks.finite(rewards, mask, name="rewards")
    first = rewards.gather(-1, mask.int().argmax(-1, keepdim=True))
    return torch.where(mask, rewards - first, 0.0), mask


def _centred(rewards: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kept rewards less their mean, and how many they are, at least 1."""
    relative, mask = _relative(rewards, mask)
    number = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, relative - relative.sum(-1, keepdim=True) / number, 0.0), number


def _std(centred: Tensor, number: Tensor, ddof: int) -> Tensor:
    """The std of what is centred, whose gradient at 0 is 0, not ∞."""
    checks.count(least=0, ddof=ddof)
    if ddof > 1:
        raise ValueError(f"ddof must be 0, to divide by n, or 1, to divide by n - 1; got {ddof}")
    variance = centred.square().sum(-1, keepdim=True) / (number - ddof).clamp(min=1)
    return torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
