"""Rewards of text: what counts as a number, as a format, and as keeping to a principle."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn.verifiable import constitutional_score, exact_number, follows_format, last_number

numbers = st.decimals(-(10**9), 10**9, allow_nan=False, places=3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"), ("-3", "-3"), ("costs $1,234,567.50 in all", "1234567.50"),
        ("3-5", "5"), ("x=-5", "-5"), (".5", "0.5"), ("1e3 m", "1000"), ("a12b", "12"),
        ("1, 2, 3,", "3"), ("7%", "7"), ("+8", "8"),
    ],
)  # fmt: skip
def test_the_last_number_is_read_as_written(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "-", ".", "e", ","])
def test_a_text_without_a_digit_has_no_number(text):
    assert last_number(text) is None


@given(numbers, st.text("abc .,\n", max_size=9))
def test_exact_number_knows_its_own_number_however_it_is_written(number, prose):
    for written in (f"{number}", f"{number:,}", f"{number:f}0"):
        assert exact_number(f"{prose} is {written}", number) == 1.0
        assert exact_number(f"{prose} is {written}", number + 1) == 0.0
    assert exact_number("nothing here", number) == 0.0


def test_exact_number_is_exact_where_floats_are_not():
    assert exact_number("0.1 + 0.2 = 0.3", "0.30") == 1.0
    assert exact_number("9007199254740993", "9007199254740992") == 0.0


def test_a_format_is_that_of_the_whole_answer():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert follows_format("<think>a\nb</think>\n<answer>7</answer>", pattern) == 1.0
    assert follows_format("<think>a</think><answer>7</answer> and", pattern) == 0.0


@given(st.dictionaries(st.text(max_size=5), st.floats(0.01, 5), min_size=1, max_size=4))
def test_a_constitutional_score_is_the_weighted_mean_of_its_principles(principles):
    judge = lambda principle, prompt, answer: len(principle) + len(prompt + answer)  # noqa: E731
    got = constitutional_score("ab", "c", principles=principles, judge=judge)
    total = sum(w * (len(p) + 3) for p, w in principles.items())
    assert got == pytest.approx(total / sum(principles.values()))


@pytest.mark.parametrize("expected", ["nan", "inf", "-Infinity", "sNaN", Decimal("nan")])
def test_a_target_that_no_answer_could_reach_is_refused(expected):
    with pytest.raises(ValueError, match="expected must be a finite number, got .*(?i:nan|inf)"):
        exact_number("7", expected)


def test_misuse_of_text_rewards_is_named():
    with pytest.raises(ValueError, match="expected must be a number, got 'seven'"):
        exact_number("7", "seven")
    with pytest.raises(ValueError, match="weights of principles"):
        constitutional_score("a", "b", principles={"be kind": -1.0}, judge=lambda *_: 1.0)
    with pytest.raises(ValueError, match="weights of principles"):
        constitutional_score("a", "b", principles={}, judge=lambda *_: 1.0)
    with pytest.raises(ValueError, match="the judge gave nan for 'be kind'"):
        constitutional_score("a", "b", principles={"be kind": 1.0}, judge=lambda *_: float("nan"))
