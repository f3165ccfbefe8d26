"""Fully sharded: a rank keeps its slice of every parameter, moment and gradient.

Parameters are DTensors. They are gathered inside the loss, all before it begins or a layer's where
the layer computes, so that its derivative is what scatters the sum of the gradients; the loss, the
optimizer and the step are those of one process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from rlhf_fn import tree
from rlhf_fn.batches import asked
from rlhf_fn.fused import InPlace
from rlhf_fn.losses import Loss, Metrics
from rlhf_fn.models import Params
from rlhf_fn.prefix import is_shared, shared
from rlhf_fn.ranks import Place, by_rows, place, rows_of, share_of, sum_over_ranks
from rlhf_fn.steps import Gradient
from rlhf_fn.tree import Tree


def device_mesh(*, shards: int, kind: str | None = None) -> DeviceMesh:
    """All ranks, as [replicas, shards]: every `shards` ranks in a row have the parameters once.

    `shards` of all ranks is fully sharded; those of a machine, hybrid: gathered within it, and the
    slices of the gradients summed over machines. `kind` of devices: cpu, cuda; by default what the
    process group is for.

    Raises:
        ValueError: `shards` does not divide the number of ranks.
    """
    ranks = place().ranks
    if shards < 1 or ranks % shards:
        raise ValueError(
            f"shards is {shards}, which does not divide the {ranks} ranks; start "
            "--nnodes × --nproc-per-node ranks, a multiple of it"
        )
    kind = kind or ("cuda" if "nccl" in dist.get_backend() else "cpu")
    return init_device_mesh(kind, (ranks // shards, shards), mesh_dim_names=("replica", "shard"))


def shard(params: Tree, mesh: DeviceMesh) -> Tree:
    """This rank's ⌈rows / shards⌉ rows of every leaf, as DTensors; those without axes stay whole.

    Copies on the device of the mesh, of what every rank has the same (`ranks.agree`), wherever that
    is: nothing is sent. A leaf that is a DTensor already stays as it is.
    """
    return tree.map(lambda x: _shard(x, mesh), params)


def _shard(x: Tensor, mesh: DeviceMesh) -> Tensor:
    if isinstance(x, DTensor):
        return x
    placements: list[Placement] = [Replicate(), Shard(0) if x.ndim else Replicate()]
    part = x
    if x.ndim and len(x):
        part = x[_rows(len(x), mesh)]
    own = part.detach().to(mesh.device_type, copy=True)
    return _dtensor(own, mesh, placements, x)


def _dtensor(own: Tensor, mesh: DeviceMesh, placements: Any, like: Tensor) -> DTensor:
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _rows(count: int, mesh: DeviceMesh) -> slice:
    return rows_of(count, Place(mesh.get_local_rank("shard"), mesh["shard"].size()))


def own_rows(x: Tensor) -> slice | None:
    """Which rows of a DTensor this rank has; None of one that all have, and of a plain tensor."""
    if not isinstance(x, DTensor) or isinstance(x.placements[-1], Replicate) or not len(x):
        return None
    return _rows(len(x), x.device_mesh)


def with_rows(x: Any, rows: Tensor) -> DTensor:
    """A DTensor as `x`, of which this rank has these rows."""
    return _dtensor(rows.to(x.device), x.device_mesh, x.placements, x)


def whole(sharded: Tree) -> Tree:
    """Every leaf whole, on every rank, without gradient; what is no DTensor stays as it is."""
    return tree.map(lambda x: tree.full(x.detach()) if isinstance(x, DTensor) else x, sharded)


def replicated(x: Any) -> Any:
    """A DTensor whole on every rank, and still one; a plain tensor as it is."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def in_slices(params: Params) -> bool:
    """Whether any of them is a DTensor."""
    return any(isinstance(x, DTensor) for x in params.values())


def on_first(params: Params) -> Params:
    """Every parameter whole, on the CPU of rank 0, to be saved; elsewhere nothing.

    Called on every rank. They are put together one after another, so a device has one at a time.
    """
    found = {}
    for name, x in params.items():
        entire = tree.full(x.detach())
        if place().rank == 0:
            found[name] = entire.cpu()
        del entire
    return found


def held(x: Tensor) -> tuple[int, Tensor] | None:
    """(first row, rows) of what this rank holds and no rank before it; None where that is nothing.

    Of what is no DTensor, or whole on every rank, rank 0 is the one to hold it.
    """
    at = place()
    if not isinstance(x, DTensor):
        return None if at.rank else (0, x)
    part, mesh = x.to_local(), x.device_mesh
    if isinstance(x.placements[-1], Replicate):
        return None if at.rank else (0, part)
    replica, index = mesh.get_coordinate() or (0, 0)
    first = _rows(len(x), mesh).start if len(x) else 0
    nothing = replica > 0 or (index > 0 and not len(part))
    return None if nothing else (first, part)


