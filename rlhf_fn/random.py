"""Randomness as a function of a key: no generator, no global state, nothing to save or restore.

A key is int64 `[2]`, two 32-bit words; its leading axes are free, one stream for each key. A key
is used once or split, never both. Everything is integer arithmetic on tensors, so it vmaps,
compiles to one graph and gives the same bits on every device.

The hash is Threefry-2x32 with 20 rounds, a bijection of a 64-bit counter under a 64-bit key;
Salmon et al. 2011: https://doi.org/10.1145/2063384.2063405. The counters of `bits`, `split` and
`fold_in` are disjoint, so nothing that one returns is returned by another.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from rlhf_fn import checks

_WORD = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_BITS, _SPLIT = 0x80000000, 0x80000001  # high words that no sensible fold_in data has


def key(seed: int, *, device: torch.device | str | None = None) -> Int64[Tensor, " 2"]:
    """The key of a seed in [0, 2⁶⁴).

    Raises:
        TypeError: `seed` is not an int.
        ValueError: `seed` is negative or has more than 64 bits.
    """
    checks.count(least=0, seed=seed)
    if seed >> 64:
        raise ValueError(f"seed must be below 2**64, got {seed}; hash it down to 64 bits first")
    return torch.tensor([seed >> 32, seed & _WORD], device=device)


def split(key: Int64[Tensor, "*keys 2"], num: int = 2) -> Int64[Tensor, "*keys num 2"]:
    """`num` independent keys; the first ones do not depend on `num`."""
    checks.count(least=0, num=num)
    return torch.stack(_block(key, _SPLIT, num), -1)


def fold_in(
    key: Int64[Tensor, "*keys 2"], data: int | Int[Tensor, "*data"]
) -> Int64[Tensor, "*out 2"]:
    """The key of item number `data` (a step, a row, a position); distinct data, distinct keys.

    `data` is one integer for every key, or one for each key of `key`; or `key` is one key and
    `data` has any shape. Integers are told apart over [−2⁶², 2⁶³).

    Raises:
        TypeError: `data` does not hold integers.
        ValueError: both have leading axes, and they differ.
    """
    k0, k1 = _words(key)
    if isinstance(data, Tensor):
        checks.integers(data=data)
        if data.ndim and k0.ndim and data.shape != k0.shape:
            raise ValueError(
                f"data must be one integer or one for each key, got data {tuple(data.shape)} for "
                f"keys {tuple(k0.shape)}"
            )
        data = data.long()
    else:
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    return torch.stack(torch.broadcast_tensors(*_threefry(k0, k1, data >> 32 & _WORD, data)), -1)


def bits(key: Int64[Tensor, "*keys 2"], shape: Sequence[int] = ()) -> Int64[Tensor, "..."]:
    """Uniform integers in [0, 2³²) of shape `[*keys, *shape]`."""
    size = torch.Size(shape)
    words = torch.stack(_block(key, _BITS, (size.numel() + 1) // 2), -1)
    return words.flatten(-2)[..., : size.numel()].unflatten(-1, size) if size else words[..., 0, 0]


def uniform(key: Int64[Tensor, "*keys 2"], shape: Sequence[int] = ()) -> Float32[Tensor, "..."]:
    """Uniform multiples of 2⁻²⁴ in [0, 1), float32 of shape `[*keys, *shape]`."""
    return (bits(key, shape) >> 8).to(torch.float32) * 2.0**-24


def gumbel(key: Int64[Tensor, "*keys 2"], shape: Sequence[int] = ()) -> Float32[Tensor, "..."]:
    """−log(−log u), u uniform in (0, 1): always finite, in [−3.2, 22.9]; float32.

    argmax(logits + gumbel) is a sample of the categorical distribution.
    """
    return -torch.log(-torch.log(_open_unit(key, shape))).to(torch.float32)


def normal(key: Int64[Tensor, "*keys 2"], shape: Sequence[int] = ()) -> Float32[Tensor, "..."]:
    """√2 erf⁻¹(2u − 1), u uniform in (0, 1): standard normal, within ±6.4; float32."""
    return (2**0.5 * torch.erfinv(2 * _open_unit(key, shape) - 1)).to(torch.float32)


def permutation(key: Int64[Tensor, "*keys 2"], n: int) -> Int64[Tensor, "*keys n"]:
    """A uniformly random order of 0, ..., n − 1 for each key."""
    checks.count(least=0, n=n)
    high, low = bits(key, (n, 2)).unbind(-1)
    return torch.argsort((high << 31) ^ low, dim=-1, stable=True)


def _open_unit(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Odd multiples of 2⁻³³: float64, symmetric about ½, never 0 or 1."""
    return (bits(key, shape).to(torch.float64) + 0.5) * 2.0**-32


def _block(key: Tensor, stream: int, n: int) -> tuple[Tensor, Tensor]:
    """Words of counters (stream, 0), ..., (stream, n − 1): `[*keys, n]` each."""
    if n > _WORD:
        raise ValueError(f"one key gives at most 2**32 blocks, got {n}; split the key")
    k0, k1 = _words(key)
    low = torch.arange(n, device=key.device)
    return _threefry(k0[..., None], k1[..., None], torch.full_like(low, stream), low)


def _words(key: Tensor) -> tuple[Tensor, Tensor]:
    if key.dtype != torch.int64:
        raise TypeError(f"key must be int64, got {key.dtype}; make one with random.key(seed)")
    if key.ndim == 0 or key.shape[-1] != 2:
        raise ValueError(
            f"key must have shape [..., 2], got {tuple(key.shape)}; make one with random.key(seed)"
        )
    return key[..., 0], key[..., 1]


def _threefry(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 of 32-bit words held in int64; x0 is cut to its word only at the end."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + k0, (x1 + k1) & _WORD
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r | x1 >> 32 - r) ^ x0) & _WORD
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = (x1 + schedule[(i + 2) % 3] + i + 1) & _WORD
    return x0 & _WORD, x1
