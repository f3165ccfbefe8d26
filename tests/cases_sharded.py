"""What the ranks of a test's world save of a state in slices, and read again."""

import errno
import os
import signal
import warnings
from unittest import mock

import torch
from cases_ranks import state_of

from rlhf_fn import checkpoint, manifest, ranks, sharded, sharding, tree
from rlhf_fn.checkpoint import flatten, load_latest, unflatten


def saved(folder, shards, how="", step=7):
    """Save it; how each rank's tensors are, whole."""
    state = state_of(shards)
    write = manifest.write
    if how == "full" and ranks.place().rank == 1:

        def write(path, content):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if how == "killed" and ranks.place().rank == 1:

        def write(path, content):
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(manifest, "write", write):
        sharded.save(folder, step, flatten(state), {"at": 7}, shard_bytes=40)
    return sharding.whole(state)


def read_again(folder, shards):
    """What a world with so many shards reads: of whole tensors, and of slices, put together."""
    state = state_of(shards)
    like = tree.map(torch.zeros_like, state)
    found = unflatten(like, load_latest(folder).tensors)
    for one, other in zip(tree.leaves(found), tree.leaves(state)):
        assert type(one) is type(other)
        assert getattr(one, "placements", None) == getattr(other, "placements", None)
    mine = sharded.load_latest(folder, flatten(like)).tensors
    for name, x in flatten(found).items():
        whole = sharding.own_rows(x) is None
        assert whole or mine[name].to_local().shape == x.to_local().shape, "read in slices"
    return sharding.whole(found), sharding.whole(unflatten(like, mine))


def read_in_parts(folder, shards):
    """The files that this rank has checked; the most rows that it keeps of a tensor of 7."""
    checked, kept, read, load = [], [], manifest._read_shard, manifest.load

    def counted(path, expected):
        checked.append(path.name)
        return read(path, expected)

    def seen(*args, **options):
        found = load(*args, **options)
        kept.extend(len(x) for name, x in found.tensors.items() if name.endswith("table"))
        return found

    with (
        mock.patch.object(manifest, "_read_shard", counted),
        mock.patch.object(checkpoint, "load", seen),
    ):
        sharded.load_latest(folder, flatten(state_of(shards)))
    return checked, max(kept)


def read_refused(folder, shards):
    """Where rank 1 may not open a file that rank 0 checks."""
    opened = os.open

    def refuse(path, *args):
        if str(path).endswith("tensors_00000.safetensors") and ranks.place().rank == 1:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args)

    with mock.patch.object(os, "open", refuse):
        return sharded.load_latest(folder, flatten(state_of(shards))).step


def read_apart(folder, shards, refused=False):
    """Where rank 1 sees no checkpoint, or may not look."""
    listed = os.listdir

    def refuse(path):
        if refused and ranks.place().rank == 1:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    folder = folder if refused or ranks.place().rank == 0 else folder / "nowhere"
    with mock.patch.object(os, "listdir", refuse):
        return sharded.load_latest(folder, flatten(state_of(shards)))


def read_damaged(folder, shards):
    """The step that a world reads, and its warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = sharded.load_latest(folder, flatten(state_of(shards)))
    return found.step, [str(each.message) for each in said]
