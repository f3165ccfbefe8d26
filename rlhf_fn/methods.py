"""What a published method is made of; the methods themselves are the values in `recipes.py`.

A method is an immutable value that names its functions and their published settings. It prints as
the list of them, and a part is changed by `._replace(...)`. `method.loss(apply)` is its loss, so
`gradient_step(method.loss(apply), optimizer)` is its step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import logprobs as lp
from rlhf_fn.kl import k2
from rlhf_fn.losses import Apply, Loss, Penalty, Surrogate, policy_loss
from rlhf_fn.policy import policy_gradient
from rlhf_fn.returns import Gae, gae
from rlhf_fn.rewards import shape_rewards, whiten
from rlhf_fn.selection import trust_region_mask
from rlhf_fn.sequence import masked_sum, sum_log_ratio
from rlhf_fn.turns import length_adaptive_lam


class Samples(NamedTuple):
    """Answers to prompts, a group of them to each, and one score per answer.

    All but the scores are aligned with `tokens`; `mask` is True on the answers. `old_logprobs` are
    those they were sampled at, by the policy; where another engine drew them, `importance` is what
    each token weighs for that, and else 1. `ref_logprobs` and `greedy_scores`, what the likeliest
    answers are worth, are NaN where the method does not ask for them.
    """

    tokens: Int[Tensor, "prompts group time"]
    attention: Bool[Tensor, "prompts group time"]
    mask: Bool[Tensor, "prompts group time"]
    old_logprobs: Float[Tensor, "prompts group time"]
    ref_logprobs: Float[Tensor, "prompts group time"]
    importance: Float[Tensor, "prompts group time"]
    scores: Float[Tensor, "prompts group"]
    greedy_scores: Float[Tensor, " prompts"]


class Online(NamedTuple):
    """A method that learns from groups of the policy's own answers, without a critic.

    L = Σₜ wₜ (surrogateₜ + β penaltyₜ − c Hₜ),   A = advantages(samples),   w = weights(mask)

    Args:
        paper: who published it, and where.
        group: answers to each prompt.
        shaping: (scores, lengths in tokens) -> scores.
        advantages: `Samples` -> one per token, [prompts, group, time].
        keep: scores -> which prompts to learn from, a mask [prompts].
        rounds: how often more prompts are asked, at most, until a batch of them is kept.
        greedy: whether the likeliest answer is scored, too.
        surrogate: (logprobs, old_logprobs, advantages, mask) -> per token.
        penalty: (logprobs, ref_logprobs) -> per token.
        kl_coef: β of the penalty in the loss. A penalty in the rewards is part of `advantages`.
        entropy_coef: c, the bonus for entropy.
        weights: mask -> weights, of the same shape: how tokens are averaged.
        temperature: that answers are sampled and all log-probs are taken at.
        epochs: passes over the samples.
        minibatches: optimizer steps in a pass.
    """

    paper: str
    group: int
    shaping: Callable[[Tensor, Tensor], Tensor]
    advantages: Callable[[Samples], Tensor]
    keep: Callable[[Tensor], Tensor]
    rounds: int
    greedy: bool
    surrogate: Surrogate
    penalty: Penalty
    kl_coef: float
    entropy_coef: float
    weights: Callable[[Tensor], Tensor]
    temperature: float
    epochs: int
    minibatches: int

    def loss(self, apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
        """The loss of a model on a `PolicyBatch`."""
        return policy_loss(
            apply, surrogate=self.surrogate, penalty=self.penalty, kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef, temperature=self.temperature,
            token_logprobs=token_logprobs,
        )  # fmt: skip

    def __repr__(self) -> str:
        return described(self)


class ActorCritic(NamedTuple):
    """A method that learns from single answers of the policy, and values of a critic.

    rₜ = −β (log πₜ − log π_ref,ₜ) + score·[t is the last token];   A, R = estimate(r, V, mask)
    L = Σₜ wₜ (surrogateₜ − c Hₜ) − μ Σₜ vₜ log πₜ,   v = w of the answers with score > 0

    Args:
        paper: who published it, and where.
        kl_reward: β, of the penalty inside the reward, where it begins.
        target_kl: nats per answer that β is steered to; None keeps it.
        horizon: answers over which the steering forgets.
        estimate: (rewards, values, mask) -> `Gae`, the advantages of the actor and the critic's
            returns.
        surrogate: (logprobs, old_logprobs, advantages, mask) -> per token.
        entropy_coef: c, the bonus for entropy.
        imitation: μ, of the likelihood of good answers.
        value_clip: how far a value moves from its old one; inf does not clip.
        critic_first: iterations in which only the critic learns.
        weights: mask -> weights, of the same shape.
        temperature: that answers are sampled and all log-probs are taken at.
        epochs: passes over the samples.
        minibatches: optimizer steps in a pass.
        max_kl: the passes end once a minibatch's KL(old ‖ new), nats per token, is beyond it.
    """

    paper: str
    kl_reward: float
    target_kl: float | None
    horizon: float
    estimate: Callable[[Tensor, Tensor, Tensor], Gae]
    surrogate: Surrogate
    entropy_coef: float
    imitation: float
    value_clip: float
    critic_first: int
    weights: Callable[[Tensor], Tensor]
    temperature: float
    epochs: int
    minibatches: int
    max_kl: float

    def loss(self, apply: Apply, *, token_logprobs: Callable = lp.token_logprobs) -> Loss:
        """The actor's loss on an `ImitationBatch`, or a `PolicyBatch` where μ is 0."""
        return policy_loss(
            apply, surrogate=self.surrogate, penalty=k2, kl_coef=0.0,
            entropy_coef=self.entropy_coef, temperature=self.temperature,
            token_logprobs=token_logprobs,
        )  # fmt: skip

    def __repr__(self) -> str:
        return described(self)


