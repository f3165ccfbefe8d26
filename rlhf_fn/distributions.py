"""Categorical and normal distributions, on their parameters. Nothing is reduced over the batch.

Log-probs, entropies and divergences of half precision are computed and returned in float32. The
leading axes of `key` are the leading axes of the parameters: one key draws the whole batch, one
key per row makes each row's draw its own.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from rlhf_fn import checks, random
from rlhf_fn.tree import wide

_BLOCK = 256  # of a vocabulary: few sums, and few terms within each


def categorical_sample(
    logits: Float[Tensor, "*batch vocab"], key: Int64[Tensor, "*keys 2"]
) -> Int64[Tensor, "*batch"]:
    """The first a with Σᵢ≤ₐ pᵢ > u, u uniform in (0, 1), p = softmax(logits).

    Never draws an action of probability 0.

    Raises:
        ValueError: the leading axes of `key` are not those of `logits`.
    """
    checks.floating(logits=logits)
    z = logits.to(wide(logits))
    return _sample_and_log_prob(z - z.amax(-1, keepdim=True), key)[0]


def _sample_and_log_prob(
    z: Float[Tensor, "*batch vocab"], key: Int64[Tensor, "*keys 2"]
) -> tuple[Int64[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """What `categorical_sample` draws, and its log p(a) = zₐ − log Σᵢ exp zᵢ, where max z = 0.

    Inverts the distribution function, in float64: one random number for a draw where Gumbel noise
    needs one for each of the vocabulary. Sums are those of blocks, then those within one of them,
    whose exponentials are taken again: nothing of the size of the logits is written.

    Raises:
        ValueError: the leading axes of `key` are not those of `z`.
    """
    u = random._open_unit(key, _rest(z.shape[:-1], key, "logits"))
    size = z.shape[-1]
    whole = size - size % _BLOCK
    blocks = z[..., :whole].unflatten(-1, (whole // _BLOCK, _BLOCK)), z[..., None, whole:]
    ends = torch.cat([x.exp().sum(-1, dtype=torch.float64) for x in blocks], -1).cumsum(-1)
    total = ends[..., -1:]
    sought = u[..., None] * total
    block = (ends <= sought).sum(-1, keepdim=True)
    before = F.pad(ends, (1, 0)).gather(-1, block)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=z.device)
    z = torch.where(ids < size, z.gather(-1, ids.clamp(max=size - 1)), -torch.inf)
    inside = z.exp().cumsum(-1, dtype=torch.float64)
    short = (inside <= sought - before) & (inside < inside[..., -1:])  # which may round less
    place = short.sum(-1, keepdim=True)
    log_prob = (z.gather(-1, place) - total.log()).to(z.dtype)
    return (block * _BLOCK + place)[..., 0], log_prob[..., 0]


def categorical_log_prob(
    logits: Float[Tensor, "*batch vocab"], actions: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """log p(a) = logitsₐ − log Σᵢ exp logitsᵢ.

    Raises:
        TypeError: `actions` does not hold integers.
        ValueError: the shapes disagree, or an action lies outside of [0, vocab).
    """
    _check_shape(actions, logits.shape[:-1], "actions", "of the shape of logits[..., 0]")
    checks.token_ids(actions, logits.shape[-1], name="actions")
    return _log_softmax(logits).gather(-1, actions.long()[..., None])[..., 0]


def categorical_entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """H = −Σᵢ pᵢ log pᵢ, in nats, with 0 log 0 = 0: logits may be −inf."""
    log_p = _log_softmax(logits)
    return -(log_p.exp() * torch.where(log_p > -math.inf, log_p, 0.0)).sum(-1)


def categorical_kl(
    logits: Float[Tensor, "*batch vocab"], ref_logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) = Σᵢ pᵢ (log pᵢ − log qᵢ) in nats, q that of `ref_logits`, 0 log 0 = 0.

    Infinite where q rules out what p allows.

    Raises:
        ValueError: the shapes differ.
    """
    checks.same_shape(logits=logits, ref_logits=ref_logits)
    log_p, log_q = _log_softmax(logits), _log_softmax(ref_logits)
    support = log_p > -math.inf
    ratio = torch.where(support, log_p, 0.0) - torch.where(support, log_q, 0.0)
    return (log_p.exp() * ratio).sum(-1)


def normal_sample(
    mean: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"], key: Int64[Tensor, "*keys 2"]
) -> Float[Tensor, "*batch"]:
    """a = μ + σ ε, ε standard normal: differentiable in μ and σ.

    Raises:
        ValueError: the shapes differ, or the leading axes of `key` are not those of `mean`.
    """
    checks.same_shape(mean=mean, scale=scale)
    return mean + scale * random.normal(key, _rest(mean.shape, key, "mean")).to(mean.dtype)


def normal_log_prob(
    mean: Float[Tensor, "*batch"], scale: Float[Tensor, "*batch"], actions: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """log p(a) = −½ ((a − μ) / σ)² − log σ − ½ log 2π, for each dimension.

    Raises:
        ValueError: the shapes differ.
    """
    checks.same_shape(mean=mean, scale=scale, actions=actions)
    mean, scale, actions = (x.to(wide(x)) for x in (mean, scale, actions))
    return -0.5 * ((actions - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def normal_entropy(scale: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """H = log σ + ½ log 2πe, in nats, for each dimension."""
    return scale.to(wide(scale)).log() + 0.5 * math.log(2 * math.pi * math.e)


def normal_kl(
    mean: Float[Tensor, "*batch"],
    scale: Float[Tensor, "*batch"],
    ref_mean: Float[Tensor, "*batch"],
    ref_scale: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) = log(σ_q / σ_p) + (σ_p² + (μ_p − μ_q)²) / 2σ_q² − ½, for each dimension.

    Raises:
        ValueError: the shapes differ.
    """
    checks.same_shape(mean=mean, scale=scale, ref_mean=ref_mean, ref_scale=ref_scale)
    mean, scale, ref_mean, ref_scale = (x.to(wide(x)) for x in (mean, scale, ref_mean, ref_scale))
    ratio, shift = scale / ref_scale, (mean - ref_mean) / ref_scale
    return 0.5 * (ratio**2 + shift**2 - 1) - ratio.log()


def _log_softmax(logits: Tensor) -> Tensor:
    checks.floating(logits=logits)
    return logits.log_softmax(-1, dtype=wide(logits))


def _check_shape(x: Tensor, expected: torch.Size, name: str, of: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must be {of}, {tuple(expected)}, got {tuple(x.shape)}")


def _rest(batch: torch.Size, key: Tensor, name: str) -> torch.Size:
    """The axes of `batch` that come after those of `key`."""
    keys = key.shape[:-1]
    if batch[: len(keys)] != keys:
        raise ValueError(
            f"the leading axes of key, {tuple(keys)}, must be those of {name}, {tuple(batch)}; "
            "split or fold the key"
        )
    return batch[len(keys) :]
