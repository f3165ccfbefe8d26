"""The format of one checkpoint: a directory of safetensors shards and a `MANIFEST.json`.

The manifest holds the size and SHA-256 of every shard, the dtype and shape of every tensor, and
its own SHA-256. What it does not list, or what is not as it says, is not loaded. Ranks may have
written some rows of a tensor each, as `name#<first row>`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from rlhf_fn.errors import CorruptCheckpoint, IncompatibleCheckpoint, UnsafeCheckpoint
from rlhf_fn.storage import check, guarded, read, sync_directory, write

PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}

_VERSION = 1
_MANIFEST = "MANIFEST.json"
_SHARD = re.compile(r"tensors_\d{5}\.safetensors")

_SLICE = re.compile(r"(.*)#(\d+)", re.DOTALL)

Tensors = dict[str, Tensor]
Files = dict[str, dict[str, Any]]


class Checkpoint(NamedTuple):
    step: int
    tensors: Tensors
    meta: dict[str, Any]


def load(
    path: str | Path,
    *,
    rows: Callable[[Mapping[str, str]], Mapping[str, slice]] = lambda kinds: {},
    reader: tuple[int, int] = (0, 1),
) -> Checkpoint:
    """Read one checkpoint directory, every byte of it checked against the manifest.

    Args:
        rows: of the tensors, by their `kind`s, which rows are kept, where these are not all.
        reader: which of how many this is, that read it at once. Each checks some of the files: what
            one finds is sound if what all of them find is.

    Raises:
        CorruptCheckpoint: which file, with the expected and the actual size or hash.
        UnsafeCheckpoint: a pickle, a link, or a name that leaves the directory.
        IncompatibleCheckpoint: written by another version of this format.
        StorageError: the file system failed; `errno` is kept.
    """
    path = Path(path)
    with guarded("checkpoint not read", path):
        if path.is_symlink() or path.is_file():
            raise UnsafeCheckpoint(f"{path}: a checkpoint is a directory; links, pickles and "
                                   "other files are never opened")  # fmt: skip
        entries = os.listdir(path)
        manifest = read_manifest(path)
        for name in entries:
            _check_entry(path / name, manifest["files"])
        kinds, parts = manifest["tensors"], {}
        kept = rows(kinds)
        for i, (file, expected) in enumerate(sorted(manifest["files"].items())):
            content = _mapped if (i - reader[0]) % reader[1] else _read_shard
            for piece, x in content(path / file, expected).items():
                name, part = _part(piece, x, kept)
                parts.setdefault(name, []).append(part)
    whole = {name: _joined(each) for name, each in parts.items()}
    found = {name: x and kind(x.rows) for name, x in whole.items()}
    if found != kinds:
        differ = sorted({k for k, _ in found.items() ^ kinds.items()})
        raise CorruptCheckpoint(f"{path}: not the tensors that were saved: {', '.join(differ)}")
    tensors = {name: x.kept for name, x in whole.items() if x}
    if bad := with_nan(tensors):
        raise CorruptCheckpoint(f"{path}: NaN in {', '.join(bad)}")
    return Checkpoint(manifest["step"], tensors, manifest["meta"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory, its hash and its structure checked."""
    file = path / _MANIFEST
    content = read(file)
    try:
        signed = json.loads(content)
        manifest, digest = signed["manifest"], signed["sha256"]
        for name in manifest["files"]:
            if not _SHARD.fullmatch(name):
                raise UnsafeCheckpoint(f"{file}: lists {name!r}; expected tensors_00000.safetensors"
                                       ", ... beside the manifest, and no other path")  # fmt: skip
        if (actual := _digest(_canonical(manifest))) != digest:
            raise CorruptCheckpoint(f"{file}: sha256 {actual}, expected {digest}")
        if manifest["version"] != _VERSION:
            raise IncompatibleCheckpoint(
                f"{file}: format {manifest['version']}, this version reads {_VERSION}"
            )
        if not _well_formed(manifest):
            raise CorruptCheckpoint(f"{file}: a field is not of its type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{file}: not a manifest ({type(error).__name__})") from error
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    shards = manifest["files"].values()
    return (
        type(manifest["step"]) is int
        and isinstance(manifest["meta"], dict)
        and isinstance(manifest["tensors"], dict)
        and all(type(s["bytes"]) is int and type(s["sha256"]) is str for s in shards)
    )


def _check_entry(entry: Path, files: Mapping[str, Any]) -> None:
    if entry.suffix in PICKLES:
        raise UnsafeCheckpoint(f"{entry}: pickles run code when opened and are never opened")
    if entry.is_symlink():
        raise UnsafeCheckpoint(f"{entry}: a link; links are not followed")
    if entry.name != _MANIFEST and entry.name not in files:
        raise CorruptCheckpoint(f"{entry}: not in the manifest")


def _read_shard(path: Path, expected: Mapping[str, Any]) -> Tensors:
    content = read(path, size=expected["bytes"])
    if (actual := _digest(content)) != expected["sha256"]:
        raise CorruptCheckpoint(f"{path}: sha256 {actual}, expected {expected['sha256']}")
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # hash and content agree, so somebody made it so
        raise CorruptCheckpoint(f"{path}: {error}") from error


def _mapped(path: Path, expected: Mapping[str, Any]) -> Tensors:
    """The tensors of a file that another reader checks: they are read where they are looked at."""
    check(path, size=expected["bytes"])
    os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))  # safetensors does not say why it cannot
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error


def slice_name(name: str, first: int) -> str:
    """What the rows of a tensor from that one on are called where ranks wrote some each."""
    return f"{name}#{first}"


def is_slice_name(name: str) -> bool:
    """Whether `slice_name` could have made it."""
    return _SLICE.fullmatch(name) is not None


class _Part(NamedTuple):
    """Rows of a tensor as a file has them, from the first on; and those of them that are kept."""

    first: int
    rows: Tensor  # without numbers
    kept: Tensor


def _part(piece: str, x: Tensor, rows: Mapping[str, slice]) -> tuple[str, _Part]:
    """What a file calls `piece`, by the name of the tensor that it is of."""
    match = _SLICE.fullmatch(piece)
    name, first = (match[1], int(match[2])) if match else (piece, 0)
    kept = x
    if name in rows and x.ndim:
        kept = x[max(rows[name].start - first, 0) : max(rows[name].stop - first, 0)]
    return name, _Part(first, x.to("meta"), kept.clone())


def _joined(parts: list[_Part]) -> _Part | None:
    """The parts of a tensor as one; None if they do not follow each other or are not alike."""
    parts = sorted(parts, key=lambda part: part.first)
    ends = accumulate(len(part.rows) if part.rows.ndim else 1 for part in parts)
    alike = {(part.rows.dtype, part.rows.ndim, part.rows.shape[1:]) for part in parts}
    if [part.first for part in parts] != [0, *ends][:-1] or len(alike) > 1:
        return None
    if len(parts) == 1:
        return parts[0]
    return _Part(0, *(torch.cat(each) for each in list(zip(*parts))[1:]))


def with_nan(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN."""
    wide = {k: x for k, x in tensors.items() if x.is_floating_point() and x.itemsize > 1}
    return [name for name, x in wide.items() if x.isnan().any()]


def kind(x: Tensor) -> str:
    """Dtype and shape, as the manifest writes them: `float32 [2, 3]`."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[Tensors]:
    """Split into dicts of about `shard_bytes`; every tensor a contiguous one of its own, on CPU."""
    shard: Tensors = {}
    size = 0
    for name, x in sorted(tensors.items()):
        if shard and size + x.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())
        size += x.nbytes
    if shard:
        yield shard


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], shard_bytes: int, numbers: Iterable[int]
) -> Files:
    """Write the tensors into `path`, in files of those numbers; what a manifest says of each."""
    files = {}
    for number, shard in zip(numbers, _shards(tensors, shard_bytes)):
        name, content = f"tensors_{number:05d}.safetensors", safetensors.torch.save(shard)
        write(path / name, content)
        files[name] = {"bytes": len(content), "sha256": _digest(content)}
    return files


def write_manifest(
    path: Path, step: int, files: Files, kinds: Mapping[str, str], meta: Mapping[str, Any]
) -> None:
    """Write the manifest of the files in `path`, and wait until all names are on the disk."""
    manifest = {
        "version": _VERSION, "torch": torch.__version__, "step": step, "files": files,
        "tensors": dict(kinds), "meta": meta,
    }  # fmt: skip
    signed = {"sha256": _digest(_canonical(manifest)), "manifest": manifest}
    write(path / _MANIFEST, json.dumps(signed, indent=1, sort_keys=True).encode())
    sync_directory(path)
