"""What may befall a run's folder: refused in one sentence, and what was saved is still there."""

import json
import os
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest
import runs
import torch
from cases_checkpoint import flip
from runs import bits, start, steps_in, wait_for_steps

from rlhf_fn import frame
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.cli import main
from rlhf_fn.models import save_policy


@pytest.fixture
def sft(small, capsys):
    """Run `rlhf-fn sft` in a folder: (exit code, stderr)."""
    words = runs.words_of(small, None)["sft"]

    def call(out, *more):
        code = main([str(word) for word in (*words, "--out", out, *more)])
        return code, capsys.readouterr().err

    call.words = words
    return call


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([str(word) for word in (*runs.words_of(small, None)["sft"], "--out", out)]) == 0
    return out


@pytest.fixture
def damaged(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refused(result, *says):
    code, error = result
    assert code == 2 and error.splitlines()[-1].startswith("rlhf-fn sft: ")
    assert "warning" not in error.splitlines()[-1]
    assert all(word in error for word in says), error


def newest(out):
    return max((out / "checkpoints/sft").iterdir())


def truncate(path):
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [truncate, flip, lambda p: (p / "MANIFEST.json").unlink()])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_its_steps_are_run_again(
    sft, finished, damaged, damage
):
    damage(newest(damaged))
    code, error = sft(damaged, "--resume")
    assert code == 0 and "warning: passed over a corrupt checkpoint" in error
    assert "step_0000000024" in error and len(error.splitlines()) == 1
    assert load_latest(damaged / "checkpoints/sft").step == 24
    renamed = {name.replace("0024.1", "0024"): content for name, content in bits(damaged).items()}
    assert renamed == bits(finished)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(sft, damaged):
    for path in (damaged / "checkpoints/sft").iterdir():
        flip(path)
    before = (damaged / "metrics.jsonl").read_bytes()
    refused(sft(damaged, "--resume"), "CheckpointError", "no complete checkpoint", "sha256")
    assert (damaged / "metrics.jsonl").read_bytes() == before


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["tensors_00000.safetensors", "tensors_00000.pt", "."])
def test_a_pickle_among_the_checkpoints_is_never_opened(sft, damaged, tmp_path, place):
    for path in (damaged / "checkpoints/sft").iterdir():
        (path / "tensors_00000.safetensors").unlink()
        target = path if place == "." else path / place
        shutil.rmtree(path) if place == "." else None
        torch.save({"weight": Canary(tmp_path / "canary")}, target)
    refused(sft(damaged, "--resume"), "Checkpoint", "step_0000000024")
    assert not (tmp_path / "canary").exists()


