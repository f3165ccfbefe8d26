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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    Tensors,
    kind,
    load,
    read_manifest,
    with_nan,
    write_files,
)
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
    _check_saved(step, tensors, meta, keep, shard_bytes)
    directory = Path(directory)
    temporary = directory / f"{_TEMPORARY}{step}_{uuid.uuid4().hex}"
    with guarded(f"step {step} not saved, earlier checkpoints are intact", temporary):
        make_directory(directory)
        if not any(map(_parse, os.listdir(directory))):
            temporary = temporary.with_name(temporary.name + _FIRST)
        try:
            temporary.mkdir()
            write_files(temporary, step, tensors, meta, shard_bytes)
            final = directory / _free_name(os.listdir(directory), step)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(directory)
    _retire(directory, step, keep)
    return final


def load_latest(directory: str | Path) -> Checkpoint | None:
    """The checkpoint of the highest step that verifies; None where nothing was ever saved.

    A corrupt one is passed over with a warning that names the reason; an unsafe or incompatible
    one raises. One that was never finished is ignored with a warning. File times mean nothing.

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
            return _load_named(directory / name)
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


def flatten(tree: Any) -> Tensors:
    """Name each tensor of a tree of dicts, tuples and NamedTuples by its path: `params/weight`.

    Raises:
        TypeError: a leaf that is neither a tensor nor None.
        ValueError: two leaves with one name.
    """
    named: Tensors = {}
    for name, leaf in _leaves(tree, ""):
        if name in named:
            raise ValueError(f"tree: two leaves are called {name!r}; rename a key")
        named[name] = leaf
    return named


def unflatten(like: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree `like` with its tensors replaced by those of `tensors`, as `flatten` named them.

    Each goes to the device of the tensor it replaces; nothing is cast or reshaped.

    Raises:
        IncompatibleCheckpoint: with every name, shape and dtype that differs.
    """
    wanted = flatten(like)
    found = {name: kind(x) for name, x in tensors.items()}
    require(found, {name: kind(x) for name, x in wanted.items()}, what="tensors")
    return _replace(like, {name: tensors[name].to(x.device) for name, x in wanted.items()}, "")


def require(found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str = "meta") -> None:
    """Check that a checkpoint is of this run: the same keys with equal values.

    Raises:
        IncompatibleCheckpoint: with a diff, one line per key.
    """
    missing = "nothing"
    lines = [
        f"  {key}: the checkpoint has {found.get(key, missing)}, "
        f"this run has {expected.get(key, missing)}"
        for key in sorted({*found, *expected})
        if key not in found or key not in expected or found[key] != expected[key]
    ]
    if lines:
        head = f"{what}: the checkpoint is of another run; use its settings or another directory"
        raise IncompatibleCheckpoint("\n".join([head, *lines]))


def _check_saved(
    step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int, shard_bytes: int
) -> None:
    if step < 0 or keep < 2 or shard_bytes < 1:
        raise ValueError(
            f"step {step}, keep {keep}, shard_bytes {shard_bytes}: expected step >= 0, keep >= 2 "
            "(one to fall back to) and shard_bytes >= 1"
        )
    for name, x in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(x, Tensor):
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


def _load_named(path: Path) -> Checkpoint:
    checkpoint, parsed = load(path), _parse(path.name)
    if parsed and checkpoint.step != parsed[0]:
        raise CorruptCheckpoint(f"{path}: holds step {checkpoint.step}; rename it back")
    return checkpoint


def _retire(directory: Path, step: int, keep: int) -> None:
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


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), part) for key, part in tree.items()]
    if isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", range(len(tree)))
        return [(str(name), part) for name, part in zip(names, tree)]
    return None


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    children = _children(tree)
    if children is not None:
        for name, part in children:
            yield from _leaves(part, f"{path}/{name}" if path else name)
    elif isinstance(tree, Tensor):
        yield path, tree
    elif tree is not None:
        raise TypeError(f"tree: {path!r} is {type(tree).__name__}, expected a Tensor or None")


def _replace(tree: Any, tensors: Tensors, path: str) -> Any:
    children = _children(tree)
    if children is None:
        return None if tree is None else tensors[path]
    parts = [_replace(part, tensors, f"{path}/{name}" if path else name) for name, part in children]
    if isinstance(tree, Mapping):
        return dict(zip(tree, parts))
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
