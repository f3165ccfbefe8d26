"""Log-probabilities and entropies of tokens from hidden states, without the logits.

x = h Wᵀ + b, and log π(y), H of x as in `logprobs.py`, from sums over tiles of x.
∂/∂h = ∂/∂x W,   ∂/∂W = (∂/∂x)ᵀ h,   ∂/∂b = Σ ∂/∂x

Backward is two products of matrices if forward kept e^u, u = (z − c)/τ, for then

∂ log π(y)/∂x_v = −e^{u_v}/(τ Σ e^u),   v ≠ y;   Σ_{v≠y} e^{u_v}/(τ Σ e^u),   v = y

is what is kept, up to a factor of the row (at y, −Σ_{v≠y} e^{u_v} is kept), and that of H is read
off it, log π_v = log e^{u_v} − log Σ e^u. Else it is three: the logits are computed again, of a
part of the vocabulary at a time. So 6·N·D·V or 8·N·D·V FLOPs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import linear_cpu, linear_kernels, rows
from rlhf_kernels import linear_tiles as tiles
from rlhf_kernels.logprobs import Statistics
from rlhf_kernels.registration import differentiable, operator


class Hits(NamedTuple):
    logprobs: Tensor
    hits: Tensor


# the operators

_ARGUMENTS = (
    "Tensor h, Tensor w, Tensor? b, Tensor y, Tensor? scale, float softcap, bool full, bool keep,"
    " int memory"
)
_PER_ROW = "Tensor logp, Tensor entropy, Tensor centre, Tensor total, Tensor rest, Tensor kept"
_WEIGHTS = (1, 2)


def _fake_forward(h, w, b, y, scale, softcap, full, keep, memory):
    size = linear_cpu.kept_shape(y.shape[-1], w.shape[-2], keep)
    per_row = [y.new_empty(y.shape, dtype=rows.accumulator(h)) for _ in range(7)]
    return *per_row, h.new_empty(*y.shape[:-1], *size)


def _fake_backward(h, w, b, y, *others):
    each = zip((h, w, b), others[-3:])
    return tuple(x.new_empty(x.shape) if of else h.new_empty(*y.shape[:-1], 0) for x, of in each)


_GRADIENT = differentiable(
    operator(
        f"linear_logprobs_gradient({_ARGUMENTS}, {_PER_ROW}, Tensor g, Tensor gh, Tensor gz,"
        " bool of_h, bool of_w, bool of_b) -> (Tensor, Tensor, Tensor)",
        tiles.over_leads(
            rows.dispatch(linear_kernels.backward, linear_cpu.backward),
            _WEIGHTS,
            lambda *args: not (args[-2] or args[-1]),  # each has a weight's gradient of its own
        ),
        _fake_backward,
    ),
    linear_cpu.gradient,
)


def _gradients(args, outputs, upstream, wanted):
    logp, entropy, _, _, *hints = outputs
    asked = (i in wanted for i in range(3))
    return _GRADIENT(*args, logp, entropy, *hints, *upstream[:3], *asked)


_STATISTICS = differentiable(
    operator(
        f"linear_logprobs({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
        tiles.over_leads(rows.dispatch(linear_kernels.forward, linear_cpu.forward), _WEIGHTS),
        _fake_forward,
    ),
    linear_cpu.statistics,
    {(0, 1, 2): _gradients},
    hints=4,
)


def statistics(hidden, weight, tokens, bias, temperature, softcap, memory, full):
    """(log π, H, z_y/τ) or, without `full`, (log π, whether no token has a higher logit)."""
    logits = tiles.checked(hidden, weight, bias, memory)
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden and tokens: got hidden {tuple(hidden.shape)} and tokens "
            f"{tuple(tokens.shape)}, expected [*batch, width] and [*batch]"
        )
    rows.check(logits, tokens, softcap)
    scale = rows.per_row(temperature, logits)
    given = [x for x in (hidden, weight, bias) if x is not None]
    keep = (
        torch.is_grad_enabled() and any(x.requires_grad for x in given)
        and not softcap and hidden.dtype != torch.float16  # e^u needs the exponent
        and tokens.numel() * (len(weight) + full * tiles.LEAST) * hidden.itemsize <= memory
    )  # fmt: skip
    outputs = _STATISTICS(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, tokens.reshape(-1),
        None if scale is None else scale.reshape(-1), softcap or 0.0, full, keep, memory,
    )  # fmt: skip
    logp, entropy, logit, hits = (x.view(tokens.shape) for x in outputs[:4])
    return (logp, entropy, logit) if full else (logp, hits.bool())


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *,
    temperature: float | Tensor = 1.0, softcap: float | None = None, memory: int = 2**28,
) -> Tensor:  # fmt: skip
    """The log-probability of each token under a linear layer and a softmax, in nats.

    log π(y) = z_y − log Σᵥ exp zᵥ,   z = x/τ, or c tanh(x/c)/τ with a softcap c,   x = h Wᵀ + b

    `token_logprobs(hidden @ weight.T + bias, tokens)`, and `[*batch, vocab]` is never held. Sums,
    and the result, are float32 for half precision and float64 for float64. Gradients for `hidden`,
    `weight` and `bias`, each only if asked; rows without an upstream gradient are not read.
    Forward-mode and second derivatives are those of the plain formula, at its memory.

    Args:
        hidden: h, `[*batch, width]`.
        weight: W, `[vocab, width]`, of hidden's dtype.
        tokens: y, `[*batch]`, int64 or int32.
        bias: b, `[vocab]`; −∞ bans a token.
        temperature: τ, one number or one per row, `[*batch, 1]`.
        memory: bytes that may be held beside the arguments, the gradients and vectors of a row; on
            a CPU at least 12 for each of 256 logits of a row.
            If e^u of all tokens fits, in hidden's dtype, it is kept for the backward pass, which
            then is two products of matrices; else, and for a softcap or float16, that computes the
            logits again, as many at a time as fit. The result is the same but for rounding.

    Raises: TypeError, ValueError as `token_logprobs`, and for a weight or a bias that does not fit,
    or a `memory` in which not even 256 tokens of the vocabulary have room.
    """
    return statistics(hidden, weight, tokens, bias, temperature, softcap, memory, False)[0]


def linear_token_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *,
    temperature: float | Tensor = 1.0, softcap: float | None = None, memory: int = 2**28,
) -> Statistics:  # fmt: skip
    """`linear_token_logprobs` and the entropy in the same pass, with the gradients of both.

    H = −Σᵥ πᵥ log πᵥ in nats. To keep e^u takes `memory` for 256 logits of a row more.
    """
    both = statistics(hidden, weight, tokens, bias, temperature, softcap, memory, True)
    return Statistics(*both[:2])


def linear_token_logprobs_and_hits(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None = None, *,
    temperature: float | Tensor = 1.0, softcap: float | None = None, memory: int = 2**28,
) -> Hits:  # fmt: skip
    """`linear_token_logprobs`, and in the same pass whether each token is the likeliest of its row.

    hit = z_y ≥ maxᵥ zᵥ, a bool: several tokens may be likeliest, and logits that differ by a
    rounding may count as equal or not. Where log π(y) is no number nothing is hit.
    """
    return Hits(*statistics(hidden, weight, tokens, bias, temperature, softcap, memory, False))
