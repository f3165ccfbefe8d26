"""Losses on pairs, one answer chosen over another: one loss per pair, unreduced."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn.checks import (
    bool_mask,
    fits,
    floating,
    integers,
    minority,
    non_negative,
    positive,
    same_shape,
)


def bradley_terry(
    chosen: Float[Tensor, "*batch"],
    rejected: Float[Tensor, "*batch"],
    *,
    margin: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """The reward model's loss: minus the log-probability that the chosen answer wins.

    L = −log σ(r_w − r_l − m)

    Raises: ValueError unless the scores agree in shape.

    Bradley & Terry 1952; Ouyang et al. 2022, eq. 1: https://arxiv.org/abs/2203.02155. The margin m:
    Touvron et al. 2023, eq. 2: https://arxiv.org/abs/2307.09288
    """
    same_shape(chosen=chosen, rejected=rejected)
    floating(chosen=chosen, rejected=rejected)
    fits(chosen, margin=margin)
    return -logsigmoid(chosen - rejected - margin)


def centring_penalty(
    chosen: Float[Tensor, "*batch"], rejected: Float[Tensor, "*batch"], *, coef: float | Tensor
) -> Float[Tensor, "*batch"]:
    """What `bradley_terry` leaves open, the level of the rewards, pulled to 0: add it to the loss.

    L = c (r_w + r_l)²

    Raises: ValueError unless the scores agree in shape and c ≥ 0.

    Eisenstein et al. 2023: https://arxiv.org/abs/2312.09244
    """
    same_shape(chosen=chosen, rejected=rejected)
    floating(chosen=chosen, rejected=rejected)
    non_negative(coef=coef)
    fits(chosen, coef=coef)
    return coef * (chosen + rejected).square()


def pairwise_token_loss(
    chosen_rewards: Float[Tensor, "*batch time"],
    rejected_rewards: Float[Tensor, "*batch time"],
    chosen_tokens: Int[Tensor, "*batch time"],
    rejected_tokens: Int[Tensor, "*batch time"],
    chosen_mask: Bool[Tensor, "*batch time"],
    rejected_mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch"]:
    """`bradley_terry` at every token from where two answers part to where the longer one ends.

    L = mean over t ∈ [first difference, longer end) of −log σ(r_w,ₜ − r_l,ₜ)

    The two rows begin at the same column (pad on the right). A token against no token is a
    difference; past the shorter answer's end the reward of its padding is read, and a position that
    both masks hide never is. Identical answers have no such t: their loss, and its gradient, is 0.

    Raises: ValueError unless all six shapes agree; TypeError unless the masks are bool.

    DeepSpeed-Chat, Yao et al. 2023: https://arxiv.org/abs/2308.01320
    """
    same_shape(
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
    )
    floating(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    integers(chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)
    bool_mask(chosen_mask, name="chosen_mask")
    bool_mask(rejected_mask, name="rejected_mask")
    kept = chosen_mask | rejected_mask
    differ = kept & ((chosen_tokens != rejected_tokens) | (chosen_mask != rejected_mask))
    span = kept & (differ.cumsum(-1) > 0)
    losses = -logsigmoid(torch.where(span, chosen_rewards - rejected_rewards, 0.0))
    return torch.where(span, losses, 0.0).sum(-1) / span.sum(-1).clamp(min=1)


def implicit_reward(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """The reward this policy is optimal for under a KL penalty β, up to a constant per prompt.

    r = β (log π(y) − log π_ref(y)), of whole answers (sums over their tokens) or token by token.

    Raises: ValueError unless the shapes agree and β > 0.

    Rafailov et al. 2023, eq. 5: https://arxiv.org/abs/2305.18290
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    positive(beta=beta)
    fits(logprobs, beta=beta)
    return beta * (logprobs - ref_logprobs)


def dpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
) -> Float[Tensor, "*batch"]:
    """Direct preference optimisation: `bradley_terry` of the policy's own implicit rewards.

    L = −(1 − ε) log σ(h) − ε log σ(−h),   h = β (log π/π_ref (y_w) − log π/π_ref (y_l))

    Log-probs are sums over the answer's tokens, in nats. The label smoothing ε, the share of
    preferences thought to be flipped, makes it conservative DPO.

    Raises: ValueError unless all shapes agree, β > 0 and ε is in [0, ½).

    Rafailov et al. 2023, eq. 7: https://arxiv.org/abs/2305.18290. Conservative DPO: Mitchell 2023:
    https://ericmitchell.ai/cdpo.pdf
    """
    minority(label_smoothing=label_smoothing)
    fits(chosen_logprobs, label_smoothing=label_smoothing)
    chosen = implicit_reward(chosen_logprobs, ref_chosen_logprobs, beta=beta)
    rejected = implicit_reward(rejected_logprobs, ref_rejected_logprobs, beta=beta)
    kept, flipped = bradley_terry(chosen, rejected), bradley_terry(rejected, chosen)
    return (1 - label_smoothing) * kept + label_smoothing * flipped
