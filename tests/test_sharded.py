"""What any number of ranks saved is what any number of ranks reads."""

from functools import partial
from pathlib import Path

import cases_checkpoint
import cases_sharded
import pytest
import torch
from safetensors.torch import load_file
from worlds import Failed, world

from rlhf_fn import checkpoint, manifest, sharded, tree
from rlhf_fn.errors import CorruptCheckpoint, UnsafeCheckpoint

SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in [(1, 1), (4, 4)]]
WORLDS = [(2, 2), (4, 2), *SLOW]  # (ranks, shards)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture(scope="module", params=WORLDS, ids=str)
def written(request, tmp_path_factory):
    """A folder that a world saved into, and what it saved."""
    folder = tmp_path_factory.mktemp("saved")
    ranks, shards = request.param
    states = world(ranks, cases_sharded.saved, folder, shards)
    same(states, states[:1] * ranks)
    return folder, states[0]


@pytest.mark.parametrize("reading", [(4, 4), *SLOW[:1], pytest.param((2, 2), marks=SLOW[0].marks)])
def test_any_world_reads_the_bits_that_any_other_saved(written, reading):
    (folder, state), (ranks, shards) = written, reading
    for whole, slices in world(ranks, cases_sharded.read_again, folder, shards):
        same(whole, state)
        same(slices, state)


def test_what_any_rank_finds_damaged_all_ranks_pass_over(tmp_path):
    """Every file is checked by one of them."""
    for step in (6, 7):
        world(2, cases_sharded.saved, tmp_path, 2, "", step)
    files = sorted((tmp_path / "step_0000000007").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        for found, said in world(2, cases_sharded.read_damaged, tmp_path, 2):
            assert found == 6
            assert len(said) == 1 and f"{file}: sha256" in said[0]
        file.write_bytes(sound)
    assert world(2, cases_sharded.read_damaged, tmp_path, 2) == [(7, [])] * 2


def test_one_process_reads_whole_tensors_each_of_which_was_written_once(written):
    folder, state = written
    found = checkpoint.load_latest(folder)
    assert (found.step, found.meta) == (7, {"at": 7})
    same(checkpoint.unflatten(tree.zeros_like(state), found.tensors), state)
    shards = (folder / "step_0000000007").glob("*.safetensors")
    written = sum(x.nbytes for path in shards for x in load_file(path).values())
    assert written == sum(x.nbytes for x in found.tensors.values())


def test_a_rank_checks_its_share_of_the_files_and_keeps_its_rows(tmp_path):
    world(2, cases_sharded.saved, tmp_path, 2)
    (one, rows), (other, less) = world(2, cases_sharded.read_in_parts, tmp_path, 2)
    files = sorted(path.name for path in tmp_path.glob("*/*.safetensors"))
    assert sorted(one + other) == files and abs(len(one) - len(other)) <= 1
    assert (rows, less) == (4, 3)


def test_a_file_that_a_rank_may_not_open_is_no_damage(tmp_path):
    for step in (6, 7):
        world(2, cases_sharded.saved, tmp_path, 2, "", step)
    one, other = world(2, cases_sharded.read_refused, tmp_path, 2)
    assert "RankError: rank 1: StorageError: [Errno 13]" in str(one)
    assert "StorageError: [Errno 13]" in str(other)


def test_ranks_that_see_other_checkpoints_all_say_so(tmp_path):
    world(2, cases_sharded.saved, tmp_path, 2)
    for found in world(2, cases_sharded.read_apart, tmp_path, 2):
        assert "ValueError: the ranks do not agree on checkpoints (rank 0 | rank 1)" in str(found)
    one, other = world(2, cases_sharded.read_apart, tmp_path, 2, True)
    assert "RankError: rank 1: StorageError: [Errno 13]" in str(one)
    assert "StorageError: [Errno 13]" in str(other)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_is_unsafe_for_ranks_too(tmp_path, make):
    cases_checkpoint.saved(tmp_path, 1)
    make(tmp_path / "step_0000000002")
    for load in (checkpoint.load_latest, partial(sharded.load_latest, like={})):
        with pytest.raises(UnsafeCheckpoint):
            load(tmp_path)


@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_rank_that_fails_to_save_fails_all_and_what_was_there_is_intact(tmp_path, how):
    cases_checkpoint.saved(tmp_path, 5)
    found = world(2, cases_sharded.saved, tmp_path, 2, how)
    assert isinstance(found[0], Failed)
    if how == "full":
        assert "RankError: rank 1: OSError: [Errno 28] No space left" in str(found[0])
        assert "StorageError: [Errno 28]" in str(found[1])
    assert cases_checkpoint.steps_in(tmp_path) == ["step_0000000005"]
    same(checkpoint.load_latest(tmp_path).tensors, cases_checkpoint.tensors(5))


WHOLE = [[1.0] * 3, [1.0] * 3, [0.0] * 3]
SLICES = {"w#0": torch.ones(2, 3), "w#2": torch.zeros(1, 3), "v": torch.ones(2)}


@pytest.mark.parametrize(
    "change",
    [
        {"w#2": None},
        {"w#0": None},
        {"w#2": None, "w#3": torch.zeros(1, 3)},
        {"w#2": None, "w#1": torch.zeros(1, 3)},
        {"w#1": torch.zeros(1, 3)},
        {"w#2": torch.zeros(2, 3)},
        {"w#2": torch.zeros(1, 3, dtype=torch.float64)},
    ],
    ids=str,
)
def test_slices_that_do_not_make_the_whole_are_corrupt(tmp_path, change):
    write(tmp_path / "good", SLICES)
    same(checkpoint.load(tmp_path / "good").tensors["w"], torch.tensor(WHOLE))
    write(tmp_path / "bad", SLICES | change)
    with pytest.raises(CorruptCheckpoint, match="not the tensors that were saved: .*w"):
        checkpoint.load(tmp_path / "bad")


def write(folder, slices):
    folder.mkdir()
    kept = {name: x for name, x in slices.items() if x is not None}
    files = manifest.write_shards(folder, kept, 2**20, [0])
    kinds = {"w": "float32 [3, 3]", "v": "float32 [2]"}
    manifest.write_manifest(folder, 1, files, kinds, {})


def test_the_name_of_a_slice_is_no_name_for_a_tensor(tmp_path):
    with pytest.raises(TypeError, match="'w#0' .* expected a named Tensor"):
        checkpoint.save(tmp_path, 1, {"w#0": torch.ones(2)}, {})
