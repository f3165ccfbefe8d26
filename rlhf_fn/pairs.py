"""What stands around a loss of pairs: other rewards and log-probs for it, weights, mixtures.

a = log π/π_ref (y_w) and b = log π/π_ref (y_l), as in direct.py.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn import checks
from rlhf_fn.logprobs import token_logprobs
from rlhf_fn.preference import dpo, implicit_reward
from rlhf_fn.sequence import masked_mean


def alpha_divergence_reward(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """The reward this policy is optimal for under an α-divergence penalty, up to a constant.

    r = β (1 − u^−α)/α,   u = π(y)/π_ref(y),   0 < α ≤ 1

    `bradley_terry` of it is f-DPO. α → 0 is `implicit_reward`, the reverse KL; α = 1 the forward
    KL, β (1 − 1/u). TRL's α is 1 − α.

    Raises: ValueError unless the shapes agree, β > 0 and 0 < α ≤ 1.

    Wang et al. 2023: https://arxiv.org/abs/2309.16240
    """
    checks.positive(alpha=alpha)
    checks.unit_interval(alpha=alpha)
    checks.fits(logprobs, alpha=alpha)
    return -beta * torch.expm1(-alpha * implicit_reward(logprobs, ref_logprobs, beta=1.0)) / alpha


def jensen_shannon_reward(
    logprobs: Float[Tensor, "*batch"],
    ref_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """The reward this policy is optimal for under a Jensen-Shannon penalty, up to a constant.

    r = β log(2u/(1 + u)),   u = π(y)/π_ref(y); at most β log 2

    Raises: ValueError unless the shapes agree and β > 0.

    Wang et al. 2023: https://arxiv.org/abs/2309.16240
    """
    checks.positive(beta=beta)
    checks.fits(logprobs, beta=beta)
    log_ratio = implicit_reward(logprobs, ref_logprobs, beta=1.0)
    return beta * (0.6931471805599453 + logsigmoid(log_ratio))


def desensitised_logprob(
    logprobs: Float[Tensor, "*batch time"],
    shared_length: Int[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """LD-DPO: an answer's log-probability, where what goes past its rival's length counts less.

    Σ_{t ≤ l} log πₜ + α Σ_{t > l} log πₜ, over kept tokens,   l = min(|y_w|, |y_l|)

    α = 1 is `masked_sum`, α = 0 cuts both to one length. The reference's log-probs, too.

    Raises: ValueError unless there is one length per row and 0 ≤ α ≤ 1; TypeError for a mask that
    is not bool.

    Liu et al. 2024: https://arxiv.org/abs/2409.06411
    """
    checks.same_shape(logprobs=logprobs, mask=mask)
    checks.floating(logprobs=logprobs)
    checks.integers(shared_length=shared_length)
    checks.bool_mask(mask)
    checks.unit_interval(alpha=alpha)
    if shared_length.shape != mask.shape[:-1]:
        raise ValueError(
            f"shared_length is {tuple(shared_length.shape)} and mask {tuple(mask.shape)}: expected "
            "one length per row"
        )
    public = mask.cumsum(-1) <= shared_length[..., None]
    kept = torch.where(mask, logprobs, 0.0)
    return torch.where(public, kept, alpha * kept).sum(-1)


def wpo_weight(
    logits: Float[Tensor, "*batch time vocab"],
    tokens: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch"]:
    """WPO: how much an answer is the policy's own, 1 where every token is as likely as a sample.

    w = exp((1/|y|) Σₜ mₜ (log πₜ − log Σᵥ πₜ,ᵥ²))

    A pair's loss is multiplied by those of both answers, which the paper holds constant: detach
    them. float32 from half precision.

    Raises: as `token_logprobs`, of kept tokens; TypeError for a mask that is not bool.

    Zhou et al. 2024: https://arxiv.org/abs/2406.11827
    """
    checks.same_shape(tokens=tokens, mask=mask)
    checks.bool_mask(mask)
    logits = torch.where(mask[..., None], logits, 0.0)
    logprobs = token_logprobs(logits, torch.where(mask, tokens, 0))
    wide = torch.promote_types(logits.dtype, torch.float32)
    collision = (2 * logits.log_softmax(-1, dtype=wide)).logsumexp(-1)
    return masked_mean(logprobs - collision, mask).exp()


def rpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    chosen_lengths: Int[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """`dpo` that keeps the chosen answer likely: with its negative log-likelihood per token.

    L = dpo − α log π(y_w)/|y_w|

    TRL's is the mean over all tokens of a batch, NeMo's by default the sum.

    Raises: as `dpo`; ValueError unless α ≥ 0 and all lengths are ≥ 1.

    Pang et al. 2024: https://arxiv.org/abs/2404.19733
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, chosen_lengths=chosen_lengths)
    checks.integers(chosen_lengths=chosen_lengths)
    checks.non_negative(alpha=alpha)
    checks.fits(chosen_logprobs, alpha=alpha)
    if checks.concrete(chosen_lengths) and (chosen_lengths < 1).any():
        raise ValueError("chosen_lengths must be at least 1; drop pairs with an empty answer")
    pair = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    return dpo(*pair, beta=beta) - alpha * chosen_logprobs / chosen_lengths


