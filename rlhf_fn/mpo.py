"""Maximum a posteriori policy optimisation: reweigh samples by their worth, then fit the policy.

MPO weighs the samples of a group (the last axis), V-MPO the better half of a whole batch: flatten
it, with the mask `top_fraction(advantages, mask, fraction=0.5)`. The policy's loss is
−weights · log π, the temperature's `mpo_temperature_loss` and the KL's `kl_constraint`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_fn import checks


def mpo_weights(
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    temperature: float | Tensor,
) -> Float[Tensor, "*prompts group"]:
    """The non-parametric policy of the E-step, on the samples kept; 0 where hidden.

    wᵢ = exp(rᵢ/η) / Σⱼ exp(rⱼ/η)

    Raises: ValueError unless the shapes agree and η > 0; TypeError for a mask that is not bool.

    Abdolmaleki et al. 2018: https://arxiv.org/abs/1806.06920; V-MPO, Song et al. 2019:
    https://arxiv.org/abs/1909.12238
    """
    checks.positive(temperature=temperature)
    checks.fits(rewards, temperature=temperature)
    kept = _kept(rewards, mask)
    scaled = torch.where(kept, torch.where(kept, rewards, 0.0) / temperature, -torch.inf)
    some = kept.any(-1, keepdim=True)
    return torch.where(some, scaled.softmax(-1), 0.0)


def mpo_temperature_loss(
    temperature: Float[Tensor, "..."],
    rewards: Float[Tensor, "*prompts group"],
    mask: Bool[Tensor, "*prompts group"] | None = None,
    *,
    bound: float | Tensor,
) -> Float[Tensor, "*prompts"]:
    """The dual of the E-step: least where the weights are as far from uniform as the bound allows.

    g(η) = η ε + η log((1/n) Σᵢ exp(rᵢ/η)), over the n samples kept; 0 for a group without one

    `temperature` is one number, or one per prompt. Its gradient is ε − KL(w ‖ uniform).

    Raises: ValueError unless the shapes fit, η > 0 and ε > 0; TypeError for a mask that is not
    bool.

    Abdolmaleki et al. 2018: https://arxiv.org/abs/1806.06920
    """
    checks.positive(temperature=temperature, bound=bound)
    checks.fits(rewards[..., 0], temperature=temperature, bound=bound)
    kept = _kept(rewards, mask)
    number = kept.sum(-1)
    some = number > 0
    scaled = torch.where(kept, rewards, 0.0) / temperature[..., None]
    scaled = torch.where(kept | ~some[..., None], scaled, -torch.inf)
    log_mean = scaled.logsumexp(-1) - number.clamp(min=1).to(scaled.dtype).log()
    return torch.where(some, temperature * (bound + log_mean), 0.0)


def kl_constraint(
    multiplier: Float[Tensor, "..."],
    kl: Float[Tensor, "*batch"],
    *,
    bound: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """The Lagrangian of KL ≤ ε: one loss for the policy, which descends, and α, which rises above.

    α (ε − sg[KL]) + sg[α] KL

    Raises: ValueError unless α ≥ 0 and ε > 0.

    Song et al. 2019: https://arxiv.org/abs/1909.12238
    """
    checks.non_negative(multiplier=multiplier)
    checks.positive(bound=bound)
    checks.fits(kl, multiplier=multiplier, bound=bound)
    return multiplier * (bound - kl.detach()) + multiplier.detach() * kl


def _kept(rewards: Tensor, mask: Tensor | None) -> Tensor:
    checks.floating(rewards=rewards)
    if mask is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    checks.same_shape(rewards=rewards, mask=mask)
    checks.bool_mask(mask)
    return mask
