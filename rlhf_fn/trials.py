"""A law, and a trial: hypothesis looks for an input on which a function breaks it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fn.strategies import Strategy

EXAMPLES = 25  # a law of arithmetic that is false is false on small inputs


class Broken(AssertionError):
    """What a function did that its law forbids."""


class NotAsked(Exception):
    """The law says nothing of such a function."""


class Raised(Exception):
    """The function raised, on an input of the kind it was said to take."""


class Law(NamedTuple):
    """A sentence that is true of every function of a kind.

    `holds(f, **case)` raises `Broken` where it is not; `needs` are settings that state what the
    function is meant to be, without which the law is not asked.
    """

    name: str
    known_from: str
    given: Strategy
    holds: Callable[..., None]
    needs: tuple[str, ...] = ()


class Verdict(NamedTuple):
    law: Law
    outcome: str  # "holds", "broken", "raised" or "not asked"
    why: str = ""
    case: Mapping[str, Any] | None = None


def law(
    *, given: Strategy, known_from: str, needs: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Law]:
    """Makes a `Law` of the function below it, whose name is the first line of its docstring."""

    def named(holds: Callable[..., None]) -> Law:
        first, *_ = (holds.__doc__ or "").strip().splitlines()
        return Law(first.rstrip("."), known_from, given, holds, needs)

    return named


def on(given: Strategy, *laws: Law) -> tuple[Law, ...]:
    """The same laws, of functions of other arguments."""
    return tuple(each._replace(given=given) for each in laws)


@dataclass(frozen=True)
class Subject:
    """Somebody's function, as laws call it: settings bound, results as tensors."""

    function: Callable[..., Any]
    settings: Mapping[str, Any]

    def _call(self, *args: Any) -> tuple[Any, ...]:
        try:
            out = self.function(*args, **passed_on(self.function, self.settings))
        except Exception as error:
            raise Raised(f"raised {type(error).__name__}: {error}") from error
        several = out if isinstance(out, (tuple, list)) else (out,)
        return tuple(x for x in several if x is not None)

    def results(self, *args: Any) -> tuple[Tensor, ...]:
        """Whatever comes back, as a tuple of tensors."""
        return tuple(map(_tensor, self._call(*args)))

    def __call__(self, *args: Any) -> Tensor:
        """The first of the results."""
        return self.results(*args)[0]

    def refused(self, *args: Any) -> bool:
        """Whether the function raises on these arguments."""
        try:
            self.results(*args)
        except Raised:
            return True
        return False

    def slope(
        self, x: Tensor, *rest: Any, mask: Tensor | None = None, may_be_constant: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum of the (kept) results, and its gradient with respect to the first argument."""
        x = x.detach().clone().requires_grad_()
        out = self._call(x, *rest)[0]
        if not isinstance(out, Tensor):
            raise NotAsked("it returns a plain number, which has no gradient")
        if mask is not None and out.shape == mask.shape:
            out = torch.where(mask, out, 0.0)
        if not out.requires_grad:
            if may_be_constant:
                return out.sum().detach(), torch.zeros_like(x)
            raise Broken("the result has no gradient: it does not require grad")
        try:
            (gradient,) = torch.autograd.grad(
                out.sum(), x, allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            raise Broken(f"its gradient raised {type(error).__name__}: {error}") from error
        return out.sum().detach(), gradient


def _tensor(x: Any) -> Tensor:
    try:
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Broken(f"returned {x!r} of type {type(x).__name__}, expected a tensor") from error


def passed_on(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a function has a parameter of that name for."""
    function = getattr(function, "forward", function)  # a module's own signature says nothing
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: x for name, x in settings.items() if name in parameters}


def agree(
    what: str, got: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Raise `Broken` unless `got` is `expected`, in shape and value."""
    if got.shape != expected.shape:
        raise Broken(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    got, expected = got.detach().double(), expected.detach().double()
    if not torch.allclose(got, expected, rtol=rtol, atol=atol):
        raise Broken(f"{what} is {show(got)}, expected {show(expected)}")


def finite(what: str, x: Tensor) -> None:
    """Raise `Broken` unless every entry of `x` is finite."""
    if not torch.isfinite(x).all():
        raise Broken(f"{what} is {show(x)}")


def show(x: Any) -> str:
    """A tensor as nested lists, its numbers as short as they can be told."""
    if isinstance(x, Tensor):
        return show(x.detach().tolist())
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(show, x)) + "]"
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def trial(law: Law, subject: Subject, *, examples: int = EXAMPLES) -> Verdict:
    """Whether the law holds of the function, and if not the smallest input found that shows it."""
    from hypothesis import HealthCheck, Phase, given, settings

    missing = [name for name in law.needs if name not in subject.settings]
    if missing:
        return Verdict(law, "not asked", "state " + ", ".join(f"{name}=" for name in missing))
    last: list[tuple[str, Mapping[str, Any]]] = []

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(law.given)
    def attempt(case: Mapping[str, Any]) -> None:
        try:
            law.holds(subject, **{name: _copy(x) for name, x in case.items()})
        except (Broken, Raised) as finding:
            last.append((str(finding), case))
            raise

    try:
        attempt()
    except NotAsked as reason:
        return Verdict(law, "not asked", str(reason))
    except Broken:
        return Verdict(law, "broken", *last[-1])
    except Raised:
        return Verdict(law, "raised", *last[-1])
    except Exception:
        if not last:
            raise
        why, case = last[-1]
        return Verdict(law, "broken", f"{why} (not every time: it is not deterministic)", case)
    return Verdict(law, "holds")


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
