"""Bugs that other projects shipped, planted here one at a time: each makes a law fail."""

import pytest
from mutants.catalogue import ELSEWHERE, MUTANTS, ROWS
from mutants.plant import PACKAGE, judge, replay


def test_every_row_of_the_catalogue_is_planted_or_says_why_not():
    planted = {mutant.row for mutant in MUTANTS}
    assert planted | ELSEWHERE.keys() == set(ROWS)
    assert not planted & ELSEWHERE.keys()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.row} {m.bug}")
def test_a_bug_has_its_one_place_in_the_source(mutant):
    source = (PACKAGE / f"{mutant.module}.py").read_text()
    assert source.count(mutant.right) == 1 and mutant.right != mutant.wrong


@pytest.mark.slow
def test_without_a_bug_the_laws_hold():
    selection = dict.fromkeys(each for mutant in MUTANTS for each in mutant.tests.split())
    verdict = judge(" ".join(selection))
    assert not verdict.law, verdict.output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.row} {m.bug}")
def test_a_bug_of_the_field_is_caught_by_an_assertion(mutant, tmp_path):
    verdict = replay(mutant, tmp_path)
    assert verdict.caught, verdict.output[-3000:]
