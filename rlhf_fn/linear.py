"""Log-probs from hidden states: the output projection and the log-softmax, without the logits.

A module of its own because it registers with the compiler, whose import takes a second: `rlhf_fn`
imports it when it is first asked for a name of it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import checks


class Statistics(NamedTuple):
    logprobs: Float[Tensor, "*batch"]
    entropy: Float[Tensor, "*batch"]


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
    return _statistics(hidden, weight, tokens, bias, temperature, chunk, False)[0]


def linear_token_logprobs_and_entropy(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocab width"],
    tokens: Int[Tensor, "*batch"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    temperature: float | Tensor = 1.0,
    chunk: int | None = None,
) -> Statistics:
    """`linear_token_logprobs`, and the `entropy` of the same distribution from the same products.

    H = −Σᵥ πᵥ log πᵥ,   which merges chunk by chunk: H = Σ_c P_c (H_c − log P_c), P_c = Σ_{v∈c} πᵥ

    Arguments and errors as `linear_token_logprobs`.
    """
    return Statistics(*_statistics(hidden, weight, tokens, bias, temperature, chunk, True))


def _statistics(hidden, weight, tokens, bias, temperature, chunk, entropy):
    checks.row_tokens("hidden", hidden, tokens, vocab=weight.shape[0])
    checks.positive(temperature=temperature)
    chunk = min(-(-weight.shape[0] // 8), 4096) if chunk is None else chunk
    checks.count(least=1, chunk=chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    hidden, bias = hidden.to(wide) / temperature, bias.to(wide) / temperature
    chosen = tokens.long()
    logit = (hidden * weight[chosen].to(wide)).sum(-1) + bias[chosen]
    rows = hidden.reshape(-1, hidden.shape[-1])
    total, entropies = _linear_sums(rows, weight, bias, chunk, entropy)
    return logit - total.reshape(tokens.shape), entropies.reshape(tokens.shape)


class _LinearSums(torch.autograd.Function):
    """L = log Σᵥ exp zᵥ and H (0 unless asked for), z = h·Wᵥ + bᵥ, a chunk of it at a time.

    With πᵥ = exp(zᵥ − L), ∂L/∂zᵥ = πᵥ and ∂H/∂zᵥ = −πᵥ (log πᵥ + H); of z they go on to h, W and
    b as of any linear layer. All plain operations, so torch derives the vmap rule and the higher
    derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden, weight, bias, chunk, entropy):
        total, entropies = torch.full_like(hidden[:, 0], -torch.inf), torch.zeros_like(hidden[:, 0])
        for w, b in zip(weight.split(chunk), bias.split(chunk)):
            z = hidden @ w.to(hidden.dtype).mT + b
            part = z.logsumexp(-1)
            both = torch.logaddexp(total, part)
            if entropy:
                inside = _entropy(z, part[:, None], 0.0).sum(-1)
                entropies = _entropy(total, both, entropies) + _entropy(part, both, inside)
            total = both
        return total, entropies

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.chunk, ctx.entropy = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        hidden, weight, bias, total, entropies = ctx.saved_tensors
        d_hidden, d_weight, d_bias = torch.zeros_like(hidden), [], []
        for w, b in zip(weight.split(ctx.chunk), bias.split(ctx.chunk)):
            wide = w.to(hidden.dtype)
            # [vocab, tokens]: the compiler may not share the forward pass's logits, and keep them
            logp = wide @ hidden.mT + b[:, None] - total
            mass = logp.exp() * grad
            if ctx.entropy:
                mass = mass + _entropy_slope(logp, entropies) * grad_entropy
            d_hidden = d_hidden + mass.mT @ wide
            if ctx.needs_input_grad[1]:
                d_weight.append((mass @ hidden).to(weight.dtype))
            d_bias.append(mass.sum(-1))
        return d_hidden, torch.cat(d_weight) if d_weight else None, torch.cat(d_bias), None, None

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, d_bias, *_):
        hidden, weight, bias, total, entropies = ctx.saved_tensors
        d_total, d_entropies = torch.zeros_like(total), torch.zeros_like(total)
        chunks = zip(*(x.split(ctx.chunk) for x in (weight, bias, d_weight, d_bias)))
        for w, b, d_w, d_b in chunks:
            w, d_w = w.to(hidden.dtype), d_w.to(hidden.dtype)
            logp = hidden @ w.mT + b - total[..., None]
            d_z = d_hidden @ w.mT + hidden @ d_w.mT + d_b
            d_total = d_total + (logp.exp() * d_z).sum(-1)
            if ctx.entropy:
                slopes = _entropy_slope(logp, entropies[..., None])
                d_entropies = d_entropies + (slopes * d_z).sum(-1)
        return d_total, d_entropies


def _entropy(x: Tensor, total: Tensor, inside: Tensor | float) -> Tensor:
    """p (H − log p) of a part with log-mass x of `total` and entropy H inside; 0 if it has none."""
    logp = torch.where(x == -torch.inf, 0.0, x - total)
    return torch.where(x == -torch.inf, 0.0, logp.exp() * (inside - logp))


def _entropy_slope(logp: Tensor, entropy: Tensor) -> Tensor:
    """∂H/∂z = −π (log π + H); 0 where π is."""
    p = logp.exp()
    return -p * torch.where(p > 0, logp + entropy, 0.0)


# Without this, Dynamo (torch <= 2.13) inlines `forward` under torch.func.grad and drops `backward`:
# https://github.com/pytorch/pytorch/issues/193279
@torch.compiler.allow_in_graph
def _linear_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor, chunk: int, entropy: bool
) -> tuple[Tensor, Tensor]:
    return _LinearSums.apply(hidden, weight, bias, chunk, entropy)  # type: ignore[return-value]
