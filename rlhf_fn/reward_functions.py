"""Rewards that are functions of text: named on the command line, called with lists, and checked.

    def reward(prompts, completions, ended, answer):      # `answer` is a field of the records
        return [float(text.strip() == a) for text, a in zip(completions, answer)]

A function is given what its signature names: prompts, completions, completion_ids, ended (the
answer came to its end by itself), and every field of the records, a list of each.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fn.config import ConfigError
from rlhf_fn.errors import RewardError
from rlhf_fn.imported import imported
from rlhf_fn.judge import texts
from rlhf_fn.rollout import Rollout, completions

GIVEN = ("prompts", "completions", "completion_ids", "ended")
RewardFunction = Callable[..., Sequence[float]]


def reward_function(name: str) -> RewardFunction:
    """The function that `package.module:function` names; modules of the working directory, too.

    Raises:
        ConfigError: there is no such module, or no such function in it.
    """
    try:
        return imported(name)
    except ValueError as error:
        raise ConfigError(f"--reward {error}") from error


def arguments_of(function: RewardFunction, fields: Sequence[str]) -> tuple[str, ...]:
    """Which of what can be given `function` takes.

    Raises:
        ConfigError: it asks for something that neither a rollout nor the records have.
    """
    offered = (*GIVEN, *(name for name in fields if name not in GIVEN))
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    asked = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if missing := [name for name in needed if name not in offered]:
        raise ConfigError(
            f"--reward {_name(function)} asks for {', '.join(missing)}; "
            f"there is {', '.join(offered)}"
        )
    return tuple(name for name in asked if name in offered)


def scorer(
    function: RewardFunction, tokenizer: Any, records: Sequence[Mapping[str, Any]], stop: Tensor
) -> Callable[[Rollout, Tensor], Tensor]:
    """`score(rollout, numbers of the records)`: the rewards as a tensor, one per row.

    Raises:
        ConfigError: as `arguments_of`. Later,
        RewardError: the function raised, or returned something else than a finite number per row.
    """
    fields = [name for name in (records[0] if records else ()) if name != "prompt"]
    asked = arguments_of(function, fields)

    def score(rollout: Rollout, numbers: Tensor) -> Tensor:
        rows = [records[i] for i in numbers.tolist()]
        ids = completions(rollout)
        both = texts(tokenizer, rollout)
        given = {
            "prompts": [row["prompt"] for row in rows],
            "completions": [text for _, text in both],
            "completion_ids": ids,
            "ended": torch.isin(torch.tensor([row[-1] for row in ids]), stop).tolist(),
        } | {name: [row[name] for row in rows] for name in fields}
        values = _called(function, {name: given[name] for name in asked}, numbers.tolist())
        return torch.tensor(values, dtype=rollout.logprobs.dtype, device=rollout.tokens.device)

    return score


def _called(function: RewardFunction, given: dict[str, Any], numbers: list[int]) -> list[float]:
    try:
        values = list(function(**given))
    except Exception as error:  # somebody else's code may raise anything
        raise RewardError(
            f"reward {_name(function)} raised {type(error).__name__}: {error}, "
            f"on the records {_few(numbers)}; mend it and go on with --resume"
        ) from error
    if len(values) != len(numbers):
        raise RewardError(
            f"reward {_name(function)} returned {len(values)} rewards for {len(numbers)} answers; "
            "expected one each, in their order"
        )
    for number, value in zip(numbers, values):
        if not isinstance(value, int | float | Tensor) or not math.isfinite(value):
            raise RewardError(
                f"reward {_name(function)} returned {value!r} for an answer to record {number}; "
                "expected a finite number"
            )
    return [float(value) for value in values]


def _name(function: Callable) -> str:
    return f"{function.__module__}:{getattr(function, '__name__', function)}"


def _few(numbers: list[int]) -> str:
    distinct = list(dict.fromkeys(numbers))
    return ", ".join(map(str, distinct[:8])) + (", ..." if len(distinct) > 8 else "")
