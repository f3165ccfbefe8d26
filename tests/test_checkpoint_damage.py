"""Laws of damage: whatever was done to a checkpoint, it is refused by name and runs no code."""

import errno
import json
from pathlib import Path

import pytest
import torch
from cases_checkpoint import flip, replace, rewrite, saved, sign, tensors
from safetensors.torch import save as serialise

from rlhf_fn import checkpoint, storage
from rlhf_fn.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompatibleCheckpoint,
    UnsafeCheckpoint,
)


def truncate(path):
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])


def overlap(path):
    """A shard whose tensors share bytes, hashes right."""
    file = next(path.glob("*.safetensors"))
    header = {"weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
              "step": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]}}  # fmt: skip
    replace(path, file, json.dumps(header).encode(), bytes(24))


def hole(path):
    file = next(path.glob("*.safetensors"))
    header = {"weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [8, 32]}}
    replace(path, file, json.dumps(header).encode(), bytes(32))


def huge_header(path):
    file = next(path.glob("*.safetensors"))
    replace(path, file, b"{}", b"", length=2**40)


def reshaped(path):
    file = next(path.glob("*.safetensors"))
    sign(path, file, serialise({"weight": torch.zeros(2, 3), "step": torch.tensor(2)}))


def with_nan(path):
    file = next(path.glob("*.safetensors"))
    sign(path, file, serialise({"weight": torch.full((3, 2), torch.nan), "step": torch.tensor(2)}))


CORRUPT = {
    "truncated": (truncate, "tensors_00000.safetensors: 157 bytes, expected 160"),
    "flipped": (flip, "tensors_00000.safetensors: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
    "missing shard": (lambda p: next(p.glob("*.safetensors")).unlink(), "safetensors: missing"),
    "missing manifest": (lambda p: (p / "MANIFEST.json").unlink(), "MANIFEST.json: missing"),
    "empty manifest": (lambda p: (p / "MANIFEST.json").write_text(""), "not a manifest"),
    "unsigned": (lambda p: (p / "MANIFEST.json").write_text(
        (p / "MANIFEST.json").read_text().replace('"step": 2', '"step": 9')), "json: sha256"),
    "bad types": (lambda p: rewrite(p, lambda m: m.update(step="2")), "not of its type"),
    "no fields": (lambda p: rewrite(p, lambda m: m.pop("files")), "not a manifest"),
    "extra file": (lambda p: (p / "more.safetensors").write_bytes(b""), "not in the manifest"),
    "extra tensor": (lambda p: rewrite(p, lambda m: m["tensors"].pop("step")), "step"),
    "renamed": (lambda p: rewrite(p, lambda m: m.update(step=7)), "holds step 7"),
    "reshaped": (reshaped, "not the tensors that were saved: weight"),
    "overlapping": (overlap, "tensors_00000.safetensors: .*"),
    "hole": (hole, "tensors_00000.safetensors: .*"),
    "huge header": (huge_header, "tensors_00000.safetensors: .*[Hh]eader"),
    "nan": (with_nan, "NaN in weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_checkpoint_is_passed_over_with_a_warning_that_names_the_reason(tmp_path, name):
    damage, reason = CORRUPT[name]
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step_0000000002")
    if name != "renamed":
        with pytest.raises(CorruptCheckpoint, match=reason):
            checkpoint.load(tmp_path / "step_0000000002")
    with pytest.warns(UserWarning, match=f"passed over a corrupt checkpoint: .*{reason}"):
        found = checkpoint.load_latest(tmp_path)
    assert found.step == 1 and torch.equal(found.tensors["weight"], tensors(1)["weight"])


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_never_opened(tmp_path):
    canary, run = tmp_path / "canary", tmp_path / "run"
    run.mkdir()
    torch.save({"weight": Canary(canary)}, run / "last.pt")
    for load in (lambda: checkpoint.load(run / "last.pt"), lambda: checkpoint.load_latest(run)):
        with pytest.raises(UnsafeCheckpoint, match="pickle"):
            load()
    saved(run, 1)
    path = run / "step_0000000001"
    (run / "last.pt").rename(path / "tensors_00001.pt")
    rewrite(path, lambda m: m["files"].update({"tensors_00001.pt": {"bytes": 1, "sha256": ""}}))
    with pytest.raises(UnsafeCheckpoint, match="tensors_00001.pt"):
        checkpoint.load_latest(run)
    assert not canary.exists()
    torch.load(path / "tensors_00001.pt", weights_only=False)
    assert canary.exists(), "the canary would not have sung"


OUTSIDE = ("../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "tensors_00000.bin",
           "../tensors_00000.safetensors", "tensors_00000.safetensors.gz")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_another_path_is_unsafe(tmp_path, name):
    saved(tmp_path, 1, 2)
    file = tmp_path / "step_0000000002/MANIFEST.json"
    rewrite(file.parent, lambda m: m["files"].update({name: m["files"].popitem()[1]}))
    for _ in range(2):  # the second time with a hash that is wrong as well
        with pytest.raises(UnsafeCheckpoint, match="no other path"):
            checkpoint.load_latest(tmp_path)
        file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0', 1))


@pytest.mark.parametrize("target", ["tensors_00000.safetensors", "MANIFEST.json", "."])
def test_links_are_not_followed(tmp_path, target):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saved(run, 1, 2)
    path = run / "step_0000000002" / target
    path.rename(elsewhere)
    (run / "step_0000000002" if target == "." else path).symlink_to(elsewhere)
    with pytest.raises(UnsafeCheckpoint, match="link"):
        checkpoint.load_latest(run)


def test_a_link_put_in_place_after_it_was_looked_at_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(Path, "lstat", Path.stat)
    with pytest.raises(OSError) as caught:
        storage.read(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP


def test_an_unlisted_pickle_or_link_is_unsafe(tmp_path):
    for name, place in (("optimizer.pt", "write_bytes"), ("more.safetensors", "symlink_to")):
        saved(tmp_path / name, 1)
        entry = tmp_path / name / "step_0000000001" / name
        getattr(entry, place)(b"" if place == "write_bytes" else "/etc/passwd")
        with pytest.raises(UnsafeCheckpoint, match=name):
            checkpoint.load_latest(tmp_path / name)


def test_any_flipped_byte_is_refused_or_harmless(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "step_0000000001"
    sound = checkpoint.load(path)
    for file in path.iterdir():
        content = file.read_bytes()
        for i in range(len(content)):
            file.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
            try:
                found = checkpoint.load(path)
            except CheckpointError:
                continue
            assert file.name == "MANIFEST.json" and found[::2] == sound[::2]
        file.write_bytes(content)


def test_a_later_format_is_incompatible(tmp_path):
    saved(tmp_path, 1)
    rewrite(tmp_path / "step_0000000001", lambda m: m.update(version=2))
    with pytest.raises(IncompatibleCheckpoint, match="format 2, this version reads 1"):
        checkpoint.load_latest(tmp_path)
