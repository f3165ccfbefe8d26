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
    _check_tokens("logits", logits, tokens)
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


def linear_token_logprobs(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    tokens: Int[Tensor, "*batch"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    temperature: float | Tensor = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "*batch"]:
    """`token_logprobs(hidden @ weight.T + bias, tokens)` that never holds `[*batch, vocab]`.

    log π(y) = z_y − log Σᵥ exp zᵥ,   zᵥ = (h·Wᵥ + bᵥ)/τ

    The sum runs over `chunk` tokens of the vocabulary at a time, and once more in the backward
    pass; all of it in float32 or wider. Every transform of `torch.func` composes; from the second
    derivative on, reverse mode keeps the logits.

    Args:
        chunk: changes the memory and not the result; None is an eighth of the vocabulary, at most
            4096.

    Raises: as `token_logprobs`; ValueError unless `chunk` is positive.
    """
    _check_tokens("hidden", hidden, tokens, vocab=weight.shape[0])
    checks.positive(temperature=temperature)
    chunk = min(-(-weight.shape[0] // 8), 4096) if chunk is None else chunk
    checks.count(least=1, chunk=chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    hidden, bias = hidden.to(wide) / temperature, bias.to(wide) / temperature
    chosen = tokens.long()
    logit = (hidden * weight[chosen].to(wide)).sum(-1) + bias[chosen]
    rows = hidden.reshape(-1, hidden.shape[-1])
    return logit - _linear_logsumexp(rows, weight, bias, chunk).reshape(tokens.shape)


class _LinearLogsumexp(torch.autograd.Function):
    """log Σᵥ exp(h·Wᵥ + bᵥ), one chunk of the vocabulary at a time.

    With πᵥ = exp(h·Wᵥ + bᵥ − out) and a gradient g of the output: dh = g Σᵥ πᵥ Wᵥ,
    dWᵥ = Σ g πᵥ h, dbᵥ = Σ g πᵥ. All plain operations, so torch derives the vmap rule and the
    higher derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden, weight, bias, chunk):
        out = torch.full_like(hidden[:, 0], -torch.inf)
        for w, b in zip(weight.split(chunk), bias.split(chunk)):
            out = torch.logaddexp(out, (hidden @ w.to(hidden.dtype).mT + b).logsumexp(-1))
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.chunk = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, out = ctx.saved_tensors
        d_hidden, d_weight, d_bias = torch.zeros_like(hidden), [], []
        for w, b in zip(weight.split(ctx.chunk), bias.split(ctx.chunk)):
            wide = w.to(hidden.dtype)
            # [vocab, tokens]: the compiler may not share the forward pass's logits, and keep them
            mass = (wide @ hidden.mT + b[:, None] - out).exp() * grad
            d_hidden = d_hidden + mass.mT @ wide
            if ctx.needs_input_grad[1]:
                d_weight.append((mass @ hidden).to(weight.dtype))
            d_bias.append(mass.sum(-1))
        return d_hidden, torch.cat(d_weight) if d_weight else None, torch.cat(d_bias), None

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, d_bias, _):
        hidden, weight, bias, out = ctx.saved_tensors
        total = torch.zeros_like(out)
        chunks = zip(*(x.split(ctx.chunk) for x in (weight, bias, d_weight, d_bias)))
        for w, b, d_w, d_b in chunks:
            w, d_w = w.to(hidden.dtype), d_w.to(hidden.dtype)
            probs = (hidden @ w.mT + b - out[..., None]).exp()
            total = total + (probs * (d_hidden @ w.mT + hidden @ d_w.mT + d_b)).sum(-1)
        return total


# Without this, Dynamo (torch <= 2.13) inlines `forward` under torch.func.grad and drops `backward`:
# https://github.com/pytorch/pytorch/issues/193279
@torch.compiler.allow_in_graph
def _linear_logsumexp(hidden: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Tensor:
    return _LinearLogsumexp.apply(hidden, weight, bias, chunk)  # type: ignore[return-value]


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """z/τ in float32 or wider; −∞ stays −∞ and gives a tensor τ no gradient."""
    checks.positive(temperature=temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not isinstance(temperature, Tensor):
        return logits if temperature == 1 else logits / temperature
    banned = logits == -torch.inf
    return torch.where(banned, -torch.inf, torch.where(banned, 0.0, logits) / temperature)


def _check_tokens(name: str, rows: Tensor, tokens: Tensor, vocab: int | None = None) -> None:
    checks.token_ids(tokens, rows.shape[-1] if vocab is None else vocab)
    if rows.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{name} and tokens: got {name} {tuple(rows.shape)} and tokens {tuple(tokens.shape)}, "
            f"expected the leading axes of {name} to be the shape of tokens"
        )
