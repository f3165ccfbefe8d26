"""Checkpoints that many ranks write together, and any number of ranks reads.

The folder is that of `checkpoint.py`, on a file system that all ranks share: every rank writes what
it holds of the tensors, and when all of it is on the disk, rank 0 writes the manifest and renames.
"""

import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fn import checkpoint
from rlhf_fn.manifest import kind, slice_name, write_manifest, write_shards
from rlhf_fn.ranks import place, together
from rlhf_fn.sharding import held
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
