"""Somebody else's function, by its name on the command line."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def imported(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules of the working directory, too.

    Raises:
        ValueError: another form of name, or nothing there that could be called.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{name!r} is not package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing somebody's module may raise anything
        raise ValueError(
            f"{name}: cannot import {module_name} ({type(error).__name__}: {error}); write it as "
            "package.module:function, found from here"
        ) from error
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        offered = [n for n, x in vars(module).items() if inspect.isfunction(x)]
        raise ValueError(
            f"{name}: {module_name} has no function {path!r}; it has {', '.join(offered) or 'none'}"
        )
    return found