DAMAGE = {
    "an empty config.json": ("config.json", lambda b: b"", "config.json is damaged"),
    "half a config.json": ("config.json", lambda b: b[:99], "config.json is damaged"),
    "a list for a config.json": ("config.json", lambda b: b"[]", "config.json is damaged"),
    "another option": ("config.json", lambda b: b.replace(b'"steps": 24', b'"steps": 25'),
                       "other options (steps: 25 → 24)"),
    "half a metrics.jsonl": ("metrics.jsonl", lambda b: b[:99], "metrics.jsonl: its first"),
    "another metric": ("metrics.jsonl", lambda b: b.replace(b"4.", b"3.", 1), "were changed since"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_file_of_the_run_that_was_changed_is_named(sft, damaged, what):
    name, change, says = DAMAGE[what]
    (damaged / name).write_bytes(change((damaged / name).read_bytes()))
    refused(sft(damaged, "--resume"), says, name if "option" not in what else str(damaged))


def test_a_run_without_its_config_or_its_log_is_not_begun_again(sft, damaged, tmp_path):
    shutil.copytree(damaged, tmp_path / "other")
    (damaged / "config.json").unlink()
    refused(sft(damaged, "--resume"), "--resume", "there is no run")
    refused(sft(damaged), "--out", "holds a run already")
    (tmp_path / "other/metrics.jsonl").unlink()
    refused(sft(tmp_path / "other", "--resume"), "metrics.jsonl", "restore the file")


def test_resume_makes_no_folder_where_there_is_no_run(sft, tmp_path):
    refused(sft(tmp_path / "mistyped", "--resume"), "no run in", "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_a_run_goes_on_only_with_the_files_it_began_with(sft, small, damaged, tmp_path):
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(small / "model", model)
    shutil.copy(small / "instructions.jsonl", data)
    words = "--model", model, "--data", data
    out = tmp_path / "own"
    assert sft(out, *words)[0] == 0
    assert sft(out, *words, "--resume")[0] == 0
    for file in (data, model / "model.safetensors", model / "tokenizer.json"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"fox", b"hen") if b"fox" in content else content[::-1])
        code, error = sft(out, *words, "--resume")
        assert code == 2 and not any("warning" in line for line in error.splitlines())
        if file == data:
            assert f"changed since the run in {out} began: --data {data};" in error
        file.write_bytes(content)
    renamed = model / "generation_config.json"
    renamed.write_text(renamed.read_text() + " ")
    refused(sft(out, *words, "--resume"), f"--model {renamed};", "restore what was there")


def test_a_second_run_in_one_folder_names_the_first_and_leaves_it_unharmed(sft, finished, tmp_path):
    process = start(*sft.words, "--out", tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGSTOP)
    for more in ((), ("--resume",)):
        code, error = sft(tmp_path / "run", *more)
        refused((code, error), "CheckpointLocked", f"pid {process.pid} ", "choose another")
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert bits(tmp_path / "run") == bits(finished)


@contextmanager
def tmpfs(folder, size):
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_wherever_a_disk_fills_the_run_ends_and_with_room_it_goes_on_to_the_same_bits(
    sft, finished, tmp_path
):
    disk, code = tmp_path / "disk", 2
    with tmpfs(disk, "2m"):
        for free in range(1, 99, 4):
            (disk / "ballast").write_bytes(bytes(2**21 - free * 4096))
            code, error = sft(disk / "run")
            if code == 0:
                break
            refused((code, error), "StorageError", "No space left", "free some space")
            (disk / "ballast").unlink()
            code, error = sft(disk / "run", *runs.resume(disk / "run"))
            assert code == 0, error
            assert bits(disk / "run") == bits(finished)
            shutil.rmtree(disk / "run")
    assert code == 0 and free > 20


@pytest.mark.parametrize("free", [0, 1, 3, 6, 10, 12])
def test_a_disk_that_fills_when_the_policy_is_saved_costs_no_training(
    sft, finished, tmp_path, monkeypatch, free
):
    def fill(*arguments):
        blocks = os.statvfs(disk).f_bavail - free
        (disk / "ballast").write_bytes(bytes(blocks * 4096))
        save_policy(*arguments)

    disk = tmp_path / "disk"
    with tmpfs(disk, "2m"):
        monkeypatch.setattr(frame, "save_policy", fill)
        refused(sft(disk / "run"), "StorageError", "No space left", "free some space")
        assert steps_in(disk / "run") == load_latest(disk / "run/checkpoints/sft").step == 24
        (disk / "ballast").unlink()
        monkeypatch.undo()
        assert sft(disk / "run", "--resume") == (0, "")
        assert bits(disk / "run") == bits(finished)


def test_a_file_size_limit_ends_the_run_and_without_it_it_goes_on(sft, finished, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    process = start(*sft.words, "--out", tmp_path / "run", preexec_fn=limit)
    _, error = process.communicate()
    refused((process.returncode, error), "StorageError", "ulimit -f")
    assert 0 < steps_in(tmp_path / "run") < 24
    assert sft(tmp_path / "run", "--resume")[0] == 0
    assert bits(tmp_path / "run") == bits(finished)


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written_is_named_before_the_first_step(sft, tmp_path, where):
    (tmp_path / "file").write_text("")
    refused(sft(tmp_path / where), "StorageError", "--out", where)


def test_config_json_is_what_the_run_was_given(finished):
    settings = json.loads((finished / "config.json").read_text())
    assert settings["command"] == "sft" and settings["steps"] == 24
    assert {name.split()[0] for name in settings["inputs"]} == {"--model", "--data"}
