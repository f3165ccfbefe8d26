"""Many processes, one run: every rank has the whole batch, computes its rows of it, and they add.

The weights of a batch are normalised over the whole of it (`weights.py`) before it is shared out,
so what the ranks have is a sum, and the loss and the step are those of one process.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fn import checks, tree
from rlhf_fn.losses import Loss
from rlhf_fn.models import Params
from rlhf_fn.steps import Gradient
from rlhf_fn.tree import Tree


class RankError(RuntimeError):
    """Another rank failed, and says how; its own message is there."""


Group = Any  # a torch.distributed.ProcessGroup, or None: all ranks
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


class Place(NamedTuple):
    """Which of how many ranks this process is; the only one where there is no process group."""

    rank: int
    ranks: int


@contextmanager
def joined(*, timeout: float, gpus: bool | None = None) -> Iterator[Place]:
    """The process group that torchrun describes, while the block runs; none without torchrun.

    NCCL between CUDA devices, one to a rank, and gloo between CPUs; `gpus` says whether the former
    are wanted, by default where there are any. A rank that died ends every
    collective of the others with a RuntimeError: at once where its connections close, after
    `timeout` seconds where they do not. So no rank may work alone for longer than that.

    Raises:
        ValueError: `timeout` is not positive and finite; more ranks on a machine than GPUs.
    """
    checks.positive(timeout=timeout)
    if not os.environ.keys() >= _TORCHRUN:
        yield Place(0, 1)
        return
    gpus = torch.cuda.is_available() if gpus is None else gpus
    if gpus:
        own, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= found:
            raise ValueError(
                f"LOCAL_RANK is {own}, but this machine has {found} GPUs; start one rank for each, "
                "or compute on the CPU"
            )
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield place()  # after an error the others are not waited for
    dist.destroy_process_group()


def place(group: Group = None) -> Place:
    """This process among the ranks of `group`."""
    if not (dist.is_available() and dist.is_initialized()):
        return Place(0, 1)
    return Place(dist.get_rank(group), dist.get_world_size(group))


def rows_of(count: int, at: Place) -> slice:
    """The rows of a rank: ⌈count / ranks⌉ each, as long as there are any; the last have fewer.

    Raises:
        ValueError: there are no rows at all.
    """
    if count < 1:
        raise ValueError("batch: it has no rows; expected one or more to share out")
    size = -(-count // at.ranks)
    return slice(min(at.rank * size, count), min((at.rank + 1) * size, count))


def share_of(batch: Any, at: Place) -> tuple[Any, bool]:
    """The rows of a rank, and whether it has any: else the first, to compute and not to count."""
    mine = rows_of(len(tree.leaves(batch)[0]), at)
    any_here = mine.start < mine.stop
    return tree.map(lambda x: x[mine] if any_here else x[:1], batch), any_here


def data_parallel(gradient: Gradient, group: Group = None) -> Gradient:
    """Σ over ranks of ∇L, (L, metrics) of their rows: what `gradient` is on the whole batch.

    `gradient_step(loss, optimizer, gradient=data_parallel(autograd_gradient))` is called on every
    rank with the same state, batch and key, and returns the same on each. The parameters are
    replicated. A rank without rows adds zeros. One all-reduce for each dtype, of a copy.

    Only for losses that are sums over rows: one that compares the rows of a batch with each other
    would compare those of a rank.
    """

    def of_loss(loss: Loss) -> Callable:
        gradients = gradient(loss)  # of rows that are cut already: a compiled loss has any number

        def summed(params: Params, batch: Any, key: Tensor) -> Any:
            rows, any_here = share_of(batch, place(group))
            part = gradients(params, rows, key)
            return sum_over_ranks(part if any_here else tree.zeros_like(part), group)

        return summed

    return of_loss


def sum_over_ranks(x: Tree, group: Group = None) -> Tree:
    """Σ over ranks, at every leaf of a tree that has the same structure on each; the same bits."""
    if place(group).ranks == 1:
        return x
    leaves, sums = tree.leaves(x), {}
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        parts = [leaf.detach().reshape(-1) for leaf in leaves if leaf.dtype == dtype]
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=group)
        sums[dtype] = iter(flat.split([len(part) for part in parts]))
    return tree.map(lambda leaf: next(sums[leaf.dtype]).view(leaf.shape), x)


def by_rows(f: Callable[..., Tree], group: Group = None) -> Callable[..., Tree]:
    """`f(*rows) -> rows`, each rank computing its share of the rows, and all having all of them.

    Where an argument or the result has k rows for each of another (the answers to a prompt), they
    are shared out with it. `f` may not look from one row at another; it is called on every rank, if
    need be with a row whose result is thrown away.

    Raises:
        ValueError: the arguments' rows are no multiples of the fewest.
    """

    def shared(*rows: Tree) -> Tree:
        at, lengths = place(group), [len(x) for x in tree.leaves(rows)]
        count = min(lengths)
        if any(n % max(count, 1) for n in lengths):
            raise ValueError(f"rows: arguments have {lengths}; expected multiples of the fewest")
        mine = rows_of(count, at)
        borrowed = mine if mine.start < mine.stop else slice(0, 1)

        def cut(x: Tensor) -> Tensor:
            each = len(x) // count
            return x[borrowed.start * each : borrowed.stop * each]

        out, read = f(*tree.map(cut, rows)), borrowed.stop - borrowed.start
        return tree.map(lambda x: _gathered(x, len(x) // read, count, at, group), out)

    return shared


def _gathered(x: Tensor, each: int, count: int, at: Place, group: Group) -> Tensor:
    """The rows of all ranks, `each` for every one of `count`, from those that every rank has."""
    if at.ranks == 1:
        return x
    padded = x.new_zeros(-(-count // at.ranks) * each, *x.shape[1:])
    padded[: len(x)] = x
    sent = padded.view(torch.uint8) if x.dtype == torch.bool else padded
    found = [torch.empty_like(sent) for _ in range(at.ranks)]
    dist.all_gather(found, sent, group=group)
    return torch.cat(found)[: count * each].view(x.dtype)


def said(text: str, group: Group = None) -> list[str]:
    """What every rank has to say, in the order of ranks; all wait for each other."""
    own = text.encode()
    if place(group).ranks == 1:
        return [text]
    lengths = _every(torch.tensor([len(own)]), group).flatten().tolist()
    padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
    padded[: len(own)] = torch.tensor([*own], dtype=torch.uint8)
    rows = zip(_every(padded, group), lengths)
    return [bytes(row[:length].tolist()).decode() for row, length in rows]


def together(work: Callable[[], Any], group: Group = None) -> list[Any]:
    """What `work()` returned on every rank, as JSON has it; where one failed, all do.

    Raises:
        RankError: it failed on another rank. Where it failed here, that error.
    """
    error, own = None, None
    try:
        own = work()
    except Exception as caught:
        error = caught
    failure = None if error is None else f"{type(error).__name__}: {error}"
    answers = [json.loads(each) for each in said(json.dumps([failure, own]), group)]
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(answers):
        if failure is not None:
            raise RankError(f"rank {rank}: {failure}")
    return [found for _, found in answers]


def anywhere(here: bool, group: Group = None) -> bool:
    """Whether it is so on any rank; all wait for each other."""
    alone = place(group).ranks == 1
    return here if alone else bool(_every(torch.tensor([int(here)]), group).any())


def by_first(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` on rank 0, for what it writes; on the others nothing is done, and nobody waits."""

    @functools.wraps(f)
    def first(*args: Any, **more: Any) -> Any:
        return None if place().rank else f(*args, **more)

    return first