def gathered(params: Params) -> Params:
    """Every parameter whole, for a loss: its gradients are summed over ranks and scattered.

    Raises:
        TypeError: a parameter is no DTensor.
    """
    return assembled(slices(params))


def assembled(params: Params) -> Params:
    """`gathered`, where a parameter is a DTensor; any other stays as it is."""
    return {name: _gathered(x) if isinstance(x, DTensor) else x for name, x in params.items()}


def slices(params: Params) -> Params:
    """The parameters as they are: models gather them.

    Raises: as `gathered`.
    """
    wrong = [name for name, x in params.items() if not isinstance(x, DTensor)]
    if wrong:
        raise TypeError(
            f"params: {wrong[0]} is no DTensor; pass what `shard` made, and differentiate by "
            "`autograd_gradient`, as torch.func takes the sharding off"
        )
    return params


def shared_alike(batch: Any, at: Place) -> tuple[Any, bool]:
    """`ranks.share_of` what is asked of a batch, `Prefixed` if every rank's rows can be so."""
    rows, any_here = share_of(batch, at)
    every = (share_of(batch, Place(rank, at.ranks))[0] for rank in range(at.ranks))
    if all(is_shared(shared(asked(each))) for each in every):
        return shared(asked(rows)), any_here
    return asked(rows), any_here


def _gathered(x: Any) -> Tensor:
    summands = [Partial()] * x.device_mesh.ndim  # of the gradient: each rank has one
    return replicated(x).to_local(grad_placements=summands)


def fully_sharded(
    gradient: Gradient,
    *,
    gather: Callable[[Params], Params] = gathered,
    share: Callable[[Any, Place], tuple[Any, bool]] = share_of,
) -> Gradient:
    """Σ over ranks of ∇L, (L, metrics) of their rows, at parameters from `shard`.

    `gradient_step(loss, optimizer, gradient=fully_sharded(autograd_gradient))` is called on every
    rank with the same batch and key. The gradients have the placements of the parameters, and so
    has the optimizer's state.

    A rank without rows takes one 0 times, so that it meets the others wherever they gather.

    Args:
        gather: `gathered`, so that all parameters are whole on every rank while the loss and its
            derivative are computed: what is saved is the memory of gradients and moments, 12 of 16
            bytes with AdamW in float32. Or `slices`, for models that gather themselves, what a
            layer has when it runs and once more backward: `checkpointed(make, module,
            prepare=assembled)`. (Rajbhandari et al. 2020: https://arxiv.org/abs/1910.02054)
        share: a rank's rows of a batch, and whether it has any. With `slices` all ranks gather as
            often: `shared_alike` there, and not `of_shared`.

    Raises:
        TypeError: from the loss, parameters that are not all sharded, or `functional_gradient`.
    """

    def of_loss(loss: Loss) -> Callable:
        def of_slices(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Metrics]:
            return loss(gather(params), batch, key)

        def in_vain(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, Metrics]:
            total, metrics = of_slices(params, batch, key)
            return 0 * total, tree.zeros_like(metrics)

        mine, borrowed = gradient(of_slices), gradient(in_vain)

        def summed(params: Params, batch: Any, key: Tensor) -> Any:
            rows, any_here = share(batch, place())
            grads, about = (mine if any_here else borrowed)(params, rows, key)
            return grads, sum_over_ranks(about)

        return summed

    return of_loss


def shared_for(params: Params, batch: Any) -> Any:
    """`prefix.shared`, to be read with `params`; where they are slices, the batch as it is.

    Models gather slices where they compute, and that as often on every rank: also on those whose
    rows share no prompts.
    """
    return batch if in_slices(params) else shared(batch)


def model_by_rows(
    f: Callable[..., Tree], gather: Callable[[Params], Params]
) -> Callable[..., Tree]:
    """`ranks.by_rows` of `f(gather(params), *rows)`, which reads parameters alike on all ranks."""
    return lambda params, *rows: by_rows(partial(f, gather(params)))(*rows)


def on_shards(optimizer: InPlace) -> InPlace:
    """An optimizer that writes, leaf by leaf, on this rank's slices of DTensors."""

    def write(grads: Tree, state: Tree, params: Tree, norm: Tensor, made: Tensor) -> None:
        grads, state, params = tree.map(local, (grads, state, params))
        optimizer.write(grads, state, params, norm, made)

    return InPlace(optimizer.init, write)


def local(x: Tensor) -> Tensor:
    """This rank's slice of a DTensor; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x
