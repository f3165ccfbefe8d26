"""One uniform number of a key, as `rlhf_fn.random` has it: in kernels, and on a CPU.

Threefry-2x32 with 20 rounds (Salmon et al. 2011: https://doi.org/10.1145/2063384.2063405) of the
first counter of the stream of `rlhf_fn.random.bits`.
"""

import numpy as np
import triton
import triton.language as tl
from torch import Tensor, from_numpy

COUNTER = 0x80000000
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@triton.jit
def _round(x0, x1, R: tl.constexpr):
    x0 = x0 + x1
    return x0, ((x1 << R) | (x1 >> (32 - R))) ^ x0


@triton.jit
def _odd(x0, x1):
    x0, x1 = _round(x0, x1, 13)
    x0, x1 = _round(x0, x1, 15)
    x0, x1 = _round(x0, x1, 26)
    return _round(x0, x1, 6)


@triton.jit
def _even(x0, x1):
    x0, x1 = _round(x0, x1, 17)
    x0, x1 = _round(x0, x1, 29)
    x0, x1 = _round(x0, x1, 16)
    return _round(x0, x1, 24)


@triton.jit
def unit(key):
    """u in (0, 1), float64, of the two words of one key."""
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    k2 = k0 ^ k1 ^ tl.full([], 0x1BD11BDA, tl.uint32)
    x0, x1 = _odd(k0 + tl.full([], 0x80000000, tl.uint32), k1)
    x0, x1 = _even(x0 + k1, x1 + k2 + 1)
    x0, x1 = _odd(x0 + k2, x1 + k0 + 2)
    x0, x1 = _even(x0 + k0, x1 + k1 + 3)
    x0, x1 = _odd(x0 + k1, x1 + k2 + 4)
    return ((x0 + k2).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2⁻³²


def units(keys: Tensor) -> Tensor:
    """`unit` of each row of `keys` [rows, 2]; a hundred small steps are cheaper in NumPy."""
    k0, k1 = keys.numpy().astype(np.uint32).T
    schedule = k0, k1, k0 ^ k1 ^ np.uint32(PARITY)
    x0, x1 = k0 + np.uint32(COUNTER), k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(r) | x1 >> np.uint32(32 - r)) ^ x0
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return from_numpy((x0.astype(np.float64) + 0.5) * 2.0**-32)