def agree(group: Group = None, **what: Tree) -> None:
    """Raise on every rank unless all have the same: options, rows, parameters, by any names.

    Compared are SHA-256 digests of the tensors' bytes, dtypes and shapes, and of what else there is
    as Python writes it; of DTensors those of replicas, which nobody puts together.

    Raises:
        ValueError: what differs, and which ranks have the same.
    """
    if place(group).ranks == 1:
        return
    named = {"the names of what is compared": sorted(what)}
    for each in (named, what):
        digests = _digests_of_ranks(each, group)
        differing = [
            f"{name} ({' | '.join(_alike(digests[:, i]))})"
            for i, name in enumerate(each)
            if (digests[:, i] != digests[0, i]).any()
        ]
        if differing:
            raise ValueError(
                f"the ranks do not agree on {', '.join(differing)}; start every rank with the "
                "same options, files and code"
            )


def _digests_of_ranks(what: dict[str, Tree], group: Group) -> Shaped[Tensor, "ranks names 32"]:
    own = torch.stack([torch.tensor([*digest(x)], dtype=torch.uint8) for x in what.values()])
    return _every(own, group)


def _every(x: Tensor, group: Group) -> Tensor:
    """A small tensor of each rank, stacked, on the CPU."""
    ranks = place(group).ranks
    own = x.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    found = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(found, own, group=group)
    return torch.stack(found).cpu()


def _alike(digests: Shaped[Tensor, "ranks 32"]) -> list[str]:
    """The ranks that have the same, together: ['ranks 0, 2', 'rank 1']."""
    having: dict[bytes, list[str]] = {}
    for rank, digest in enumerate(digests):
        having.setdefault(bytes(digest.tolist()), []).append(str(rank))
    return [f"rank{'s' * (len(x) > 1)} {', '.join(x)}" for x in having.values()]


def digest(x: Tree) -> bytes:
    """The SHA-256 of a tree of tensors and plain values: bytes, and how Python writes them.

    Of slices it is that of the digests of all, called on every rank of the last axis of their mesh.
    """
    sha, slices, group = hashlib.sha256(), hashlib.sha256(), None
    sha.update(repr(tree.map(_written, x)).encode())
    for leaf in tree.leaves(x):
        if isinstance(leaf, DTensor):
            group = group or leaf.device_mesh.get_group(leaf.device_mesh.ndim - 1)
            slices.update(_bytes(leaf.to_local()))
        elif isinstance(leaf, Tensor):
            sha.update(_bytes(leaf))
    if group is not None:
        own = torch.tensor([*slices.digest()], dtype=torch.uint8)
        sha.update(_bytes(_every(own, group)))
    return sha.digest()


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _written(leaf: Any) -> Any:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf
