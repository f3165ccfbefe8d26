"""Files that are on the disk when the call returns, and a lock that dies with its process."""

import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_fn.errors import CheckpointLocked, CorruptCheckpoint, StorageError, UnsafeCheckpoint

_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or raise the quota",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EACCES: "make the directory writable or choose another",
    errno.ENOTDIR: "a file is in the way; choose another directory",
    errno.EEXIST: "a file is in the way; choose another directory",
    errno.ENOENT: "check the path",
}


@contextmanager
def guarded(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a `StorageError` with the same errno that says what failed and why.

    Libraries in Rust (safetensors, tokenizers) say "(os error 28)" in exceptions of other classes.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        if not rust and not isinstance(error, OSError):
            raise
        number = getattr(error, "errno", None) or (int(rust[1]) if rust else None)
        fix = _FIXES.get(number or 0, "see the error above")
        message = f"{what}: {getattr(error, 'strerror', None) or error}; {fix}"
        place = str(getattr(error, "filename", None) or path)
        raise StorageError(number, message, place) from error


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each one's name synced to disk."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the names in `path` are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens on the way."""
    temporary = path.with_name(f".tmp_{path.name}")
    temporary.unlink(missing_ok=True)
    write(temporary, content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def read(path: Path, *, size: int | None = None) -> bytes:
    """Read a regular file, of exactly `size` bytes where given.

    Raises:
        CorruptCheckpoint: it is missing or of another size.
        UnsafeCheckpoint: it is a link, a pipe or a device.
    """
    check(path, size=size)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def check(path: Path, *, size: int | None = None) -> None:
    """Raise, as `read` does, for what it would not read."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path}: missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeCheckpoint(f"{path}: not a regular file; links are not followed")
    if size is not None and status.st_size != size:
        raise CorruptCheckpoint(f"{path}: {status.st_size} bytes, expected {size}")


@contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold `directory` for this process; the kernel lets go when the process dies, however.

    Creates the directory, so one that cannot be written fails here and not hours later.

    Raises:
        CheckpointLocked: with the pid, host and age of the process that holds it.
        StorageError: the directory cannot be written; `errno` is kept.
    """
    path = Path(directory) / ".lock"
    with guarded("directory not locked", path):
        make_directory(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
    try:
        with guarded("directory not locked", path):
            _acquire(descriptor, path)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointLocked(
            f"{path.parent}: in use by {_holder(path)}; end it or choose another directory"
        ) from error
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    os.fsync(descriptor)


def _holder(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        age = time.time() - owner["since"]
        return f"pid {owner['pid']} on host {owner['host']} for {age:.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
