"""Sampling with compiled turns, and the memory that sampling takes.

A turn reads the last token of every row and draws the next: one graph, `rollout.turn` compiled.
Batch, prompt width, length and step are inputs of the graph, not constants in it.
"""

import re
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_fn import checks, tree
from rlhf_fn.decoding import Cache, Decoder
from rlhf_fn.models import Params
from rlhf_fn.rollout import Engine, turn
from rlhf_fn.tree import wide

_ARGUMENT = re.compile(r"(?<![\w.'])(args|options)\b")  # by the names that `one_turn` gives them


def one_graph(turn: Callable, **options: Any) -> Callable:
    """`torch.compile` in one graph that is guarded by a turn's arguments and by torch's state.

    Not by its decoder, which is never changed: most of a thousand guards, asked at every token.
    """
    of_arguments: dict[str, Any] = {"guard_filter_fn": _of_arguments}  # torch.compile empties it
    return torch.compile(turn, fullgraph=True, options=of_arguments, **options)


def compiled(decoder: Decoder, compile: Callable[[Callable], Callable] = one_graph) -> Engine:
    """What `sample` takes for `decoder`: the same draws, with one graph for all turns.

    Make it once and keep it: the graph is its own. It serves every batch of two rows or more,
    every prompt and every length; one row has a graph of its own, and so have other `top_k` and
    `top_p`, another number of stops, another dtype, a temperature for each row. Rows and columns
    come in the sizes of `bucket`, of which there are few where each is recorded, as CUDA graphs
    are. Prompts are read as `decoder` reads them.

    Args:
        compile: makes the graph; `partial(one_graph, ...)` for other options of `torch.compile`.
    """

    def one_turn(*args: Any, **options: Any) -> Any:
        return turn(decoder.decode, *args, **options)

    graph = compile(_own_code(one_turn))

    def marked(
        params: Params, tokens: Tensor, attention: Tensor, index: int, cache: Cache, step: int,
        keys: Tensor, alive: Tensor, temperature: float | Tensor, stops: Tensor, **options: Any,
    ) -> Any:  # fmt: skip
        if not isinstance(temperature, Tensor):
            temperature = torch.tensor(temperature, dtype=torch.float64, device=keys.device)
        for x in (tokens, attention, keys, alive, *tree.leaves(cache)):
            torch._dynamo.mark_dynamic(x, 0)
        for x, axis in ((attention, 1), *((x, 2) for x in tree.leaves(cache))):
            torch._dynamo.mark_dynamic(x, axis)
        if temperature.ndim:
            torch._dynamo.mark_dynamic(temperature, 0)
        at, number = (torch.tensor(n, device=keys.device) for n in (index, step))
        drawing = number, keys, alive, temperature, stops
        return graph(params, tokens, attention, at, cache, *drawing, **options)

    return Engine(decoder.prefill, marked, bucket)


def bucket(n: int) -> int:
    """The next of 2, 3, 4, 6, 8, 12, 16, 24, 32, ...: less than half more than n > 1."""
    power = 1 << (n - 1).bit_length()
    return max(2, power * 3 // 4 if power * 3 // 4 >= n else power)


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which to keep: those of torch's state, which have no name, and those of arguments."""
    return [not guard.name or bool(_ARGUMENT.search(guard.name)) for guard in guards]


def _own_code(function: Callable) -> FunctionType:
    """The function with a code object and a name of its own, by which torch counts graphs."""
    code = function.__code__.replace(co_name=f"turn_{id(function):x}")
    return FunctionType(code, function.__globals__, closure=function.__closure__)


class MemoryPlan(NamedTuple):
    """Bytes that sampling holds at once, on top of what the caller holds; `str` is one line."""

    weights: int
    cache: int  # keys and values of all layers, for every answer
    copied: int  # of the cache, beside it: the prompts', or that of the half that goes on
    logits: int  # with z and exp z of an eager draw, which sums in float64
    rollout: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = (f"{name} {size / 2**20:,.1f}" for name, size in self._asdict().items())
        return f"sampling: {self.total / 2**20:,.1f} MiB ({', '.join(parts)})"


def memory_plan(
    decoder: Decoder | Engine,
    params: Params,
    *,
    prompts: int,
    group: int,
    width: int,
    max_new_tokens: int,
) -> MemoryPlan:
    """What `sample` will hold for that many prompts of `width` tokens, a group of answers to each.

    The decoder itself is asked, with tensors that have no numbers. What the layers hold while they
    read the prompts is not counted.

    Raises:
        TypeError, ValueError: a size that is no int ≥ 1, or rows too long for the model.
    """
    checks.count(least=1, prompts=prompts, group=group, width=width, max_new_tokens=max_new_tokens)
    length, answers = width + max_new_tokens, prompts * group
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        unread = {
            name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in params.items()
        }
        tokens = torch.zeros(prompts, width, dtype=torch.int64, device=tree.device(params))
        logits, cache = decoder.prefill(unread, tokens, tokens == 0, length)
        per_prompt = sum(x.nbytes for x in tree.leaves(cache))
        draws = wide(logits).itemsize
    held = per_prompt * group
    moved = max(per_prompt if group > 1 else 0, held // 2 if answers > 1 else 0)
    per_logit = logits.dtype.itemsize + 2 * torch.float64.itemsize
    return MemoryPlan(
        weights=sum(p.nbytes for p in params.values()),
        cache=held,
        copied=moved,
        logits=answers * logits.shape[-1] * per_logit,
        rollout=answers * length * (torch.int64.itemsize + 2 * torch.bool.itemsize + draws),
    )
