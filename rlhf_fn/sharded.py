"""Checkpoints that many ranks write together, and any number of ranks reads.

The folder is that of `checkpoint.py`, on a file system that all ranks share: every rank writes what
it holds of the tensors, and when all of it is on the disk, rank 0 writes the manifest and renames.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fn import checkpoint
from rlhf_fn.errors import CorruptCheckpoint
from rlhf_fn.manifest import kind, slice_name, write_manifest, write_shards
from rlhf_fn.ranks import agree, place, together
from rlhf_fn.sharding import held, own_rows, with_rows
from rlhf_fn.storage import guarded


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
    shard_bytes: int = 2**30,
) -> None:
    """`checkpoint.save`, called on every rank: slices of DTensors, and a share of other tensors.

    What is no DTensor must be the same on all ranks; each writes some of it. `checkpoint.load` puts
    slices together and `unflatten` takes them apart again, on another number of ranks if need be.

    Raises: as `checkpoint.save`, on every rank: where the failure was another's, a RankError that
        names it.
    """
    if place().ranks == 1 and not any(isinstance(x, DTensor) for x in tensors.values()):
        checkpoint.save(directory, step, tensors, meta, keep=keep, shard_bytes=shard_bytes)
        return
    directory, at = Path(directory), place()
    mine = dict(_mine(tensors))
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}
    failed = f"step {step} not saved, earlier checkpoints are intact"

    def begin() -> str:
        checkpoint.check_saved(step, local, meta, keep, shard_bytes)
        return str(checkpoint.begin(directory, step)) if at.rank == 0 else ""

    with guarded(failed, directory):
        temporary = Path(together(begin)[0])
        try:
            numbers = count(at.rank, at.ranks)
            files = together(lambda: write_shards(temporary, mine, shard_bytes, numbers))
            together(lambda: _finish(temporary, step, files, tensors, meta) if not at.rank else "")
        except BaseException:
            if at.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    if at.rank == 0:
        checkpoint.retire(directory, step, keep)


def load_latest(directory: str | Path, like: Mapping[str, Tensor]) -> checkpoint.Checkpoint | None:
    """`checkpoint.load_latest`, called on every rank: of a DTensor in `like` it reads its rows.

    Each rank checks some of the files, and what one of them finds corrupt all pass over.

    Raises: as `checkpoint.load_latest`, on every rank: where the failure was another's, a RankError
        that names it. ValueError: the ranks see other checkpoints.
    """
    folder = Path(directory)

    def names() -> list[str]:
        with guarded("checkpoints not read", folder):
            return sorted(os.listdir(folder)) if folder.exists() else []

    agree(checkpoints=together(names)[place().rank])

    def load(path: Path) -> checkpoint.Checkpoint:
        found = []

        def corrupt() -> str:
            try:
                found.append(_own(path, like))
            except CorruptCheckpoint as error:
                return str(error)
            return ""

        if reasons := [reason for reason in together(corrupt) if reason]:
            raise CorruptCheckpoint(reasons[0])
        return found[0]

    return checkpoint.load_latest(directory, load=load)


def _own(path: Path, like: Mapping[str, Tensor]) -> checkpoint.Checkpoint:
    """A checkpoint, in the slices that `like` has where it fits, as far as this rank checks it."""
    placed = {}

    def rows(kinds: Mapping[str, str]) -> dict[str, slice]:
        own = {name: own_rows(x) for name, x in like.items() if kinds.get(name) == kind(x)}
        placed.update({name: each for name, each in own.items() if each is not None})
        return placed

    found = checkpoint.load(path, rows=rows, reader=place())
    slices = {name: with_rows(like[name], found.tensors[name]) for name in placed}
    return found._replace(tensors=found.tensors | slices)


def _mine(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes: its slices, and of the whole tensors every one in so many."""
    at = place()
    for i, (name, x) in enumerate(sorted(tensors.items())):
        if not isinstance(x, DTensor):
            if i % at.ranks == at.rank:
                yield name, x
        elif (part := held(x)) is not None:
            first, rows = part
            yield (slice_name(name, first) if x.ndim else name), rows


def _finish(
    temporary: Path, step: int, files: list[Any], tensors: Mapping[str, Tensor], meta: Any
) -> str:
    kinds = {name: kind(x) for name, x in tensors.items()}
    every = {name: each for part in files for name, each in part.items()}
    write_manifest(temporary, step, every, kinds, meta)
    return str(checkpoint.finish(temporary, step))
