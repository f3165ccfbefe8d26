"""The laws of RLHF arithmetic, for our functions and for anybody's.

`check(f, like="gae", discount=0.99, lam=0.95)` calls f with small inputs, as its kind is called,
until a law breaks or hypothesis runs out of ideas, and says which laws hold, the smallest input
found on which one does not, and the bug of another project that it is known from. The same inputs
are tried every time.

A function that is called otherwise is adapted by a lambda. Settings say what the function is meant
to be: a law that needs one which is not given is not asked, and f gets those that it has a
parameter for. `KINDS` has the kinds; each says how it is called and what its laws are true of.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    needed = "the laws need hypothesis; install it with: pip install 'rlhf-fn[laws]'"
    raise ImportError(needed) from error

from rlhf_fn.kinds import KINDS, Kind
from rlhf_fn.trials import EXAMPLES, Law, Subject, Verdict, passed_on, show, trial

__all__ = ["KINDS", "Kind", "Law", "Report", "Verdict", "check"]


class Report(NamedTuple):
    """The verdict of every law; `str` of it is what the command prints."""

    name: str
    like: str
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether no law is broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The laws that do not hold, with an input each."""
        return tuple(v for v in self.verdicts if v.outcome in {"broken", "raised"})

    def __str__(self) -> str:
        lines = [f"{self.name} as {self.like}: {KINDS[self.like].call}"]
        for law, outcome, why, case in self.verdicts:
            shown = outcome if case is None else outcome.upper()
            lines.append(f"  {shown:9}  {law.name}" + (f": {why}" if why and case is None else ""))
            if case is not None:
                lines.append(f"             {why}")
                lines += [f"               {name} = {show(x)}" for name, x in case.items()]
            if outcome == "broken":  # what raises has not come to its law
                lines.append(f"             known from: {law.known_from}")
        held = sum(verdict.outcome == "holds" for verdict in self.verdicts)
        asked = held + len(self.broken)
        return "\n".join([*lines, f"{held} of {asked} laws hold"])


def check(
    f: Callable[..., Any],
    *,
    like: str,
    laws: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    examples: int = EXAMPLES,
    **settings: Any,
) -> Report:
    """Try the laws of a kind on a function. `laws` or `skip`: names of those to ask, or not to.

    Raises: ValueError for a kind or law that there is none of, and for a setting that is missing;
    TypeError for one that neither the kind nor f knows, and where f is not called as its kind is.
    """
    kind = KINDS.get(like)
    if kind is None:
        raise ValueError(f"like={like!r} is no kind; the kinds are: {', '.join(KINDS)}")
    chosen = _chosen(kind, like, laws, skip)
    _check_settings(f, kind, like, settings)
    subject = Subject(f, settings)
    verdicts = tuple(trial(each, subject, examples=examples) for each in chosen)
    return Report(getattr(f, "__name__", type(f).__name__), like, verdicts)


def _chosen(
    kind: Kind, like: str, laws: Iterable[str] | None, skip: Iterable[str]
) -> tuple[Law, ...]:
    names = [each.name for each in kind.laws]
    skip, wanted = list(skip), names if laws is None else list(laws)
    for name in [*skip, *wanted]:
        if name not in names:
            raise ValueError(f"{name!r} is no law of {like!r}; they are: {'; '.join(names)}")
    return tuple(each for each in kind.laws if each.name in wanted and each.name not in skip)


def _check_settings(f: Callable[..., Any], kind: Kind, like: str, settings: dict[str, Any]) -> None:
    given = passed_on(f, settings)
    for name in settings:
        if name not in given and name not in kind.settings:
            known = ", ".join(sorted(kind.settings)) or "none"
            raise TypeError(
                f"{name}= is neither a parameter of the function nor a setting of {like!r}, "
                f"whose settings are: {known}"
            )
    for name in kind.requires:
        if name not in settings:
            raise ValueError(f"{name} is missing: the laws of {like!r} need to know it")
    try:
        inspect.signature(f).bind(*[None] * len(kind.takes), **given)
    except TypeError as error:
        raise TypeError(f"the function is called as {kind.call}, but: {error}") from None
    except ValueError:
        pass  # it has no signature to look at
