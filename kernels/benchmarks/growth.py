"""`python kernels/benchmarks/growth.py`: how the cost of a step and of sampling grows.

One size at a time is raised, the others stay: rows, tokens per row, vocabulary, answers per prompt
and width. Told are time and memory per token, and the exponent k by which the whole time grew since
the row above, time ~ sizeᵏ: 1 is linear, below it a fixed part is shared, above it something is
superlinear. Of tokens per row attention makes it so; the width is squared in every weight, so there
2 is linear in the parameters. The step is forward, backward, clip and AdamW of a policy loss, in
place; sampling reads prompts and answers them.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
import torch
from bench import Job, Machine, Row

COLUMNS = ("what", "size", "value", "ms", "µs/token", "exponent", "extra MB", "kB/token")


class Size(NamedTuple):
    batch: int = 16
    length: int = 128  # of which a quarter is prompt
    vocab: int = 2048
    group: int = 1
    width: int = 128
    layers: int = 2


AXES = {  # size -> what stays beside it, and what it is raised to
    "batch": (Size(length=64), (1, 4, 16, 64, 256)),
    "length": (Size(batch=2), (64, 256, 1024, 4096)),
    "vocab": (Size(batch=4), (512, 2048, 8192, 32768, 131072)),
    "group": (Size(batch=4), (1, 2, 4, 8, 16, 32)),
    "width": (Size(batch=8), (64, 128, 256, 512, 1024)),
}
WORKS = {"step": ("batch", "length", "vocab", "width"), "sampling": (*AXES,)}
LONGEST = 1024  # tokens a row that is sampled here


def jobs(machine: Machine, *, seconds: float = 4.0, largest: float = math.inf) -> Iterator[Job]:
    """One job for every work and size."""
    for work, axes in WORKS.items():
        for axis in axes:
            yield f"{work} by {axis}", partial(raised, machine, work, axis, seconds, largest)


def raised(machine: Machine, work: str, axis: str, seconds: float, largest: float) -> list[Row]:
    """A row for each value of a size; `largest` bounds it."""
    base, values = AXES[axis]
    rows: list[Row] = []
    for value in values:
        size = base._replace(**{axis: value})
        if value > largest or (work == "sampling" and size.length > LONGEST):
            continue
        call, tokens = MADE[work](machine, size)
        contender = {work: lambda _, call=call: call()}
        taken = bench.race(contender, machine, seconds=seconds, least=3, warm=1)[work]
        if isinstance(taken, str):
            raise RuntimeError(taken)
        row = {
            "what": work, "size": axis, "value": value, "ms": taken.median * 1e3,
            "µs/token": taken.median / tokens * 1e6, "extra MB": taken.peak / 1e6,
            "kB/token": taken.peak / tokens / 1e3,
        }  # fmt: skip
        if rows:
            last = rows[-1]
            row["exponent"] = math.log(row["ms"] / last["ms"]) / math.log(value / last["value"])
        rows.append(row)
    return rows


def stepping(machine: Machine, size: Size) -> tuple[Callable[[], Any], int]:
    """(a step, its tokens)."""
    from rlhf_fn.fused import fused_adamw
    from rlhf_fn.losses import PolicyBatch
    from rlhf_fn.models import causal_lm
    from rlhf_fn.random import key
    from rlhf_fn.recipes import grpo
    from rlhf_fn.steps import donating_step, train_state

    model = causal_lm(llama(machine, size))
    optimizer = fused_adamw(1e-5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, max_norm=1.0)
    step = donating_step(grpo.loss(model.apply), optimizer)
    state = train_state(model.params, optimizer)
    shape, on = (size.batch, size.length), {"device": machine.device}
    real = torch.ones(shape, dtype=torch.bool, **on)
    old = torch.full(shape, -math.log(size.vocab), **on)
    batch = PolicyBatch(
        torch.randint(size.vocab, shape, **on), real, old, old, torch.randn(shape, **on),
        real / real.sum(),
    )  # fmt: skip
    once = key(0, device=machine.device)
    return lambda: step(state, batch, once), size.batch * size.length


def sampling(machine: Machine, size: Size) -> tuple[Callable[[], Any], int]:
    """(the answers to all prompts, their tokens)."""
    from rlhf_fn.decoding import decoder
    from rlhf_fn.models import causal_lm
    from rlhf_fn.random import key, split
    from rlhf_fn.rollout import Prompts, sample

    module = llama(machine, size)
    params, decode = causal_lm(module).params, decoder(module)
    start, on = size.length // 4, {"device": machine.device}
    tokens = torch.randint(size.vocab, (size.batch, start), **on)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    keys = split(key(0, device=machine.device), size.batch * size.group)
    new = size.length - start

    def call() -> Any:
        return sample(
            decode, params, prompts, keys, max_new_tokens=new, temperature=1.0, stop=(), pad=0
        )

    return call, new * len(keys)


MADE = {"step": stepping, "sampling": sampling}


def llama(machine: Machine, size: Size) -> Any:
    """Random weights."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=2 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=8192,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).to(machine.device)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds against each size, both logarithmic, with a line of slope 1."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(3.2 * len(AXES), 3), sharey=True)
    for panel, axis in zip(panels, AXES):
        for work in WORKS:
            found = [r for r in rows if r.get("size") == axis and r.get("what") == work]
            if found:
                x, y = ([row[name] for row in found] for name in ("value", "ms"))
                (line,) = panel.loglog(x, y, "o-", label=work)
                panel.loglog(x, [y[0] * each / x[0] for each in x], ":", color=line.get_color())
        panel.set_xlabel(axis)
    panels[0].set_ylabel("ms (dotted: linear)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each row")
    parser.add_argument("--plot", type=Path, help="an image of it, too")
    options = parser.parse_args()
    machine = bench.here()
    print(bench.versions(machine))
    rows = bench.run(jobs(machine, seconds=options.seconds), 3600.0, lambda rows: None)
    print("\n" + bench.told(rows, COLUMNS))
    if options.plot:
        plot(rows, options.plot)
    raise SystemExit(bool(bench.failed(rows)))


if __name__ == "__main__":
    main()
