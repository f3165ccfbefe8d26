"""For every law the bug that it is known from, planted in a small function: the law catches it."""

import cases_laws_losses  # noqa: F401  they plant
import cases_laws_returns  # noqa: F401
import pytest
from cases_laws import PLANTED

from rlhf_fn.laws import KINDS, check

pytestmark = pytest.mark.filterwarnings("ignore:(var|std).*degrees of freedom")  # a bug of theirs


def named(like, words):
    (law,) = [law for law in KINDS[like].laws if words.lower() in law.name.lower()]
    return law


@pytest.mark.parametrize("case", PLANTED, ids=lambda c: f"{c[0]}-{c[1]}-{c[3].__name__}")
def test_a_law_catches_the_bug_that_it_is_known_from_and_names_it(case):
    like, words, settings, function = case
    law = named(like, words)
    report = check(function, like=like, laws=[law.name], **settings)
    (verdict,) = report.verdicts
    assert verdict.outcome == "broken", str(report)
    assert f"known from: {law.known_from}" in str(report)


def test_every_law_has_a_bug_planted():
    laws = {(law.name, law.known_from) for kind in KINDS.values() for law in kind.laws}
    caught = [named(like, words) for like, words, *_ in PLANTED]
    assert laws == {(law.name, law.known_from) for law in caught}
