"""Sampling: `sample` with eager and with compiled turns, beside `generate`, in tokens per second.

    python kernels/benchmarks/decode.py [--threads 2]

A Llama of 15 million parameters, random weights, 16 prompts of 32 tokens and 64 new tokens for
each, no stop: everybody draws the same number. The parts of a turn are timed one by one, too.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench
import torch
from bench import Job, Machine, Row
from llamas import Shape, llama

COLUMNS = ("who", "tokens/s", "× generate", "ms", "quartiles", "ms per token", "first s")
PARTS = ("part of a turn", "ms", "quartiles")


class Size(NamedTuple):
    vocab: int = 32000
    width: int = 288
    inner: int = 768
    layers: int = 6
    heads: int = 6
    batch: int = 16
    prompt: int = 32
    new: int = 64


SIZE = Size()


def shown(rows: list[Row]) -> str:
    """Both tables."""
    return "\n".join(bench.told(rows, columns) for columns in (COLUMNS, PARTS))


def jobs(machine: Machine, *, size: Size = SIZE, seconds: float = 60.0) -> Iterator[Job]:
    """The race, then the parts of a turn."""
    what = f"{size.batch} x {size.prompt} + {size.new} tokens"
    yield what, partial(raced, machine, size, seconds)
    yield "parts of a turn", partial(parts, machine, size, seconds)


def raced(machine: Machine, size: Size, seconds: float) -> list[Row]:
    """Everybody in turns; the first call, with its compilation, apart."""
    bench.compiled_anew()
    ways, first = contenders(machine, size), {}
    for who, way in ways.items():
        start = time.perf_counter()
        way(0)
        first[who] = time.perf_counter() - start
    unmeasured = machine._replace(peak=lambda call: 0)
    times = bench.race(ways, unmeasured, rounds=30, least=3, seconds=seconds, warm=0)
    usual = bench.medians(times)["generate"]
    return [_row(who, times[who], first[who], usual, size) for who in ways]


def contenders(machine: Machine, size: Size) -> dict[str, Callable[[int], Any]]:
    """name -> (round -> sequences); each draws anew in every round."""
    from rlhf_fn import random, tree
    from rlhf_fn.engine import compiled, one_graph
    from rlhf_fn.rollout import Prompts, sample

    module, decoder, params = setting(machine, size)
    half = tree.map(lambda p: p.bfloat16(), params)
    tokens = torch.randint(size.vocab, (size.batch, size.prompt), device=machine.device)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    keys = random.split(random.key(0, device=machine.device), size.batch)
    graph = partial(one_graph, backend=machine.backend)
    draws = {"max_new_tokens": size.new, "temperature": 1.0, "stop": [], "pad": 0}

    def ours(engine: Any, params: Any) -> Callable[[int], Any]:
        return lambda i: sample(engine, params, prompts, random.fold_in(keys, i), **draws)

    def generate(i: int) -> Any:
        torch.manual_seed(i)
        return module.generate(
            tokens, attention_mask=prompts.attention, do_sample=True, top_k=0, temperature=1.0,
            max_new_tokens=size.new, min_new_tokens=size.new, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    return {
        "generate": generate,
        "sample": ours(decoder, params),
        "sample, compiled turns": ours(compiled(decoder, graph), params),
        "sample, bf16": ours(decoder, half),
        "sample, compiled turns, bf16": ours(compiled(decoder, graph), half),
    }


def parts(machine: Machine, size: Size, seconds: float) -> list[Row]:
    """What a compiled turn consists of; compiled one by one, they may cost more than together."""
    from rlhf_fn import random
    from rlhf_fn.products import linear
    from rlhf_fn.rollout import draw

    bench.compiled_anew()
    _, decoder, params = setting(machine, size)
    shape, device = (size.batch, size.prompt + size.new), {"device": machine.device}
    length, here = shape[1], torch.tensor(size.prompt + size.new // 2, **device)
    real = torch.arange(length, **device).expand(shape) <= here
    tokens = torch.randint(size.vocab, (size.batch, size.prompt), **device)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    keys = random.split(random.key(0, **device), size.batch)
    alive, stops = torch.ones(size.batch, dtype=torch.bool, **device), torch.tensor([], **device)
    hidden = torch.randn(size.batch, size.width, **device)
    head = params["model.embed_tokens.weight"]
    drawing = here, keys, alive, torch.tensor(1.0, **device), stops.long()
    with torch.no_grad():
        logits, cache = decoder.prefill(params, tokens, attention, length)
        work = {
            "prompts (eager)": lambda: decoder.prefill(params, tokens, attention, length),
            "decode": _compiled(machine, lambda: decoder.decode(
                params, tokens[:, 0], real, here, cache)),
            "of it the LM head": lambda: linear(hidden[:, None], head),
            "draw": _compiled(machine, lambda: draw(logits, *drawing, pad=0)),
        }  # fmt: skip
        unmeasured = machine._replace(peak=lambda call: 0)
        ways = {name: lambda i, call=call: call() for name, call in work.items()}
        times = bench.race(ways, unmeasured, rounds=100, seconds=seconds / 4)
    return [
        {"part of a turn": name, "ms": t.median * 1e3, "quartiles": _quartiles(t)}
        if isinstance(t, bench.Times)
        else {"status": "FAILED", "why": f"{name}: {t}"}
        for name, t in times.items()
    ]


def setting(machine: Machine, size: Size) -> tuple[Any, Any, dict]:
    """(module, decoder, params) of a Llama with random weights."""
    try:
        from rlhf_fn.decoding import decoder
        from rlhf_fn.models import causal_lm
    except ImportError as error:
        raise bench.Skipped(bench.said(error)) from error
    shape = Shape(
        size.vocab, size.width, size.inner, size.layers, size.heads, size.heads, tied=True
    )
    module = llama(machine, shape, size.prompt + size.new)
    return module, decoder(module), causal_lm(module).params


def _compiled(machine: Machine, function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, backend=machine.backend)


def _row(who: str, times: bench.Times, first: float, usual: float, size: Size) -> Row:
    return {
        "who": who, "tokens/s": size.batch * size.new / times.median,
        "× generate": usual / times.median, "ms": times.median * 1e3,
        "quartiles": _quartiles(times), "ms per token": times.median * 1e3 / size.new,
        "first s": first,
    }  # fmt: skip


def _quartiles(times: bench.Times) -> str:
    return f"{times.low * 1e3:.4g}–{times.high * 1e3:.4g}"


def main() -> None:
    """Print the tables of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="of the race")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = bench.here()
    rows = bench.run(jobs(machine, seconds=options.seconds), 3600, lambda rows: None)
    print(f"\n{bench.versions(machine)}\n\n{shown(rows)}")
    if bench.failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
