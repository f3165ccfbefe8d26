"""Errors that name the argument, what was got, what was expected and how to fix it.

Shapes, dtypes and plain numbers are always checked. Checks that must read values run only where
reading is free (`concrete`): they trace away under `torch.compile` and `vmap`, and never make an
accelerator wait.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


class NonFiniteError(ValueError):
    """A number that is NaN or infinite where training needs a finite one."""


def concrete(x: Shaped[Tensor, "..."]) -> bool:
    """Whether the values of `x` may be read here: a CPU tensor, outside of compile and vmap."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    try:
        x.new_zeros(()).item()  # vmap, fake and meta tensors raise
    except RuntimeError:
        return False
    return True


def same_shape(**tensors: Shaped[Tensor, "..."]) -> None:
    """Raise a `ValueError` naming every argument and its shape, unless all shapes agree."""
    first, *others = tensors.values()
    if any(x.shape != first.shape for x in others):  # a set would fix the sizes of a traced shape
        listed = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: {listed}; nothing broadcasts, expand them first")


def fits(x: Shaped[Tensor, "..."], **numbers: float | Tensor) -> None:
    """Raise a `ValueError` if a hyperparameter is a tensor that would broadcast `x` to more."""
    for name, n in numbers.items():
        shape = tuple(n.shape) if isinstance(n, Tensor) else ()
        pairs = zip(reversed(shape), reversed(x.shape))
        if len(shape) > x.ndim or any(a not in (1, b) for a, b in pairs):
            raise ValueError(
                f"{name} has shape {shape}, which does not fit {tuple(x.shape)}; expected a "
                "number, or a tensor of that shape with 1 where it is the same for all"
            )


def floating(**tensors: Shaped[Tensor, "..."]) -> None:
    """Raise a `TypeError` unless every tensor is real floating point."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating point, got {x.dtype}; convert it with .float()"
            )


def per_token(logprobs: Shaped[Tensor, "..."], advantages: Shaped[Tensor, "..."]) -> None:
    """Raise unless there is an advantage for each of `logprobs`, or one for each row of them."""
    floating(logprobs=logprobs, advantages=advantages)
    *batch, time = logprobs.shape
    if [*advantages.shape] not in ([*batch, time], [*batch, 1]):
        raise ValueError(
            f"advantages are {tuple(advantages.shape)} and logprobs {tuple(logprobs.shape)}: "
            f"expected {(*batch, time)}, or {(*batch, 1)} for one advantage per sequence, which is "
            "written advantages[..., None]"
        )


def bool_mask(mask: Shaped[Tensor, "..."], *, name: str = "mask") -> None:
    """Raise a `TypeError` unless `mask` is bool (True = this token counts)."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be torch.bool (True = this token counts), got {mask.dtype}; "
            f"write {name} != 0 if it holds zeros and ones"
        )


def integers(**tensors: Shaped[Tensor, "..."]) -> None:
    """Raise a `TypeError` unless every tensor holds integers (bool is not one)."""
    for name, x in tensors.items():
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {x.dtype}; convert with .long()")


def token_ids(tokens: Int[Tensor, "..."], vocab: int, *, name: str = "tokens") -> None:
    """Raise unless `tokens` are integers in [0, vocab).

    Raises:
        TypeError: `tokens` is not an integer tensor.
        ValueError: an id lies outside of [0, vocab); the message has its position.
    """
    integers(**{name: tokens})
    if concrete(tokens):
        outside = (tokens < 0) | (tokens >= vocab)
        if outside.any():
            where = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"{name}{list(where)} is {int(tokens[where])}, expected an id in [0, {vocab}); "
                "check that tokenizer and model have one vocabulary; padding needs a valid id too"
            )


def row_tokens(name: str, rows: Tensor, tokens: Tensor, vocab: int | None = None) -> None:
    """Raise unless `tokens` are ids of the vocabulary, one for each of `rows`."""
    token_ids(tokens, rows.shape[-1] if vocab is None else vocab)
    if rows.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{name} and tokens: got {name} {tuple(rows.shape)} and tokens {tuple(tokens.shape)}, "
            f"expected the leading axes of {name} to be the shape of tokens"
        )


def finite(x: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None, *, name: str) -> None:
    """Raise a `NonFiniteError` with the position of the first NaN or inf that `mask` keeps."""
    if concrete(x) and (mask is None or concrete(mask)):
        bad = ~torch.isfinite(x.detach())
        bad = bad if mask is None else bad & mask
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise NonFiniteError(
                f"{name}{list(where)} is {float(x[where])}, expected a finite number; "
                "drop that sample or hide it with the mask"
            )


def positive(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number is finite and > 0."""
    _each(numbers, "a finite number > 0", lambda x: (x > 0) & (x < math.inf))


def non_negative(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number is finite and ≥ 0."""
    _each(numbers, "a finite number >= 0", lambda x: (x >= 0) & (x < math.inf))


def unit_interval(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number lies in [0, 1]."""
    _each(numbers, "a number in [0, 1]", lambda x: (x >= 0) & (x <= 1))


def width(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number is ≥ 0; ∞ is one."""
    _each(numbers, "a number >= 0", lambda x: x >= 0)


def minority(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number lies in [0, ½)."""
    _each(numbers, "a number in [0, 1/2)", lambda x: (x >= 0) & (x < 0.5))


def above_one(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number is > 1; ∞ is one."""
    _each(numbers, "a number > 1", lambda x: x > 1)


def below_one(**numbers: float | Tensor) -> None:
    """Raise a `ValueError` unless every number lies in [0, 1)."""
    _each(numbers, "a number in [0, 1)", lambda x: (x >= 0) & (x < 1))


def count(*, least: int, **numbers: int) -> None:
    """Raise unless every number is an int and at least `least`.

    Raises:
        TypeError: a number is not an int (bool is not one).
        ValueError: a number is below `least`.
    """
    for name, n in numbers.items():
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name} must be an int, got {n!r} of type {type(n).__name__}")
        if n < least:
            raise ValueError(f"{name} must be at least {least}, got {n}")


def _each(numbers: dict, expected: str, holds: Callable) -> None:
    for name, x in numbers.items():
        if isinstance(x, Tensor):
            if concrete(x) and not bool(torch.as_tensor(holds(x)).all()):
                raise ValueError(f"{name} must be {expected}, got {x.tolist()}")
        elif isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{name} must be {expected}, got {x!r} of type {type(x).__name__}")
        elif not holds(x):
            raise ValueError(f"{name} must be {expected}, got {x}")
