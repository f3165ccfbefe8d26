"""Ranks add: what many processes compute of a batch is what one does."""

import re
import signal
import time
from functools import partial

import cases_ranks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import Failed, result, start, world

from rlhf_fn.ranks import _TORCHRUN, Place, by_rows, digest, joined, place, rows_of

EXACT = {"rtol": 0, "atol": 1e-12}
PLANS = [  # of 4 ranks with 5 rows the last has none; with 1, three have none
    ("sft", 5, "autograd", 1), ("sft", 3, "functional", 2), ("dpo", 5, "autograd", 1),
    ("dpo", 1, "autograd", 1), ("policy", 5, "autograd", 3), ("policy", 4, "functional", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    return [
        cases_ranks.trajectory(case, rows, cases_ranks.GRADIENTS[name], parts)
        for case, rows, name, parts in PLANS
    ]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, 4])
def test_any_number_of_ranks_takes_the_steps_of_one_process(alone, ranks):
    for found in world(ranks, cases_ranks.data_parallel_trajectories, PLANS):
        torch.testing.assert_close(found, alone, **EXACT)


@given(st.integers(1, 40), st.integers(1, 9))
def test_every_row_is_of_one_rank_and_no_rank_has_more_than_its_share(count, ranks):
    parts = [range(count)[rows_of(count, Place(rank, ranks))] for rank in range(ranks)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) == -(-count // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_function_of_rows_by_rows_is_the_function(ranks):
    counts = [1, 4, 5]
    expected = [cases_ranks.drawn(*cases_ranks.asked_of(count)) for count in counts]
    for found, seen in world(ranks, cases_ranks.drawn_by_rows, counts):
        assert max(n * ranks - count for n, count in zip(seen, counts)) < ranks
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_that_are_no_multiples_of_each_other_are_refused():
    with pytest.raises(ValueError, match=r"arguments have \[2, 3\]; expected multiples"):
        by_rows(cases_ranks.drawn)(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="no rows"):
        by_rows(cases_ranks.drawn)(torch.zeros(0, 3), torch.zeros(0, 3))


def test_ranks_that_have_the_same_agree():
    assert world(2, cases_ranks.agree_but, 1) == ["agreed", "agreed"]


def test_replicas_of_slices_agree_or_all_say_who_does_not():
    assert world(4, cases_ranks.agree_in_slices, 2, None) == ["agreed"] * 4
    for found in world(4, cases_ranks.agree_in_slices, 2, 2):
        assert "parameters (ranks 0, 1 | ranks 2, 3)" in str(found)


@pytest.mark.parametrize(
    "other, named",
    [
        ({"lr": 2e-3}, "lr"),
        ({"rows": [[1], [2, 3]]}, "rows"),
        ({"params": cases_ranks.LM.params | {"none": torch.ones(0, 1)}}, "params"),
        ({"lr": None, "rows": []}, "lr .*, rows"),
        ({"more": 1}, "the names of what is compared"),
    ],
)
def test_ranks_that_disagree_all_say_on_what_and_which(other, named):
    for found in world(3, partial(cases_ranks.agree_but, 1, **other)):
        assert isinstance(found, Failed)
        assert re.search(rf"ValueError: .*on {named} \(ranks 0, 2 \| rank 1\)", str(found))


def test_what_is_written_alike_but_lies_otherwise_is_not_the_same():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    different = [[one], [two], one, one.double(), {"a": 1}, {"b": 1}, "a", ["a"], [["a"]], None]
    assert len({digest(x) for x in different}) == len(different)
    assert digest({"w": one[:1], "n": 0}) == digest({"w": one[:1].clone(), "n": 0})
    assert digest(torch.eye(3)[:, 0]) == digest(torch.tensor([1.0, 0, 0])), "strides are not data"


def test_a_killed_rank_ends_the_others_with_an_error_at_once():
    began = time.monotonic()
    one, dead, other = world(3, cases_ranks.vanish, 1, signal.SIGKILL)
    assert dead == -signal.SIGKILL
    assert isinstance(one, Failed) and isinstance(other, Failed)
    assert time.monotonic() - began < 30, "60 s are what a rank may be silent for"


def test_a_hanging_rank_ends_the_others_with_an_error_after_the_timeout():
    one, other = start(2, cases_ranks.vanish, 1, signal.SIGSTOP, timeout=2.0)
    assert one[1].poll(20)
    assert "RuntimeError" in str(result(*one))
    other[0].kill()


def test_a_timeout_that_is_none_is_refused():
    for bad in (0.0, float("inf")):
        with (
            pytest.raises(ValueError, match="timeout must be a finite number > 0"),
            joined(timeout=bad),
        ):
            pass


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name in _TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK is 1, but this machine has 1 GPUs"):
        with joined(timeout=1.0):
            pass


def test_without_torchrun_there_is_one_rank():
    with joined(timeout=1.0) as at:
        assert at == place() == Place(0, 1)
