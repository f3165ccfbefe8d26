"""Log-probabilities of tokens, from logits or from hidden states, and what is said of them.

Half precision is computed and returned in float32. A logit of −∞ bans its token: the others stay
finite, forward and backward. `temperature` divides the logits, as the sampler does, so training
and sampling speak of the same distribution.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import checks


def token_logprobs(
    logits: Float[Tensor, "*batch vocab"],
    tokens: Int[Tensor, "*batch"],
    *,
    temperature: float | Tensor = 1.0,
) -> Float[Tensor, "*batch"]:
    """The log-probability of each token under its own row of logits, in nats.

    log π(y) = z_y/τ − log Σᵥ exp(zᵥ/τ)

    Logits and tokens are already aligned: nothing is shifted here.

    Raises: ValueError where a token is outside [0, vocab), the leading shapes differ or τ ≤ 0;
    TypeError unless tokens are integers.
    """
    checks.row_tokens("logits", logits, tokens)
    logprobs = _tempered(logits, temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None].long()).squeeze(-1)


def cross_entropy(
    logits: Float[Tensor, "*batch vocab"], tokens: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """The per-token loss of supervised fine-tuning, −log π(y), in nats.

    Raises: as `token_logprobs`.
    """
    return -token_logprobs(logits, tokens)


def entropy(
    logits: Float[Tensor, "*batch vocab"], *, temperature: float | Tensor = 1.0
) -> Float[Tensor, "*batch"]:
    """The entropy of each row of logits, in nats.

    H = −Σᵥ πᵥ log πᵥ,   π = softmax(z/τ),   0 log 0 = 0

    Raises: ValueError unless τ > 0.
    """
    logprobs = _tempered(logits, temperature).log_softmax(-1)
    probs = logprobs.exp()
    return -(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)


def full_kl(
    logits: Float[Tensor, "*batch vocab"], ref_logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """The exact KL divergence from the reference, over the whole vocabulary, in nats.

    KL(π ‖ π_ref) = Σᵥ πᵥ (log πᵥ − log π_ref,ᵥ),   0 (log 0 − x) = 0

    A token that both ban counts for nothing; one that only the reference bans makes it +∞.

    Raises: ValueError unless the shapes agree.
    """
    checks.same_shape(logits=logits, ref_logits=ref_logits)
    logprobs = _tempered(logits, 1.0).log_softmax(-1)
    ref_logprobs = _tempered(ref_logits, 1.0).log_softmax(-1)
    probs = logprobs.exp()
    return (probs * torch.where(probs > 0, logprobs - ref_logprobs, 0.0)).sum(-1)


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """z/τ in float32 or wider; −∞ stays −∞ and gives a tensor τ no gradient."""
    checks.floating(logits=logits)
    checks.positive(temperature=temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not isinstance(temperature, Tensor):
        return logits if temperature == 1 else logits / temperature
    banned = logits == -torch.inf
    return torch.where(banned, -torch.inf, torch.where(banned, 0.0, logits) / temperature)
