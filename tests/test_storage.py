"""Laws of crashes: a save that was killed, or that the disk refused, costs nothing saved before."""

import errno
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases_checkpoint import saved, steps_in, tensors

from rlhf_fn import checkpoint, manifest, storage
from rlhf_fn.errors import CheckpointLocked, StorageError

NURSERY = """
import os, sys, traceback, warnings
import torch
from rlhf_fn import checkpoint

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, even if killed: print is not

def write(folder):
    with checkpoint.lock(folder):
        step, x, _ = checkpoint.load_latest(folder)
        say("loaded", step, os.getpid())
        while True:
            step, x = step + 1, {name: y * 3 % 1001 for name, y in x.items()}
            checkpoint.save(folder, step, x, {"at": step}, shard_bytes=4000)
            say("saved", step)

torch.set_num_threads(1)
warnings.simplefilter("ignore")
for line in sys.stdin:  # torch is imported once, and every writer is a process of its own
    child = os.fork()
    if child == 0:
        try:
            write(line.strip())
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    say("dead", os.waitpid(child, 0)[1])
"""


@contextmanager
def python(program: str, seconds: float = 300):
    """A Python process and its pipes; it and its children are gone afterwards, or in `seconds`."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    watchdog = threading.Timer(seconds, os.killpg, [process.pid, signal.SIGKILL])
    watchdog.start()
    try:
        with process:
            yield process
    finally:
        watchdog.cancel()


def after(step: int) -> dict[str, torch.Tensor]:
    x = {f"x{i}": torch.arange(400.0) + i for i in range(8)}
    for _ in range(step):
        x = {name: y * 3 % 1001 for name, y in x.items()}
    return x


def kill_one(nursery: subprocess.Popen, folder: Path, delay: float) -> list[int]:
    """Start a writer, kill it `delay` seconds after it has loaded; the steps it spoke of."""
    print(folder, file=nursery.stdin, flush=True)
    _, begun, pid = nursery.stdout.readline().split()
    threading.Timer(delay, os.kill, [int(pid), signal.SIGKILL]).start()
    steps = [int(begun)]
    for line in nursery.stdout:
        said, number = line.split()
        if said == "dead":
            assert int(number) == signal.SIGKILL
            break
        steps.append(int(number))
    return steps


def kill_many(folder: Path, number: int) -> None:
    checkpoint.save(folder, 0, after(0), {})
    delays, acknowledged, midway = random.Random(0), 0, 0
    with python(NURSERY, seconds=60 + number) as nursery:
        for _ in range(number):
            steps = kill_one(nursery, folder, delays.uniform(0, 0.06))
            assert steps[0] >= acknowledged, "an acknowledged step was lost"
            acknowledged = steps[-1]
            midway += any(name.startswith(".tmp_") for name in os.listdir(folder))
        nursery.stdin.close()
    with warnings.catch_warnings(action="ignore"):
        found = checkpoint.load_latest(folder)
    assert found.step >= acknowledged > 0
    assert midway > number // 5, "too few of the kills came in the middle of a save"
    for name, x in after(found.step).items():
        assert torch.equal(found.tensors[name], x)


def test_a_writer_killed_at_any_moment_loses_no_step_that_it_had_saved(tmp_path):
    kill_many(tmp_path, 25)


@pytest.mark.slow
def test_a_writer_killed_a_thousand_times_loses_no_step_that_it_had_saved(tmp_path):
    kill_many(tmp_path, 1000)


PLACES = {
    "write": (manifest, "write"),
    "open": (os, "open"),
    "fsync": (os, "fsync"),
    "mkdir": (Path, "mkdir"),
    "rename": (os, "rename"),
}


@contextmanager
def failing(call: str, k: int, code: int):
    """The k-th such call of the file system raises; a write has then written the first half."""
    place, name = PLACES[call]
    real, calls = getattr(place, name), itertools.count(1)

    def called(*arguments, **options):
        if next(calls) != k:
            return real(*arguments, **options)
        if call == "write":
            path, content = arguments
            path.write_bytes(content[: len(content) // 2])
        raise OSError(code, os.strerror(code), str(arguments[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, called)
        yield


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", PLACES)
def test_whatever_call_fails_what_was_saved_before_still_loads(tmp_path, call, code):
    saved(tmp_path, 1)
    for k in itertools.count(1):
        before = checkpoint.load_latest(tmp_path).step
        try:
            with failing(call, k, code):
                checkpoint.save(tmp_path, before + 1, tensors(before + 1), {}, shard_bytes=1)
        except StorageError as error:
            assert error.errno == code
            assert f"step {before + 1} not saved, earlier" in str(error)
        else:
            assert k > 1
            break
        found = checkpoint.load_latest(tmp_path)
        assert found and before <= found.step <= before + 1
        assert torch.equal(found.tensors["weight"], tensors(found.step)["weight"])
        assert not any(name.startswith(".tmp_") for name in steps_in(tmp_path))


def test_every_file_and_name_is_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source, target):
        events.append(("rename", sorted(os.listdir(source))))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoint.save(tmp_path / "run", 1, tensors(1), {}, shard_bytes=1)
    shards = ["tensors_00000.safetensors", "tensors_00001.safetensors"]
    at = events.index(("rename", ["MANIFEST.json", *shards]))
    temporary = events[at - 1]
    assert temporary.startswith(".tmp_1_") and temporary.endswith("_first")
    assert events == [tmp_path.name, *shards, "MANIFEST.json", temporary, events[at], "run"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path):
    saved(tmp_path, 1, 2)
    with (
        failing("rename", 2, errno.EIO),
        pytest.warns(UserWarning, match="step_0000000001 not rem"),
    ):
        saved(tmp_path, 3)
    assert checkpoint.load_latest(tmp_path).step == 3


@contextmanager
def tmpfs(folder: Path, size: str):
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    run = tmp_path / "run"
    with tmpfs(run, "1m"):
        saved(run, 1)
        with pytest.raises(StorageError, match="free some space") as caught:
            checkpoint.save(run, 2, {"weight": torch.zeros(300_000)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert checkpoint.load_latest(run).step == 1
        saved(run, 2)


def test_a_file_size_limit_leaves_the_earlier_checkpoint(tmp_path):
    saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="ulimit -f") as caught:
            checkpoint.save(tmp_path, 2, {"weight": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert checkpoint.load_latest(tmp_path).step == 1


def test_a_path_that_is_a_file_is_refused_before_the_first_step(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run"):
        with pytest.raises(StorageError, match="choose another directory") as caught:
            with checkpoint.lock(path):
                pass
        assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
        with pytest.raises(StorageError):
            checkpoint.save(path, 1, tensors(1), {})
    with pytest.raises(StorageError) as caught:
        checkpoint.load_latest(file)
    assert caught.value.errno == errno.ENOTDIR


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    with failing("open", 1, errno.EROFS), pytest.raises(StorageError, match="read-only") as caught:
        with checkpoint.lock(tmp_path):
            pass
    assert caught.value.errno == errno.EROFS


HOLDER = """
import sys
from rlhf_fn import storage
with storage.lock(sys.stdin.readline().strip()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_held_directory_names_its_holder_and_a_dead_holder_holds_nothing(tmp_path):
    with python(HOLDER) as holder:
        print(tmp_path, file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "held\n"
        message = f"in use by pid {holder.pid} on host {socket.gethostname()} for [0-9]+ s"
        with pytest.raises(CheckpointLocked, match=message):
            with checkpoint.lock(tmp_path):
                pytest.fail("two hold it")
        holder.kill()
        holder.wait()
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == holder.pid
    with checkpoint.lock(tmp_path):
        with pytest.raises(CheckpointLocked, match=f"pid {os.getpid()} "):
            with storage.lock(tmp_path):
                pytest.fail("two hold it")
    with checkpoint.lock(tmp_path):
        pass


def test_a_lock_is_let_go_by_an_error_and_read_without_trust(tmp_path):
    with pytest.raises(KeyError):
        with checkpoint.lock(tmp_path):
            raise KeyError
    with checkpoint.lock(tmp_path):
        (tmp_path / ".lock").write_text("?")
        with pytest.raises(CheckpointLocked, match="another process"):
            with checkpoint.lock(tmp_path):
                pytest.fail("two hold it")