def whitened_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float, lam: float
) -> Gae:
    """`gae`, and its advantages `whiten`ed over the batch."""
    advantages, returns = gae(rewards, values, mask, discount=discount, lam=lam)
    return Gae(whiten(advantages, mask, eps=1e-8, shift_mean=True), returns)


def length_adaptive_gae(rewards: Tensor, values: Tensor, mask: Tensor, *, alpha: float) -> Gae:
    """`gae` with `length_adaptive_lam` for the actor and λ = 1 for the critic, whitened; γ = 1."""
    lam = length_adaptive_lam(mask, alpha=alpha, dtype=rewards.dtype)
    advantages = gae(rewards, values, mask, discount=1.0, lam=lam).advantages
    whole = gae(rewards, values, mask, discount=1.0, lam=1.0)
    return Gae(whiten(advantages, mask, eps=1e-8, shift_mean=True), whole.returns)


def described(method: Any) -> str:
    """A method as a line for each of its parts, with functions by their names and settings."""
    width = max(map(len, method._fields))
    return "\n".join(f"{n:{width}}  {_text(x)}" for n, x in method._asdict().items())


def _text(x: Any) -> str:
    """clipped_surrogate(clip_low=0.2, clip_high=0.28)"""
    if isinstance(x, partial):
        given = (_text(v) if callable(v) else f"{k}={_text(v)}" for k, v in x.keywords.items())
        return f"{_text(x.func)}({', '.join(given)})"
    return getattr(x, "__name__", str(x))


# surrogates, called as (logprobs, old_logprobs, advantages, mask)


def of_answers(surrogate: Callable[..., Tensor], **hyperparameters: float) -> Surrogate:
    """A surrogate of the whole answer's log-ratio, which stands at each of its tokens."""
    return partial(answerwise, surrogate=partial(surrogate, **hyperparameters))


def answerwise(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: Callable[..., Tensor],
) -> Tensor:
    """surrogate(log w, 0, A),   log w = `sum_log_ratio`: average it by `sequence_mean`."""
    log_ratio = sum_log_ratio(logprobs, old_logprobs, mask)
    return surrogate(log_ratio, torch.zeros_like(log_ratio), advantages)


def score_function(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """`policy_gradient`: on fresh samples no ratio is needed."""
    return policy_gradient(logprobs, advantages)


def trusted(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    low: float,
    high: float,
) -> Tensor:
    """−ρₜ Aₜ where `trust_region_mask` of the divergence lets a token move, else 0."""
    gap = divergence(logprobs.detach(), old_logprobs)
    free = trust_region_mask(logprobs, old_logprobs, advantages, gap, low=low, high=high)
    ratio = (logprobs - old_logprobs).exp()
    return -torch.where(free, ratio, 0.0) * advantages


# scores, as they are and shaped


def as_scored(scores: Tensor, lengths: Tensor) -> Tensor:
    """The scores as they are."""
    return scores


def with_length(scores: Tensor, lengths: Tensor, *, penalty: Callable[..., Tensor]) -> Tensor:
    """The scores, and what `penalty(lengths)` adds to them."""
    return scores + penalty(lengths, dtype=scores.dtype)


def all_groups(scores: Tensor) -> Tensor:
    """Every prompt, also where all answers are worth the same."""
    return torch.ones_like(scores[..., 0], dtype=torch.bool)


# advantages of samples


def of_scores(samples: Samples, *, advantages: Callable[..., Tensor], beta: float = 0.0) -> Tensor:
    """One advantage per answer, at each of its tokens: advantages(score − β (log π − log π_ref)).

    The log-ratio is that of the whole answer, at the policy that sampled it.
    """
    return _at_tokens(advantages(_penalised(samples, beta)), samples)


def of_greedy_scores(
    samples: Samples, *, advantages: Callable[..., Tensor], beta: float = 0.0
) -> Tensor:
    """`of_scores`, of advantages(scores, scores of the likeliest answers)."""
    return _at_tokens(advantages(_penalised(samples, beta), samples.greedy_scores), samples)


def of_lengths(samples: Samples, *, advantages: Callable[..., Tensor], beta: float = 0.0) -> Tensor:
    """`of_scores`, of advantages(scores, lengths in tokens)."""
    return _at_tokens(advantages(_penalised(samples, beta), samples.mask.sum(-1)), samples)


def of_masked_scores(
    samples: Samples, *, advantages: Callable[..., Tensor], beta: float = 0.0
) -> Tensor:
    """advantages(scores, mask): one per token already."""
    return advantages(_penalised(samples, beta), samples.mask)


def of_token_rewards(samples: Samples, *, advantages: Callable[..., Tensor], beta: float) -> Tensor:
    """advantages(rewards, mask), where rewards are `shape_rewards`: the penalty is per token."""
    rewards = shape_rewards(
        samples.scores, samples.old_logprobs, samples.ref_logprobs, samples.mask, beta=beta
    )
    return advantages(rewards, samples.mask)


def _penalised(samples: Samples, beta: float) -> Tensor:
    if beta == 0:
        return samples.scores
    log_ratio = masked_sum(samples.old_logprobs - samples.ref_logprobs, samples.mask)
    return samples.scores - beta * log_ratio


def _at_tokens(advantages: Tensor, samples: Samples) -> Tensor:
    return torch.where(samples.mask, advantages[..., None], 0.0)
