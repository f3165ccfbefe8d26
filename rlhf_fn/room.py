"""What memory a computation takes, known before it is done."""

import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fn import tree
from rlhf_fn.allocator import kept
from rlhf_fn.config import SMALLER, ConfigError
from rlhf_fn.losses import Loss
from rlhf_fn.models import Params
from rlhf_fn.ranks import by_first
from rlhf_fn.sharding import local
from rlhf_fn.steps import Gradient


class Held(TorchDispatchMode):
    """The most bytes of storages, made while this is on, that live at once: its `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.known = weakref.WeakSet()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(each.alias_info for each in func._schema.returns):
            return out  # views, maybe of what was there before
        for x in tree.leaves(out):
            if isinstance(x, Tensor) and (memory := x.untyped_storage()) not in self.known:
                self.known.add(memory)
                self._add(memory.nbytes())
                weakref.finalize(memory, self._add, -memory.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of tensors that `function(*args)` holds at once, on top of its arguments.

    It is called with tensors that have no numbers, so that nothing is computed and nothing
    allocated. What single kernels work in is not counted, and no allocator's waste.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        unread = tree.map(fake.from_tensor, args)
        with Held() as held:
            function(*unread)
    return held.peak


def free_memory(device: torch.device) -> int | float:
    """Bytes that can still be had on a device; ∞ where nobody says.

    Of the memory of a machine a rank has its share: the others take theirs at the same time.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    of_system = (int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun says how many
    return next(of_system, math.inf) / sharing + kept()


def require_room(what: str, needed: int, device: torch.device, change: str) -> None:
    """Raise ConfigError, which says what to change, if a device has not so many bytes left."""
    free = free_memory(device)
    if needed > free:
        raise ConfigError(f"{what}; {free / 2**20:,.1f} MiB are free: {change}")


def planned(gradient: Gradient, *, microbatches: int = 1) -> Gradient:
    """A gradient that is asked what memory it takes before it is computed, and says so once.

    Beside the parameters and the optimizer's state, which are there; of several microbatches with
    the sum of their gradients. Inside of `sharding.fully_sharded` with what is gathered, but
    without what `ranks.data_parallel` sends. It is asked again of a batch that is larger by a tenth
    than all before it, as rows are ragged, by each rank of its own rows: ranks do not meet here.

    Raises: ConfigError, before anything is computed, if that is more memory than is free.
    """

    def of_loss(loss: Loss) -> Callable:
        plain, largest = gradient(loss), 0

        def with_room(params: Params, batch: Any, key: Tensor) -> Any:
            nonlocal largest
            size = sum(x.numel() for x in tree.leaves(batch))
            if size > 1.1 * largest:
                needed = peak_bytes(plain, params, batch, key)
                if microbatches > 1:
                    grads = sum(local(p).nbytes for p in params.values())
                    needed = max(needed + grads, 3 * grads)  # the sum so far, one more, the new sum
                tokens = sum(x.numel() for x in tree.leaves(batch.tokens))
                what = f"a step, {tokens:,} tokens at once: {needed / 2**20:,.1f} MiB"
                require_room(what, needed, tree.device(params), SMALLER)
                if not largest:
                    by_first(print)(what)
                largest = size
            return plain(params, batch, key)

        return with_room

    return of_loss
