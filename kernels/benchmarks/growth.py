"""How the cost of a step and of sampling grows.

    python kernels/benchmarks/growth.py [--seconds 20] [--plot growth.png] [--json growth.json]

One size at a time is raised, the others stay: rows, tokens per row, vocabulary, answers per prompt
and width. Told are time and memory per token, and the exponent k by which the whole time grew since
the row above, time ~ sizeᵏ: 1 is linear, below it a fixed part is shared, above it something is
superlinear. Of tokens per row attention makes it so; the width is squared in every weight, so there
2 is linear in the parameters. The step is forward, backward, clip and AdamW of a policy loss, in
place; sampling reads prompts and answers them. All values of a size take turns. The memory of a
step is measured, that of sampling is what its plan says. As in a command, malloc keeps what is
freed; `--returned` lets it do as it does by itself.
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
from llamas import Shape, llama, policy_batch

COLUMNS = (
    "what", "size", "value", "ms", "quartiles", "µs/token", "exponent", "extra MB", "kB/token",
)  # fmt: skip
BRIEF = ("of", "size", "from … to", "µs per token", "exponent of the last")


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
LONGEST = {"cpu": 1024, "cuda": 256}  # tokens of a row that is sampled, one by one

SECONDS = {"cpu": 20.0, "cuda": 3.0}


def shown(rows: Sequence[Row]) -> str:
    """The short table, then the long one."""
    return bench.table(compact(rows), BRIEF) + "\n\n" + bench.told(rows, COLUMNS)


def jobs(machine: Machine, *, seconds: float | None = None) -> Iterator[Job]:
    """One job for every work and size, each a race of `seconds`."""
    seconds = seconds or SECONDS[machine.device]
    for work, axes in WORKS.items():
        for axis in axes:
            yield f"{work} by {axis}", partial(raised, machine, work, axis, seconds)


def raised(machine: Machine, work: str, axis: str, seconds: float) -> list[Row]:
    """A row for each value of a size, from one race of them all."""
    base, values = AXES[axis]
    sizes = {value: base._replace(**{axis: value}) for value in values}
    if work == "sampling":
        longest = LONGEST[machine.device]
        sizes = {value: size for value, size in sizes.items() if size.length <= longest}
    made = {str(value): MADE[work](machine, size) for value, size in sizes.items()}
    laps = {value: lambda _, call=call: call() for value, (call, *_) in made.items()}
    planned = work == "sampling"  # a profile of a thousand turns would take gigabytes
    if planned:
        machine = machine._replace(peak=lambda call: 0)
    times = bench.race(laps, machine, seconds=seconds, least=3, warm=int(planned))
    medians = bench.medians(times)
    rows: list[Row] = []
    for value, (_, tokens, plan) in made.items():
        taken = times[value]
        assert isinstance(taken, bench.Times)
        held = plan if planned else taken.peak
        row = {
            "what": work, "size": axis, "value": int(value), "ms": taken.median * 1e3,
            "quartiles": f"{taken.low * 1e3:.4g}–{taken.high * 1e3:.4g}",
            "µs/token": taken.median / tokens * 1e6, "extra MB": held / 1e6,
            "kB/token": held / tokens / 1e3,
        }  # fmt: skip
        if rows:
            grown = medians[value] / medians[str(rows[-1]["value"])]
            row["exponent"] = math.log(grown) / math.log(int(value) / rows[-1]["value"])
        rows.append(row)
    return rows


def compact(rows: Sequence[Row]) -> list[Row]:
    """One row for each work and size: µs per token from its least to its largest value."""
    brief = []
    for work, axis in dict.fromkeys((r["what"], r["size"]) for r in rows if "what" in r):
        found = [r for r in rows if (r.get("what"), r.get("size")) == (work, axis)]
        first, last = found[0], found[-1]
        brief.append({
            "of": work, "size": axis, "from … to": f"{first['value']:,} … {last['value']:,}",
            "µs per token": " · ".join(bench.shown(r["µs/token"]) for r in found),
            "exponent of the last": last.get("exponent", ""),
        })  # fmt: skip
    return brief


def stepping(machine: Machine, size: Size) -> tuple[Callable[[], Any], int, None]:
    """(a step, its tokens, no plan)."""
    from rlhf_fn.fused import fused_adamw
    from rlhf_fn.models import causal_lm
    from rlhf_fn.random import key
    from rlhf_fn.recipes import grpo
    from rlhf_fn.steps import donating_step, train_state

    model = causal_lm(module(machine, size))
    optimizer = fused_adamw(1e-5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, max_norm=1.0)
    step = donating_step(grpo.loss(model.apply), optimizer)
    state = train_state(model.params, optimizer)
    batch = policy_batch(machine, size.vocab, size.batch, size.length)
    once = key(0, device=machine.device)
    return lambda: step(state, batch, once), size.batch * size.length, None


def sampling(machine: Machine, size: Size) -> tuple[Callable[[], Any], int, int]:
    """(the answers to all prompts, their tokens, the bytes planned besides the weights)."""
    from rlhf_fn.decoding import decoder
    from rlhf_fn.engine import memory_plan
    from rlhf_fn.models import causal_lm
    from rlhf_fn.random import key, split
    from rlhf_fn.rollout import Prompts, sample

    policy = module(machine, size)
    params, decode = causal_lm(policy).params, decoder(policy)
    start = size.length // 4
    tokens = torch.randint(size.vocab, (size.batch, start), device=machine.device)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    keys = split(key(0, device=machine.device), size.batch * size.group)
    new = size.length - start

    def call() -> Any:
        return sample(
            decode, params, prompts, keys, max_new_tokens=new, temperature=1.0, stop=(), pad=0
        )

    sizes = {"prompts": size.batch, "group": size.group, "width": start, "max_new_tokens": new}
    plan = memory_plan(decode, params, **sizes)
    return call, new * len(keys), plan.total - plan.weights


def module(machine: Machine, size: Size) -> Any:
    """A Llama of that vocabulary and width."""
    shape = Shape(size.vocab, size.width, 2 * size.width, size.layers, heads=4, kv_heads=4)
    return llama(machine, shape, size.length)


MADE = {"step": stepping, "sampling": sampling}


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
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="of each race")
    parser.add_argument("--plot", type=Path, help="an image of it, too (matplotlib)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--returned", action="store_true", help="let malloc return what is freed to the system"
    )
    asked = parser.parse_args()
    if not asked.returned:
        from rlhf_fn.allocator import keep_freed

        keep_freed()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    machine = bench.here()
    todo = jobs(machine, seconds=asked.seconds)
    rows = bench.run(todo, 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    print(f"\n{bench.versions(machine)}\n\n{shown(rows)}")
    if asked.plot:
        plot(rows, asked.plot)
    raise SystemExit(bool(bench.failed(rows)))


if __name__ == "__main__":
    main()
