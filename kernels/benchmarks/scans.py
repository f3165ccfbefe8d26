"""`python kernels/benchmarks/scans.py`: scans over [rows, time], forward and backward, raced.

Rates count the least bytes: what a quantity must read and write once, the mask's among them. The
yardstick is a copy of as many bytes, in the same rounds. A random third of the tokens is hidden.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench
import correctness
import rlhf_kernels
import torch
from bench import Machine, Row
from logits import lap
from torch import Tensor

import rlhf_fn

Shape = tuple[int, int]
ON_GPU = ((8192, 4096), (8192, 2048), (1024, 4096), (512, 1024))
ON_CPU = ((16, 16384), (64, 1024), (256, 2048), (1024, 512))
CHECKED = ((1, 1), (5, 512), (7, 513), (2, 5000), (3000, 63), (600, 1025))  # tiles and their edges
COLUMNS = ("quantity", "shape", "who", "ms", "quartiles", "GB/s", "of copy", "extra MB")
RATES = {"discount": 0.99, "lam": 0.95}
CLIPS = {"clip_rho": 1.0, "clip_c": 1.0}
UNHIDDEN = "torchrl, nothing hidden"  # it has no mask


class Quantity(NamedTuple):
    tensors: int  # of float32 that are read and written once
    masks: int  # that are read
    function: Callable[..., Tensor | tuple[Tensor, ...]]  # of (module, rewards, values, mask)


QUANTITIES = {
    "gae": Quantity(4, 1, lambda m, r, v, mask: m.gae(r, v, mask, **RATES)),
    "discounted_returns": Quantity(
        2, 1, lambda m, r, v, mask: m.discounted_returns(r, mask, discount=0.99)
    ),
    "suffix_scan": Quantity(3, 0, lambda m, r, v, mask: m.suffix_scan(r, v)),
    "vtrace": Quantity(6, 1, lambda m, r, v, mask: m.vtrace(v, r, r, v, mask, **RATES, **CLIPS)),
}


def shown(rows: Sequence[Row]) -> str:
    """How many claims hold, and the table of the races."""
    claims, raced = ([r for r in rows if ("error" in r) == which] for which in (True, False))
    held = sum(row["status"] == "ok" for row in claims)
    bad = [row for row in claims if "why" in row]
    return f"{held} of {len(claims)} claims hold.\n\n{bench.told([*raced, *bad], COLUMNS)}"


def jobs(
    machine: Machine, *, shapes: Sequence[Shape] = ON_GPU, checked: Sequence[Shape] = CHECKED,
    seconds: float = 1.0,
) -> Iterator[bench.Job]:  # fmt: skip
    """Whether they are right; gae of all shapes, its backward pass, the rest of the first shape."""
    for shape in checked:
        for name in QUANTITIES:
            yield f"{name} {shape[0]} x {shape[1]} is right", partial(agree, machine, name, shape)
    for shape in shapes:
        yield _job(machine, "gae", shape, seconds, raced)
    for shape in shapes:
        yield _job(machine, "gae", shape, seconds, raced_backward)
    for name in list(QUANTITIES)[1:]:
        yield _job(machine, name, shapes[0], seconds, raced)


def _job(machine: Machine, name: str, shape: Shape, seconds: float, race: Callable) -> bench.Job:
    quantity = name + (", backward" if race is raced_backward else "")
    at = {"quantity": quantity, "shape": f"{shape[0]} x {shape[1]}"}
    rows = partial(race, machine, name, shape, seconds)
    return " ".join(at.values()), lambda: [row if "why" in row else at | row for row in rows()]


def agree(machine: Machine, name: str, shape: Shape) -> list[Row]:
    """Outputs and gradients, time last and time first, held to float64 as `correctness.py` does."""
    inputs, rows = made(machine, shape)[0], []
    for order, laid in {"": lambda x: x, ", time first": lambda x: x.t().contiguous().t()}.items():
        given = [laid(x) for x in inputs]
        ours, plain = (results(m, name, given, torch.float32) for m in (rlhf_kernels, rlhf_fn))
        each = zip(ours, plain, results(rlhf_fn, name, given, torch.float64))
        names = (f"{name} {i}{order}" for i in range(len(ours)))
        rows += correctness.verdict(dict(zip(names, each)), correctness.SLACK)
    return rows


def results(module, name: str, given: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The outputs of a quantity, and its gradients in rewards and values."""
    *numbers, mask = given
    leaves = [x.to(dtype).requires_grad_() for x in numbers]
    out = QUANTITIES[name].function(module, *leaves, mask)
    outs = out if isinstance(out, tuple) else (out,)
    ups = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x) for x in outs]
    grads = torch.autograd.grad(outs, leaves, ups, materialize_grads=True)
    return [x.detach() for x in (*outs, *grads)]


