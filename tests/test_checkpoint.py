"""Laws of what is saved: it comes back bit for bit, and what does not is refused by name."""

from typing import Any, NamedTuple

import pytest
import torch
from cases_checkpoint import flip, saved, steps_in, tensors
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn import checkpoint
from rlhf_fn.errors import (
    CheckpointError,
    IncompatibleCheckpoint,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
          torch.bool)  # fmt: skip
META = {"stage": "sft", "loss": 0.1, "list": [1, None, True], "nested": {"é": "x"}}


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    shard_bytes=st.integers(1, 100),
    step=st.integers(0, 10**15),
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory, shapes, dtypes, shard_bytes, step):
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    given = {f"x.{i}": (torch.randn(s) * 9).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes))}
    path = checkpoint.save(folder, step, given, META, shard_bytes=shard_bytes)
    for found in (checkpoint.load(path), checkpoint.load_latest(folder)):
        assert found is not None
        assert (found.step, found.meta, set(found.tensors)) == (step, META, set(given))
        for name, x in given.items():
            assert found.tensors[name].dtype == x.dtype
            assert torch.equal(found.tensors[name], x)


def test_views_and_shared_storage_are_saved_as_values_and_left_alone(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"base": base, "same": base, "transposed": base.T, "row": base[1], "one": base[:1]
             .expand(2, 4), "parameter": torch.nn.Parameter(base[:, 1:3])}  # fmt: skip
    before = {name: x.detach().clone() for name, x in given.items()}
    found = checkpoint.load(checkpoint.save(tmp_path, 1, given, {}))
    for name, x in before.items():
        assert torch.equal(found.tensors[name], x) and torch.equal(given[name], x)
    found.tensors["same"].add_(1)
    assert torch.equal(found.tensors["base"], base)


def test_nothing_saved_is_none_and_not_an_error(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "missing") is None
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "step_7_backup").mkdir()
    assert checkpoint.load_latest(tmp_path) is None


def test_the_newest_steps_remain_and_the_highest_is_loaded(tmp_path):
    saved(tmp_path, 1, 2, 3, 10)
    assert steps_in(tmp_path) == ["step_0000000003", "step_0000000010"]
    assert checkpoint.load_latest(tmp_path).step == 10
    saved(tmp_path, 11, 12, 13, keep=4)
    assert [int(name[5:]) for name in steps_in(tmp_path)] == [10, 11, 12, 13]


def test_saving_a_step_again_replaces_it_without_a_moment_of_neither(tmp_path):
    saved(tmp_path, 1, 2)
    for times in range(1, 12):
        checkpoint.save(tmp_path, 2, tensors(2), {"times": times})
        assert steps_in(tmp_path) == ["step_0000000001", f"step_0000000002.{times}"]
        assert checkpoint.load_latest(tmp_path).meta == {"times": times}


def test_steps_are_ordered_as_numbers_and_not_as_names(tmp_path):
    saved(tmp_path, 9_999_999_999, 10_000_000_000, 10_000_000_001)
    assert steps_in(tmp_path) == ["step_10000000000", "step_10000000001"]
    saved(tmp_path / "two", 9_999_999_999, 10_000_000_000)
    assert checkpoint.load_latest(tmp_path / "two").step == 10_000_000_000


def test_a_later_step_stays_and_does_not_count(tmp_path):
    saved(tmp_path, 1, 10, 2, 3)
    assert [int(name[5:]) for name in steps_in(tmp_path)] == [2, 3, 10]
    assert checkpoint.load_latest(tmp_path).step == 10


