"""Advantages of groups, or of tokens, that are normalised over the whole batch.

So they are not their own vmap, and a batch must be whole before it is split. `mask`, hidden and
equal rewards are as in groups.py.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.groups import _centred, _std, dr_grpo_advantages, grpo_advantages
from rlhf_fn.returns import discounted_returns
from rlhf_fn.rewards import whiten


def lite_ppo_advantages(
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    ddof: int,
    eps: float | Tensor,
) -> Float[Tensor, "*prompts group"]:
    """Lite PPO: centred in the group, scaled over the batch, so no prompt is blown up by its luck.

    Aᵢ = (rᵢ − mean of its group)/(std of all kept rewards + ε)

    Raises: as `grpo_advantages`.

    Liu et al. 2025: https://arxiv.org/abs/2508.08221
    """
    checks.non_negative(eps=eps)
    centred, _ = _centred(rewards, mask)
    scale = _std(*_centred(rewards.flatten(), None if mask is None else mask.flatten()), ddof) + eps
    return centred / torch.where(scale > 0, scale, 1.0)


def gdpo_advantages(
    rewards: Float[Tensor, "*prompts group objectives"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    weights: Float[Tensor, " objectives"],
    ddof: int,
    eps: float | Tensor,
) -> Float[Tensor, "*prompts group"]:
    """Several rewards, each normalised in its group before they are added, then over the batch.

    Sᵢ = Σₖ wₖ grpo(rₖ)ᵢ,   Aᵢ = (Sᵢ − mean S)/(std S + ε), over all kept samples together

    Raises: as `grpo_advantages`; ValueError unless there is one weight per objective.

    Liu et al. 2026: https://arxiv.org/abs/2601.05242
    """
    if weights.shape != rewards.shape[-1:]:
        raise ValueError(
            f"weights are {tuple(weights.shape)} and rewards {tuple(rewards.shape)}: expected one "
            "weight for each objective, the last axis of rewards"
        )
    each = [grpo_advantages(r, mask, ddof=ddof, eps=eps) for r in rewards.unbind(-1)]
    total = (torch.stack(each, -1) * weights.to(rewards.dtype)).sum(-1)
    kept = torch.ones_like(total, dtype=torch.bool) if mask is None else mask
    flat = grpo_advantages(total.flatten(), kept.flatten(), ddof=ddof, eps=eps)
    return flat.reshape(total.shape)


def reinforce_pp_advantages(
    rewards: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    eps: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """REINFORCE++: the returns of `shape_rewards`, whitened over the whole batch. No critic.

    A = `whiten`(`discounted_returns`(r))

    Raises: as those two.

    Hu et al. 2025: https://arxiv.org/abs/2501.03262
    """
    returns = discounted_returns(rewards, mask, discount=discount)
    return whiten(returns, mask, eps=eps, shift_mean=True)


def reinforce_pp_baseline_advantages(
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group time"],
    *,
    eps: float | Tensor,
) -> Float[Tensor, "*prompts group time"]:
    """REINFORCE++ with a baseline: the mean of the group, then whitened over the whole batch.

    A = `whiten`(`dr_grpo_advantages`(r), at every kept token); a row without one is no sample

    Raises: as those two.

    Hu et al. 2025: https://arxiv.org/abs/2501.03262
    """
    checks.bool_mask(mask)
    centred = dr_grpo_advantages(rewards, mask.any(-1))
    return whiten(centred[..., None].expand(mask.shape), mask, eps=eps, shift_mean=True)