def xpo(
    chosen_logprobs: Float[Tensor, "*batch"],
    rejected_logprobs: Float[Tensor, "*batch"],
    ref_chosen_logprobs: Float[Tensor, "*batch"],
    ref_rejected_logprobs: Float[Tensor, "*batch"],
    explored_logprobs: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Exploratory preference optimisation: online `dpo` that leaves what the reference would say.

    L = dpo + α log π(ỹ),   ỹ drawn from the reference, here `explored_logprobs`

    Raises: as `dpo`; ValueError unless α ≥ 0.

    Xie et al. 2024: https://arxiv.org/abs/2405.21046
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, explored_logprobs=explored_logprobs)
    checks.non_negative(alpha=alpha)
    checks.fits(chosen_logprobs, alpha=alpha)
    pair = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    return dpo(*pair, beta=beta) + alpha * explored_logprobs


def dynamic_beta(
    margin: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor,
    alpha: float | Tensor,
    baseline: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """β-DPO: a larger β where the implicit reward margin is large, for those labels are easy.

    β' = (1 + α (M − M₀)) β,   M = β (a − b)

    The paper's M is the mean of a batch, M₀ its moving average, and both are held constant.

    Raises: ValueError unless β > 0 and α ≥ 0.

    Wu et al. 2024: https://arxiv.org/abs/2407.08639
    """
    checks.floating(margin=margin)
    checks.positive(beta=beta)
    checks.non_negative(alpha=alpha)
    checks.fits(margin, beta=beta, alpha=alpha, baseline=baseline)
    return (1 + alpha * (margin - baseline)) * beta


def aot(
    chosen_logprobs: Float[Tensor, "*batch pairs"],
    rejected_logprobs: Float[Tensor, "*batch pairs"],
    ref_chosen_logprobs: Float[Tensor, "*batch pairs"],
    ref_rejected_logprobs: Float[Tensor, "*batch pairs"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
) -> Float[Tensor, "*batch pairs"]:
    """Alignment by optimal transport: the policy's margins dominate the reference's, as a whole.

    L = `dpo` of sort(log π(y_w) − log π(y_l)) against sort(log π_ref(y_w) − log π_ref(y_l))

    The sort is over the pairs of a batch, the last axis, and so the losses are in its order.

    Raises: as `dpo`.

    Melnyk et al. 2024: https://arxiv.org/abs/2406.05882
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    checks.same_shape(
        ref_chosen_logprobs=ref_chosen_logprobs, ref_rejected_logprobs=ref_rejected_logprobs
    )
    ours = (chosen_logprobs - rejected_logprobs).sort(-1).values
    theirs = (ref_chosen_logprobs - ref_rejected_logprobs).sort(-1).values
    nought = torch.zeros_like(ours)
    return dpo(ours, nought, theirs, nought, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired(
    chosen_logprobs: Float[Tensor, "*batch answers"],
    rejected_logprobs: Float[Tensor, "*batch answers"],
    ref_chosen_logprobs: Float[Tensor, "*batch answers"],
    ref_rejected_logprobs: Float[Tensor, "*batch answers"],
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor = 0.0,
) -> Float[Tensor, "*batch answers"]:
    """`aot` where chosen and rejected answers are no pairs: chosen rewards dominate rejected ones.

    L = `dpo` of sort(a) against sort(b)

    The sort is over the answers of a batch, the last axis, and so the losses are in its order.

    Raises: as `dpo`.

    Melnyk et al. 2024: https://arxiv.org/abs/2406.05882
    """
    checks.same_shape(chosen_logprobs=chosen_logprobs, ref_chosen_logprobs=ref_chosen_logprobs)
    checks.same_shape(
        rejected_logprobs=rejected_logprobs, ref_rejected_logprobs=ref_rejected_logprobs
    )
    good = (chosen_logprobs - ref_chosen_logprobs).sort(-1).values
    bad = (rejected_logprobs - ref_rejected_logprobs).sort(-1).values
    nought = torch.zeros_like(good)
    return dpo(good, bad, nought, nought, beta=beta, label_smoothing=label_smoothing)
