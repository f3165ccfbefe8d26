"""Losses of supervised fine-tuning and distillation, per token and unreduced.

The KL divergences are `full_kl`: reverse, from student to teacher, `full_kl(logits, teacher)`, and
forward `full_kl(teacher, logits)`. On the student's own samples, where only log-probs are known,
−`k1`(π, teacher) is the advantage of on-policy distillation. Weights that are 0 on prompts make any
of them a loss on completions, and `segment_mean` counts the examples of packed rows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.logprobs import full_kl, token_logprobs
from rlhf_fn.tree import like, wide


def smoothed_cross_entropy(
    logits: Float[Tensor, "*batch vocab"],
    tokens: Int[Tensor, "*batch"],
    *,
    label_smoothing: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """`cross_entropy` against a target that leaves a share to all tokens alike, in nats.

    L = −(1 − ε) log π(y) − (ε/V) Σᵥ log πᵥ

    ε = 0 is `cross_entropy`; for ε > 0 a logit of −∞ makes it infinite. float32 from half
    precision.

    Raises: as `cross_entropy`; ValueError unless 0 ≤ ε < 1.

    Szegedy et al. 2016: https://arxiv.org/abs/1512.00567
    """
    checks.below_one(label_smoothing=label_smoothing)
    checks.fits(tokens, label_smoothing=label_smoothing)
    chosen = token_logprobs(logits, tokens)
    spread = logits.log_softmax(-1, dtype=wide(logits)).mean(-1)
    share = like(chosen, label_smoothing)
    return -(1 - share) * chosen - torch.where(share > 0, share * spread, 0.0)


def dft(logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Dynamic fine-tuning: cross-entropy without the 1/π by which it favours unlikely tokens.

    L = −sg[π] log π

    Wu et al. 2025: https://arxiv.org/abs/2508.05629
    """
    checks.floating(logprobs=logprobs)
    return -logprobs.detach().exp() * logprobs


def generalised_jsd(
    logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    *,
    beta: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Between the forward and the reverse KL divergence: bounded, over the vocabulary, in nats.

    D = β KL(p ‖ m) + (1 − β) KL(q ‖ m),   m = β p + (1 − β) q, p the teacher, q the student

    β = ½ is Jensen-Shannon. D vanishes at both ends: D/β → KL(p ‖ q) for β → 0, D/(1 − β) →
    KL(q ‖ p) for β → 1; for those take `full_kl`, as TRL does silently. float32 from half
    precision.

    Raises: ValueError unless the shapes agree and 0 < β < 1.

    Agarwal et al. 2023: https://arxiv.org/abs/2306.13649
    """
    checks.same_shape(logits=logits, teacher_logits=teacher_logits)
    checks.floating(logits=logits, teacher_logits=teacher_logits)
    checks.positive(beta=beta)
    checks.below_one(beta=beta)
    dtype = wide(logits)
    student, teacher = (
        logits.log_softmax(-1, dtype=dtype),
        teacher_logits.log_softmax(-1, dtype=dtype),
    )
    share = like(student, beta)
    lowest = torch.finfo(dtype).min  # −∞ − (−∞) has no gradient
    parts = share.log() + teacher, torch.log1p(-share) + student
    mixture = torch.logaddexp(*(x.clamp(min=lowest) for x in parts))
    return share * full_kl(teacher, mixture) + (1 - share) * full_kl(student, mixture)
