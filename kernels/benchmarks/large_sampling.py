"""Sampling from half a billion parameters in bfloat16, beside what the memory's bandwidth allows.

A turn reads every weight and, on average, the cache with half of the answers in it. So at most

    tokens/s = rows · bandwidth / (bytes of the weights + bytes of that cache)

with the bandwidth of a copy, measured here. Everybody draws the same number of tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench
import torch
import torch._inductor.config
from bench import Job, Machine, Row
from llamas import HALF_BILLION, Shape, llama

COLUMNS = ("rows", "who", "tokens/s", "of the limit", "× generate", "ms", "quartiles", "extra MB")
FIRST = ("first call of", "seconds", "graphs not recorded")
PLANS = ("answers", "memory plan")


class Size(NamedTuple):
    shape: Shape = HALF_BILLION
    rows: tuple[int, ...] = (16, 64, 256)
    prompt: int = 64
    new: int = 65  # 64 turns: the prompts give the first

    def limit(self, rows: int, bandwidth: float) -> float:
        """Tokens per second at that many bytes per second."""
        shape = self.shape
        of_token = 2 * shape.layers * shape.kv_heads * (shape.width // shape.heads)
        cache = rows * (self.prompt + self.new / 2) * of_token
        return rows * bandwidth / (torch.bfloat16.itemsize * (shape.products + cache))


def shown(rows: list[Row]) -> str:
    """Speeds, first calls, memory."""
    tables = [bench.table([r for r in rows if t[0] in r], t) for t in (COLUMNS, FIRST, PLANS)]
    whys = dict.fromkeys(f"- {r['job']}: {r['status']}, {r['why']}" for r in rows if "why" in r)
    return "\n\n".join([*tables, "\n".join(whys)])


def jobs(machine: Machine, *, size: Size | None = None, seconds: float = 6.0) -> Iterator[Job]:
    """First everything is compiled, then a race of every number of rows."""
    size, ways = size or Size(), {}
    yield "first calls", partial(begin, ways, machine, size)
    for rows in size.rows:
        yield f"{rows} rows", partial(raced, ways, machine, size, rows, seconds)
    yield "memory plans", partial(plans, machine, size)


def begin(ways: dict[str, Callable], machine: Machine, size: Size) -> list[Row]:
    """Fill `ways` with those that get through a first call of the fewest rows."""
    bench.compiled_anew()
    rows = []
    for who, way in contenders(machine, size).items():
        before = skipped_graphs()
        try:
            taken = bench.cpu().seconds(lambda way=way: way(*asked(machine, size, size.rows[0])))
        except Exception as error:
            rows.append({"who": who, "status": "FAILED", "why": f"{who}: {bench.said(error)}"})
            continue
        ways[who] = way
        left = skipped_graphs() - before
        rows.append({"first call of": who, "seconds": taken, "graphs not recorded": left})
    return rows


def skipped_graphs() -> int:
    """How often torch ran kernels one by one where CUDA graphs were asked for."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def raced(
    ways: dict[str, Callable], machine: Machine, size: Size, rows: int, seconds: float
) -> list[Row]:
    """Everybody in turns, on fresh draws."""
    from rlhf_fn.random import fold_in

    prompts, keys = asked(machine, size, rows)
    bandwidth = copied(machine)
    laps = {who: lambda i, way=way: way(prompts, fold_in(keys, i)) for who, way in ways.items()}
    times = bench.race(laps, machine, rounds=5, least=2, seconds=seconds, warm=0)
    usual, out = times.get("generate"), []
    for who, taken in times.items():
        at = {"rows": rows, "who": who}
        if isinstance(taken, str):
            out.append(at | {"status": "FAILED", "why": f"{who}: {taken}"})
            continue
        speed = rows * size.new / taken.median
        beside = usual.median / taken.median if isinstance(usual, bench.Times) else "?"
        out.append(at | {
            "tokens/s": speed, "of the limit": speed / size.limit(rows, bandwidth),
            "× generate": beside, "ms": taken.median * 1e3,
            "quartiles": f"{taken.low * 1e3:.4g}–{taken.high * 1e3:.4g}",
            "extra MB": taken.peak / 1e6,
        })  # fmt: skip
    limit = {"rows": rows, "who": "the limit", "tokens/s": size.limit(rows, bandwidth)}
    return [*out, limit | {"of the limit": 1.0}]


