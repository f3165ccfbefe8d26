"""Log-probs from hidden states: the output projection and the log-softmax, without the logits.

A module of its own because it registers with the compiler, whose import takes a second:
`rlhf_fn.linear_token_logprobs` imports it when first asked for.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import checks


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
