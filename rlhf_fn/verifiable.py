"""Rewards that read text: no model, no tokenizer, one number per answer."""

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(rf"(?:(?<!\d)[-+])?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly as written (1,000 is a thousand), or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def exact_number(answer: str, expected: str | int | Decimal) -> float:
    """1 if the last number of the answer is the expected one, else 0. 0.50 is ½, to the last digit.

    Raises:
        ValueError: `expected` is not a finite number.
    """
    try:
        target = Decimal(str(expected).replace(",", ""))
    except InvalidOperation as e:
        raise ValueError(f"expected must be a number, got {expected!r}") from e
    if not target.is_finite():
        raise ValueError(
            f"expected must be a finite number, got {expected!r}: no answer could be right; drop "
            "that sample"
        )
    return float(last_number(answer) == target)


def follows_format(answer: str, pattern: str) -> float:
    """1 if the regular expression matches the whole answer, else 0; `.` matches a new line, too.

    DeepSeek-AI 2025, §2.2.2: https://arxiv.org/abs/2501.12948
    """
    return float(re.fullmatch(pattern, answer, re.DOTALL) is not None)


def constitutional_score(
    prompt: str,
    answer: str,
    *,
    principles: Mapping[str, float],
    judge: Callable[[str, str, str], float],
) -> float:
    """How well an answer keeps to a set of principles: their weighted mean by any judge.

    Σₖ wₖ judge(principleₖ, prompt, answer) / Σₖ wₖ

    Raises:
        ValueError: no principle has a weight, one is negative, or the judge's score is not finite.

    Bai et al. 2022: https://arxiv.org/abs/2212.08073
    """
    if not all(weight >= 0 for weight in principles.values()) or not sum(principles.values()) > 0:
        raise ValueError(f"weights of principles must be >= 0 and some > 0, got {dict(principles)}")
    total = 0.0
    for principle, weight in principles.items():
        score = float(judge(principle, prompt, answer))
        if not math.isfinite(score):
            raise ValueError(f"the judge gave {score} for {principle!r}, expected a finite number")
        total += weight * score
    return total / sum(principles.values())
