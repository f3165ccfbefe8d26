"""`rlhf-fn check package.module:function --like KIND`: the laws, on anybody's function."""

import argparse
import ast
from typing import Any

from rlhf_fn.imported import imported

HELP = "ask a function of yours or anybody's whether it obeys the laws of its kind"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("function", metavar="package.module:function", help="what to import")
    parser.add_argument("--like", required=True, metavar="KIND", help="what it is, such as gae")
    parser.add_argument(
        "--with", nargs="+", default=[], metavar="NAME=VALUE", dest="settings",
        help="what it is meant to be, such as discount=0.99 lam=0.95",
    )  # fmt: skip
    parser.add_argument(
        "--skip", action="append", default=[], metavar="LAW", help="a law not to ask, by its name"
    )


def run(function: str, *, like: str, settings: list[str], skip: list[str]) -> int:
    """Print which laws hold; 0 if all do, 1 if some do not.

    Raises: ValueError where there is no such function; what `laws.check` raises.
    """
    try:
        from rlhf_fn import laws
    except ImportError as error:
        raise ValueError(str(error)) from error
    known = dict(_setting(text) for text in settings)
    report = laws.check(imported(function), like=like, skip=skip, **known)
    print(report._replace(name=function))
    return 0 if report.holds else 1


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name.isidentifier() and sign):
        raise ValueError(f"--with {text!r} is no NAME=VALUE, such as discount=0.99")
    if value in {"inf", "-inf"}:
        return name, float(value)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"--with {text!r}: {value!r} is no number, text in quotes, True, False or "
                         "None") from None  # fmt: skip