def copied(machine: Machine) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(max(bench.CACHE, 2**20), dtype=torch.uint8, device=machine.device)
    laps = {"copy": bench.copied([source])}
    return 2 * source.nbytes / bench.medians(bench.race(laps, machine, seconds=1.0))["copy"]


def asked(machine: Machine, size: Size, rows: int) -> tuple[Any, torch.Tensor]:
    """(prompts, keys)."""
    from rlhf_fn.random import key, split
    from rlhf_fn.rollout import Prompts

    tokens = torch.randint(size.shape.vocab, (rows, size.prompt), device=machine.device)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return prompts, split(key(0, device=machine.device), rows)


def contenders(machine: Machine, size: Size) -> dict[str, Callable[..., Any]]:
    """name -> (prompts, keys) -> sequences."""
    from rlhf_fn.engine import compiled, one_graph
    from rlhf_fn.rollout import sample

    module, turns, params = policy(machine, size)
    graph = partial(one_graph, backend=machine.backend)

    def ours(engine: Any) -> Callable:
        return lambda prompts, keys: sample(
            engine, params, prompts, keys, max_new_tokens=size.new, temperature=1.0, stop=(), pad=0
        )

    def generate(prompts: Any, keys: torch.Tensor) -> Any:
        return module.generate(
            prompts.tokens, attention_mask=prompts.attention, do_sample=True, top_k=0,
            temperature=1.0, max_new_tokens=size.new, min_new_tokens=size.new, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip

    return {
        "generate": generate,
        "sample": ours(turns),
        "sample, compiled turns": ours(compiled(turns, graph)),
        "sample, CUDA graphs": ours(recorded(machine, turns, params)),
    }


def policy(machine: Machine, size: Size) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """(module, decoder, params), its numbers in bfloat16."""
    from rlhf_fn.decoding import decoder
    from rlhf_fn.models import causal_lm
    from rlhf_fn.precision import cast

    module = llama(machine, size.shape, size.prompt + size.new)
    turns, params = decoder(module), cast(causal_lm(module).params, torch.bfloat16)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module, turns, params


def recorded(machine: Machine, turns: Any, params: dict[str, torch.Tensor]) -> Any:
    """Compiled turns as CUDA graphs.

    A graph copies each input that may move, and is not recorded at all where it writes to one. So
    parameters and cache stay where they are, the cache from one rollout to the next, and what a
    turn has drawn is copied before the next turn draws over it.
    """
    from rlhf_fn import tree
    from rlhf_fn.engine import compiled, one_graph

    kept: dict[tuple[int, int], Any] = {}
    as_graphs = {"triton.cudagraphs": machine.device == "cuda"}  # what "reduce-overhead" is
    tree.map(torch._dynamo.mark_static_address, params)

    def graph(function: Callable) -> Callable:
        turn = one_graph(function, backend=machine.backend)

        def copied_out(*args: Any, **options: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            with torch._inductor.config.patch(as_graphs):
                drawn, cache = turn(*args, **options)
            return tree.map(torch.clone, drawn), cache

        return copied_out

    engine = compiled(turns, graph)

    def prefill(params: Any, tokens: torch.Tensor, attention: torch.Tensor, length: int) -> Any:
        logits, cache = engine.prefill(params, tokens, attention, length)
        room = kept.setdefault((len(tokens), length), cache)
        tree.map(torch._dynamo.mark_static_address, room)
        return logits, tree.map(torch.Tensor.copy_, room, cache)

    return engine._replace(prefill=prefill)


def plans(machine: Machine, size: Size) -> list[Row]:
    """What the engine says it will hold; the weights are not in what a race measures."""
    from rlhf_fn.engine import memory_plan

    _, turns, params = policy(machine, size)
    plan = partial(memory_plan, turns, params, group=1, width=size.prompt, max_new_tokens=size.new)
    return [{"answers": rows, "memory plan": str(plan(prompts=rows))} for rows in size.rows]
