"""Advantages from comparing the samples of one prompt: the group is the last axis, not a stride."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn import checks


def grpo_advantages(
    rewards: Float[Tensor, "*prompts group"], *, eps: float | Tensor
) -> Float[Tensor, "*prompts group"]:
    """Score every sample against the other samples of its own prompt.

    Aᵢ = (rᵢ − mean r) / (std r + ε), over the last axis, with n − 1 in the std.

    When all of a prompt's rewards are equal its advantages are exactly 0, whatever ε, and their
    gradient is finite.

    Raises: ValueError where a group has fewer than 2 samples, for there is nothing to compare with,
    where a reward is not finite, for it would poison its whole group, and where ε < 0; TypeError
    where rewards are not floating point.

    Shao et al. 2024, §4.1.2: https://arxiv.org/abs/2402.03300
    """
    if rewards.ndim == 0 or (group := rewards.shape[-1]) < 2:
        raise ValueError(
            f"rewards are {tuple(rewards.shape)}: expected [*prompts, group] with 2 samples or "
            "more in a group; sample more per prompt, or use a baseline that needs no group"
        )
    checks.floating(rewards=rewards)
    checks.finite(rewards, name="rewards")
    checks.non_negative(eps=eps)
    relative = rewards - rewards[..., :1]  # equal rewards become exact zeros before any rounding
    centred = relative - relative.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (group - 1)
    scale = _sqrt(variance) + eps
    return centred / torch.where(scale > 0, scale, 1.0)


def _sqrt(x: Tensor) -> Tensor:
    """√x whose gradient at 0 is 0, not ∞."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
