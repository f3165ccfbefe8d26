"""Checkpoints: a step is saved whole or not at all, verified when read, and never unpickled.

A checkpoint is a directory `step_<step>` of safetensors shards and a `MANIFEST.json` with the
SHA-256 of each of them and of itself. It is written as `.tmp_*`, synced to disk and renamed into
place; only then do older ones go. A process killed at any moment leaves the last saved step
loadable.
"""

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fn.errors import (
    CheckpointError,
    CheckpointLocked,
    CorruptCheckpoint,
    IncompatibleCheckpoint,
    StorageError,
    UnsafeCheckpoint,
)
from rlhf_fn.manifest import (
    PICKLES,
    Checkpoint,
    is_slice_name,
    kind,
    load,
    read_manifest,
    with_nan,
    write_manifest,
    write_shards,
)
from rlhf_fn.named import flatten, require, unflatten
from rlhf_fn.storage import guarded, lock, make_directory, sync_directory

__all__ = [
    "Checkpoint", "CheckpointError", "CheckpointLocked", "CorruptCheckpoint",
    "IncompatibleCheckpoint", "StorageError", "UnsafeCheckpoint",
    "flatten", "load", "load_latest", "lock", "require", "save", "unflatten",
]  # fmt: skip

_TEMPORARY = ".tmp_"
_FIRST = "_first"  # ends the temporary name of a save before which nothing was ever saved
_STEP = re.compile(r"step_(\d{10,})(?:\.(\d+))?")  # saving a step again makes step_<step>.1


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    shard_bytes: int = 2**30,
) -> Path:
    """Write `directory/step_<step>` atomically and return its path.

    Once this returns, the checkpoint outlives a kill and a power cut; if it raises, the earlier
    ones are as they were. Of the steps up to this one the newest `keep` remain. Saves do not
    guard against each other: hold `lock(directory)`.

    Args:
        meta: what JSON holds exactly: settings, fingerprints, positions.
        keep: 2 or more, so that a damaged newest checkpoint has one to fall back to.
        shard_bytes: tensors are written in files of about this many bytes.

    Raises:
        StorageError: the disk is full, read-only, not a directory, ...; `errno` is kept.
        ValueError: a tensor holds NaN, or `step`, `keep` or `shard_bytes` is out of range.
        TypeError: a tensor is none, or `meta` would not come back from JSON as it is.
    """
    check_saved(step, tensors, meta, keep, shard_bytes)
    directory = Path(directory)
    with guarded(f"step {step} not saved, earlier checkpoints are intact", directory):
        temporary = begin(directory, step)
        try:
            files = write_shards(temporary, tensors, shard_bytes, count())
            kinds = {name: kind(x) for name, x in tensors.items()}
            write_manifest(temporary, step, files, kinds, meta)
            final = finish(temporary, step)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    retire(directory, step, keep)
    return final


def begin(directory: Path, step: int) -> Path:
    """An empty folder that is not a checkpoint yet, for the files of one."""
    make_directory(directory)
    first = "" if any(map(_parse, os.listdir(directory))) else _FIRST
    temporary = directory / f"{_TEMPORARY}{step}_{uuid.uuid4().hex}{first}"
    temporary.mkdir()
    return temporary


def finish(temporary: Path, step: int) -> Path:
    """Make the folder a checkpoint, once its files are on the disk; its path."""
    directory = temporary.parent
    final = directory / _free_name(os.listdir(directory), step)
    os.rename(temporary, final)
    sync_directory(directory)
    return final


