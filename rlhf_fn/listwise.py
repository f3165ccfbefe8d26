"""Losses on rankings and grades: one per list or per answer, unreduced."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn import checks
from rlhf_fn.kl import log1mexp
from rlhf_fn.preference import implicit_reward


def plackett_luce(
    scores: Float[Tensor, "*batch items"], mask: Bool[Tensor, "*batch items"]
) -> Float[Tensor, "*batch"]:
    """Minus the log-probability of a ranking: the best of all, then the best of the rest, and on.

    L = −Σₖ (sₖ − log Σⱼ≥ₖ exp sⱼ), items from best to worst

    Two items are `bradley_terry`; one or none has loss 0. Hidden items are not in the list.

    Raises: ValueError unless the shapes agree; TypeError for a mask that is not bool.

    Plackett 1975: https://doi.org/10.2307/2346567
    """
    checks.same_shape(scores=scores, mask=mask)
    checks.floating(scores=scores)
    checks.bool_mask(mask)
    kept = torch.where(mask, scores, 0.0)
    place = torch.arange(scores.shape[-1], device=scores.device)
    rest = (place >= place[:, None]) & mask[..., None, :]  # [item, those not above it]
    total = torch.where(rest, kept[..., None, :], -torch.inf).logsumexp(-1)
    return torch.where(mask, total - kept, 0.0).sum(-1)


def plackett_luce_dpo(
    logprobs: Float[Tensor, "*batch items"],
    ref_logprobs: Float[Tensor, "*batch items"],
    mask: Bool[Tensor, "*batch items"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """DPO of rankings: `plackett_luce` of the policy's own implicit rewards.

    L = −Σₖ (rₖ − log Σⱼ≥ₖ exp rⱼ),   r = β log π/π_ref, answers from best to worst

    Two answers are `dpo`. Log-probs are sums over an answer's tokens.

    Raises: as `plackett_luce` and `implicit_reward`.

    Rafailov et al. 2023, appendix A.3: https://arxiv.org/abs/2305.18290
    """
    return plackett_luce(implicit_reward(logprobs, ref_logprobs, beta=beta), mask)


def ordinal_loss(
    scores: Float[Tensor, "*batch"],
    grades: Int[Tensor, "*batch"],
    *,
    thresholds: Float[Tensor, " cuts"],
) -> Float[Tensor, "*batch"]:
    """Ordinal regression: minus the log-probability of a grade from 0 to the number of thresholds.

    L = −log(σ(θ_{g+1} − s) − σ(θ_g − s)),   θ₀ = −∞ < θ₁ < ... < θ_cuts < θ_{cuts+1} = ∞

    One threshold at 0 is the logistic loss. `thresholds` may be learnt.

    Raises: ValueError unless the shapes agree, the grades are in range and the thresholds rise.

    McCullagh 1980: https://doi.org/10.1111/j.2517-6161.1980.tb01109.x
    """
    checks.same_shape(scores=scores, grades=grades)
    checks.floating(scores=scores, thresholds=thresholds)
    checks.token_ids(grades, len(thresholds) + 1, name="grades")
    if checks.concrete(thresholds) and not (thresholds.diff() > 0).all():
        raise ValueError(f"thresholds must rise, got {thresholds.tolist()}; sort them")
    end = thresholds.new_full((1,), torch.inf)
    cuts = torch.cat([-end, thresholds, end]).to(scores.dtype)
    low, high = cuts[grades.long()] - scores, cuts[grades.long() + 1] - scores
    return -logsigmoid(high) - logsigmoid(-low) - log1mexp(low - high)


def step_loss(
    logits: Float[Tensor, "*batch time"],
    correct: Bool[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """A process reward model's loss: a logistic one at the last token of every step.

    Lₜ = −log σ(zₜ) where the step is correct, −log σ(−zₜ) where not; 0 off the mask of step ends

    A mask of the last step alone is an outcome reward model's.

    Raises: ValueError unless the shapes agree; TypeError unless `correct` and the mask are bool.

    Lightman et al. 2023: https://arxiv.org/abs/2305.20050
    """
    checks.same_shape(logits=logits, correct=correct, mask=mask)
    checks.floating(logits=logits)
    checks.bool_mask(correct, name="correct")
    checks.bool_mask(mask)
    logits = torch.where(mask, logits, 0.0)
    return torch.where(mask, -logsigmoid(torch.where(correct, logits, -logits)), 0.0)
