import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_fn.checks import same_shape


def suffix_scan(
    x: Float[Tensor, "*batch time"], decay: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """Solve yₜ = xₜ + decayₜ yₜ₊₁, with y = 0 past the end, in ⌈log₂ time⌉ vectorised passes.

    decay 1 sums suffixes, decay γ discounts them, and a position with x = 0 and decay = 1 repeats
    the next one, which is how a masked token is stepped over.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(x=x, decay=decay)
    stride, time = 1, x.shape[-1]
    while stride < time:
        x = x + decay * F.pad(x[..., stride:], (0, stride))
        decay = decay * F.pad(decay[..., stride:], (0, stride))
        stride *= 2
    return x