def test_a_damaged_step_does_not_count_as_one_to_fall_back_to(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step_0000000002/MANIFEST.json").write_text("{}")
    saved(tmp_path, 3)
    assert [int(name[5:]) for name in steps_in(tmp_path)] == [1, 2, 3]


def test_a_damaged_later_step_never_costs_a_sound_earlier_one(tmp_path):
    saved(tmp_path, 1, 8, 9, keep=3)
    for name in ("step_0000000008", "step_0000000009"):
        (tmp_path / name / "MANIFEST.json").write_text("{}")
    saved(tmp_path, 2, 3)
    with pytest.warns(UserWarning, match="corrupt"):
        assert checkpoint.load_latest(tmp_path).step == 3
    assert {"step_0000000002", "step_0000000003"} <= set(steps_in(tmp_path))


def test_where_all_are_corrupt_the_run_stops_and_does_not_start_from_zero(tmp_path):
    saved(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        flip(path)
    message = "no complete checkpoint .*0002/.*sha256.*0001/.*sha256.*remove the directory"
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=message):
        checkpoint.load_latest(tmp_path)


def test_a_half_written_checkpoint_is_ignored_with_a_warning(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / ".tmp_2_abc"
    half.mkdir()
    (half / "tensors_00000.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match=".tmp_2_abc was never finished"):
        assert checkpoint.load_latest(tmp_path).step == 1
    saved(tmp_path, 2)
    assert steps_in(tmp_path) == ["step_0000000001", "step_0000000002"]


def test_where_only_half_written_ones_are_the_run_stops_and_does_not_start_from_zero(tmp_path):
    (tmp_path / ".tmp_2_abc").mkdir()
    message = "no complete checkpoint .*never finished.*remove the directory"
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=message):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"step": -1}, ValueError, "step -1.*step >= 0"),
        ({"keep": 1}, ValueError, "keep 1.*keep >= 2"),
        ({"tensors": {"w": torch.tensor([1.0, torch.nan])}}, ValueError, "NaN in w"),
        ({"tensors": {"w": [1.0]}}, TypeError, "'w'.*expected a named|Expected type.*Tensor"),
        ({"meta": {"a": (1, 2)}}, TypeError, "lists for tuples"),
        ({"meta": {"a": {1: 2}}}, TypeError, "strings for keys"),
        ({"meta": {"a": float("nan")}}, TypeError, "meta: .*JSON"),
        ({"meta": {"a": torch.tensor(1)}}, TypeError, "meta: .*Tensor.*JSON"),
    ],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    tmp_path, arguments, error, message
):
    valid: dict[str, Any] = {"step": 1, "tensors": tensors(1), "meta": {}}
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path, **(valid | arguments))
    assert steps_in(tmp_path) == []


class State(NamedTuple):
    params: dict[str, torch.Tensor]
    moments: tuple
    step: torch.Tensor | None


def state(value: float) -> State:
    w = torch.full((2, 3), value)
    return State({"a.b": w, "c": w[0]}, (State({}, (), None), [w * 2]), torch.tensor(value))


def test_a_tree_is_its_named_tensors():
    tree = state(1.5)
    named = checkpoint.flatten(tree)
    assert sorted(named) == ["moments/1/0", "params/a.b", "params/c", "step"]
    back = checkpoint.unflatten(state(0.0), named)
    assert isinstance(back, State) and isinstance(back.moments[0], State)
    assert isinstance(back.moments[1], list) and back.moments[0] == State({}, (), None)
    assert torch.equal(back.params["a.b"], tree.params["a.b"]) and back.step == 1.5


def test_a_tree_with_other_leaves_is_refused_with_a_diff():
    named = checkpoint.flatten(state(1.0))
    named["params/a.b"] = named["params/a.b"].double()
    named["extra"] = named.pop("step")
    with pytest.raises(IncompatibleCheckpoint) as caught:
        checkpoint.unflatten(state(0.0), named)
    assert str(caught.value).splitlines()[1:] == [
        "  extra: the checkpoint has float32 [], this run has nothing",
        "  params/a.b: the checkpoint has float64 [2, 3], this run has float32 [2, 3]",
        "  step: the checkpoint has nothing, this run has float32 []",
    ]
    with pytest.raises(TypeError, match="'a/0' is float, expected a Tensor"):
        checkpoint.flatten({"a": [1.0]})
    with pytest.raises(ValueError, match="two leaves are called 'a/b'"):
        checkpoint.flatten({"a": {"b": torch.zeros(1)}, "a/b": torch.zeros(1)})


def test_another_run_is_refused_with_a_diff():
    checkpoint.require({"data": "x", "lr": 1}, {"lr": 1, "data": "x"})
    with pytest.raises(IncompatibleCheckpoint, match="data: the checkpoint has x, this run has y"):
        checkpoint.require({"data": "x", "lr": 1}, {"data": "y", "lr": 1})


def test_a_first_save_that_was_killed_had_nothing_before_it_and_costs_a_warning(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step_0000000001").rename(tmp_path / ".tmp_1_abc_first")
    with pytest.warns(UserWarning, match=".tmp_1_abc_first was never finished"):
        assert checkpoint.load_latest(tmp_path) is None