def raced(machine: Machine, name: str, shape: Shape, seconds: float) -> list[Row]:
    """Ours, floor 0 eager and compiled, a loop over time, and the peer that is installed."""
    quantity, inputs = QUANTITIES[name], made(machine, shape)
    bench.compiled_anew()
    ours, plain = (partial(quantity.function, module) for module in (rlhf_kernels, rlhf_fn))
    functions = {"ours": ours, "floor 0": plain}
    if machine.device == "cpu" or shape == ON_GPU[0]:  # compiling takes most of a GPU's seconds
        functions["floor 0, compiled"] = machine.compiled(plain)
    missing = None
    if name == "gae":
        functions["a loop over time"] = loop
        try:
            functions[UNHIDDEN] = _torchrl()
        except Exception as error:  # peers raise all sorts of things where they cannot be imported
            missing = {"who": UNHIDDEN, "status": "skipped", "why": bench.said(error)}
    laps = {who: bench.on(inputs, function) for who, function in functions.items()}
    with torch.no_grad():
        rows = _lapped(machine, laps, quantity, shape, seconds)
    return rows + ([missing] if missing else [])


def raced_backward(machine: Machine, name: str, shape: Shape, seconds: float) -> list[Row]:
    """The backward pass alone, in rewards and in values: as much is read and written again."""
    quantity = QUANTITIES[name]
    laps = {}
    for who, module in {"ours": rlhf_kernels, "floor 0": rlhf_fn}.items():
        ends = []
        for rewards, values, mask in made(machine, shape):
            leaves = rewards.requires_grad_(), values.requires_grad_()
            outputs = tuple(quantity.function(module, *leaves, mask))
            ends.append((outputs, leaves, [torch.rand_like(out) for out in outputs]))
        laps[who] = bench.on(
            ends, lambda outs, xs, ups: torch.autograd.grad(outs, xs, ups, retain_graph=True)
        )
    return _lapped(machine, laps, quantity, shape, seconds)


def _lapped(
    machine: Machine, laps: dict[str, Callable], quantity: Quantity, shape: Shape, seconds: float
) -> list[Row]:
    least = (4 * quantity.tensors + quantity.masks) * shape[0] * shape[1]
    buffers = [torch.ones(least // 8, device=machine.device) for _ in range(2)]
    times = lap(machine, laps, buffers, least, seconds, "")
    return [{"who": who} | row for who, row in times.items()]


def made(machine: Machine, shape: Shape) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rewards, values, mask) to take turns with, so that no cache holds all."""
    generator = torch.Generator(machine.device).manual_seed(0)
    options = {"device": machine.device, "generator": generator}
    count = min(8, max(2, bench.CACHE // (9 * shape[0] * shape[1])))

    def one() -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.rand(shape, **options) < 1 / 3
        return torch.randn(shape, **options), torch.rand(shape, **options), ~hidden

    return [one() for _ in range(count)]


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What most code bases do, with time first."""
    discount, lam = RATES.values()
    ahead = after = torch.zeros_like(rewards[:, 0])
    advantages = []
    for r, v, kept in zip(*(x.t().contiguous().flip(0) for x in (rewards, values, mask))):
        ahead = torch.where(kept, r + discount * after - v + discount * lam * ahead, ahead)
        after = torch.where(kept, v, after)
        advantages.append(torch.where(kept, ahead, 0.0))
    out = torch.stack(advantages[::-1], -1)
    return out, out + torch.where(mask, values, 0.0)


def _torchrl() -> Callable:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def function(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        after = torch.nn.functional.pad(values[:, 1:], (0, 1))
        done = torch.zeros_like(mask)
        done[:, -1] = True
        columns = (x[..., None] for x in (values, after, rewards, done, done))
        return vec_generalized_advantage_estimate(*RATES.values(), *columns)

    return function


def main() -> None:
    """All shapes that suit this machine, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", help="ROWSxTIME, for instance 64x1024")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each race")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    machine = bench.here()
    shapes = ON_GPU if machine.device == "cuda" else ON_CPU
    if asked.shape:
        shapes = [tuple(map(int, text.split("x"))) for text in asked.shape]
    todo = jobs(machine, shapes=shapes, seconds=asked.seconds)
    rows = bench.run(todo, 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    print(
        ", ".join(f"{k} {v}" for k, v in bench.versions(machine).items()), shown(rows), sep="\n\n"
    )


if __name__ == "__main__":
    main()
