"""What can be wrong with arguments along time, and costs no synchronisation to see.

The errors are those of floor 0. Numbers are read on a CPU only, where they can be.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether values can be looked at: on a CPU, not while they are traced or mapped over."""
    return not (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or isinstance(x, torch._subclasses.FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def same_shape(**tensors: Tensor) -> None:
    """Raise a `ValueError` unless all shapes agree."""
    first, *others = tensors.values()
    if any(x.shape != first.shape for x in others):  # a set would fix the sizes of a traced shape
        listed = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: {listed}; nothing broadcasts, expand them first")


def same_device(**tensors: Tensor) -> None:
    """Raise a `ValueError` unless all tensors are on one device."""
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"devices differ: {listed}; move them to one with .to(device)")


def floating(**tensors: Tensor) -> None:
    """Raise a `TypeError` unless every tensor is real floating point."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {x.dtype}; convert it with .float()"
            )


def bool_mask(mask: Tensor) -> None:
    """Raise a `TypeError` unless `mask` is bool (True = this token counts)."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be torch.bool (True = this token counts), got {mask.dtype}; write mask != "
            "0 if it holds zeros and ones"
        )


def one_per_row(mask: Tensor, bootstrap: Tensor) -> None:
    """Raise a `ValueError` unless `bootstrap` has a value for each row."""
    if bootstrap.shape != mask.shape[:-1]:
        raise ValueError(
            f"bootstrap and mask: got bootstrap {tuple(bootstrap.shape)} and mask "
            f"{tuple(mask.shape)}, expected one bootstrap value per row"
        )


def finite(x: Tensor, mask: Tensor, *, name: str) -> None:
    """Raise a `ValueError` with the position of the first NaN or inf that `mask` keeps."""
    if readable(x) and readable(mask):
        bad = mask & ~torch.isfinite(x.detach())
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name}{list(where)} is {float(x[where])}, expected a finite number; drop that "
                "sample or hide it with the mask"
            )


def unit_interval(mask: Tensor, **numbers: float | Tensor) -> None:
    """Raise unless every number lies in [0, 1] and fits `mask`."""
    _each(mask, numbers, "a number in [0, 1]", lambda x: (x >= 0) & (x <= 1))


def width(mask: Tensor, **numbers: float | Tensor) -> None:
    """Raise unless every number is ≥ 0 (∞ is one) and fits `mask`."""
    _each(mask, numbers, "a number >= 0", lambda x: x >= 0)


def _each(mask: Tensor, numbers: dict, expected: str, holds: Callable) -> None:
    for name, x in numbers.items():
        if isinstance(x, Tensor):
            if readable(x) and not bool(torch.as_tensor(holds(x)).all()):
                raise ValueError(f"{name} must be {expected}, got {x.tolist()}")
            _fits(mask, name, tuple(x.shape))
        elif isinstance(x, bool) or not isinstance(x, int | float):
            raise TypeError(f"{name} must be {expected}, got {x!r} of type {type(x).__name__}")
        elif not holds(x):
            raise ValueError(f"{name} must be {expected}, got {x}")


def _fits(mask: Tensor, name: str, shape: tuple[int, ...]) -> None:
    pairs = zip(reversed(shape), reversed(mask.shape))
    if len(shape) > mask.ndim or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"{name} has shape {shape}, which does not fit {tuple(mask.shape)}; expected a number, "
            "or a tensor of that shape with 1 where it is the same for all"
        )