def load_latest(
    directory: str | Path, *, load: Callable[[Path], Checkpoint] = load
) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies; None where nothing was ever saved.

    A corrupt one, as `load` finds it, is passed over with a warning that names the reason; an
    unsafe or incompatible one raises. One that was never finished is ignored with a warning. File
    times mean nothing.

    Raises:
        CheckpointError: something was saved here and none of it is complete.
        StorageError: the file system failed; `errno` is kept.
    """
    directory = Path(directory)
    with guarded("checkpoints not read", directory):
        names = sorted(os.listdir(directory)) if directory.exists() else []
    unfinished = [name for name in names if name.startswith(_TEMPORARY)]
    for name in unfinished:
        warnings.warn(f"{directory}: ignored: {name} was never finished", stacklevel=2)
    reasons = [f"{name} was never finished" for name in unfinished if not name.endswith(_FIRST)]
    for name in _newest_first(names):
        try:
            return _named(directory / name, load(directory / name))
        except CorruptCheckpoint as error:
            reasons.append(str(error))
            warnings.warn(f"passed over a corrupt checkpoint: {error}", stacklevel=2)
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        raise UnsafeCheckpoint(f"{directory}: {', '.join(pickles)}: pickles are never opened")
    if reasons:
        raise CheckpointError(
            f"no complete checkpoint in {directory} ({'; '.join(reasons)}); "
            "restore one, or remove the directory to start from zero"
        )
    return None


def check_saved(
    step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int, shard_bytes: int
) -> None:
    """Raise, as `save` says, for what cannot be saved."""
    if step < 0 or keep < 2 or shard_bytes < 1:
        raise ValueError(
            f"step {step}, keep {keep}, shard_bytes {shard_bytes}: expected step >= 0, keep >= 2 "
            "(one to fall back to) and shard_bytes >= 1"
        )
    for name, x in tensors.items():
        named = isinstance(name, str) and name != "__metadata__" and not is_slice_name(name)
        if not named or not isinstance(x, Tensor):
            raise TypeError(f"tensors: {name!r} is {type(x).__name__}, expected a named Tensor")
    if bad := with_nan(tensors):
        raise ValueError(f"tensors: NaN in {', '.join(bad)}; not saved over sound checkpoints")
    try:
        same = json.loads(json.dumps(meta, allow_nan=False)) == meta
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"meta: {error}; expected what JSON holds") from error
    if not same:
        raise TypeError("meta: JSON would change it; use lists for tuples and strings for keys")


def _parse(name: str) -> tuple[int, int] | None:
    """(step, how many times it had been saved before) of a checkpoint's name."""
    match = _STEP.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _newest_first(names: list[str]) -> list[str]:
    return sorted((n for n in names if _parse(n)), key=lambda n: _parse(n) or (), reverse=True)


def _free_name(names: list[str], step: int) -> str:
    """A name that is not taken: a checkpoint is never renamed over another."""
    times = [parsed[1] for n in names if (parsed := _parse(n)) and parsed[0] == step]
    return f"step_{step:010d}" + (f".{max(times) + 1}" if times else "")


def _named(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    parsed = _parse(path.name)
    if parsed and checkpoint.step != parsed[0]:
        raise CorruptCheckpoint(f"{path}: holds step {checkpoint.step}; rename it back")
    return checkpoint


def retire(directory: Path, step: int, keep: int) -> None:
    """Remove what is superseded: renamed first, so that a half-removed one is never a checkpoint.

    Unreadable ones and later steps stay, and do not count.
    """
    kept: set[int] = set()
    for name in _newest_first(os.listdir(directory)):
        number, _ = _parse(name) or (0, 0)
        if number > step or not _readable(directory / name):
            continue
        if number not in kept and len(kept) < keep:
            kept.add(number)
            continue
        with _warned(name):
            os.rename(directory / name, directory / f"{_TEMPORARY}old_{uuid.uuid4().hex}")
    for name in os.listdir(directory):
        if name.startswith(_TEMPORARY):
            with _warned(name):
                shutil.rmtree(directory / name)


def _readable(path: Path) -> bool:
    try:
        read_manifest(path)
    except (CheckpointError, OSError):
        return False
    return True


@contextmanager
def _warned(name: str) -> Iterator[None]:
    """The checkpoint is saved by now: that an old one stays is no reason to stop."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"old checkpoint {name} not removed: {error}", stacklevel=4)
