"""`python kernels/benchmarks/linear.py`: log-probs from hidden states, raced with bare matmuls.

The limit is products of matrices: one forward; backward two, or three if logits are computed
again. What is predicted was written down before any clock ran: Triton multiplies at `SHARE` of
cuBLAS's rate, and an epilogue of `EPILOGUE` instructions a logit is not overlapped.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bench
import rlhf_kernels
import torch
import torch.nn.functional as F
from bench import DTYPES, Job, Machine, Row
from contenders import _peer

import rlhf_fn

Contenders = dict[str, Callable | str]
SHARE, EPILOGUE = 0.87, 6
RATE, ISSUED = 790e12, 132 * 128 * 1.98e9  # of a Hopper GPU: bf16 FLOPs, instructions of a lane
KEEP = 2**36  # bytes: enough for the exponentials of any shape here
MOST = 12 * 2**30  # bytes of logits and their like that a contender may hold on a CPU
COLUMNS = (
    "shape", "dtype", "who", "fwd ms", "fwd quartiles", "fwd / mm", "fwd MB", "both ms",
    "both quartiles", "both / 3 mm", "both MB",
)  # fmt: skip
TARGETS = ("target", "shape", "wanted", "predicted", "measured", "met")
FITS = ("tokens that fit in", "with logits", "without", "how")


class Shape(NamedTuple):
    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return " x ".join(map(str, self))


ON_GPU = (
    Shape(8192, 2048, 128256), Shape(8192, 4096, 151936), Shape(16384, 896, 151936),
    Shape(4096, 8192, 128256),
)  # fmt: skip
ON_CPU = (Shape(1024, 512, 32000), Shape(256, 896, 151936))


def jobs(
    machine: Machine, *, shapes: Sequence[Shape] = ON_GPU, dtypes: Sequence[str] = ("bf16",),
    seconds: float = 3.0,
) -> Iterator[Job]:  # fmt: skip
    """A race of every dtype and shape, and how many tokens fit in a memory."""
    for dtype in dtypes:
        for shape in shapes:
            yield f"{shape} {dtype}", partial(race, machine, shape, dtype, seconds)
    for budget in (16, 80):
        yield f"tokens in {budget} GB", partial(fitting, machine, budget * 10**9)


def shown(rows: Sequence[Row]) -> str:
    """Three tables."""
    tables = (COLUMNS, TARGETS, FITS)
    parts = [bench.table([r for r in rows if t[0] in r and t[2] in r], t) for t in tables]
    whys = dict.fromkeys(f"- {r.get('who', r['job'])}: {r['why']}" for r in rows if "why" in r)
    return "\n\n".join([*parts, "\n".join(whys)])


# who races


def contenders(machine: Machine) -> Contenders:
    """log π(y), `[rows]`, of (hidden, weight, tokens)."""

    def eager(h, w, y):
        return rlhf_fn.token_logprobs(h @ w.mT, y)

    both = rlhf_kernels.linear_token_logprobs_and_entropy
    scored = rlhf_kernels.linear_token_logprobs_and_hits
    return {
        "ours": rlhf_kernels.linear_token_logprobs,
        "ours, kept": partial(rlhf_kernels.linear_token_logprobs, memory=KEEP),
        "ours, with H": lambda *x: sum(both(*x)),
        "ours, with H measured": lambda *x: both(*x).logprobs,
        "ours, with hits": lambda *x: scored(*x).logprobs,
        "floor 0": rlhf_fn.linear_token_logprobs,
        "floor 0, compiled": machine.compiled(rlhf_fn.linear_token_logprobs),
        "with logits": eager,
        "with logits, compiled": machine.compiled(eager),
        "F.linear_cross_entropy": _peer(lambda: _torch(None)),
        "F.linear_cross_entropy, chunked": _peer(
            lambda: _torch(torch.nn.LinearCrossEntropyOptions())
        ),
        "Liger": _peer(_liger),
        "cut-cross-entropy": _peer(_cut),
    }


def _torch(options) -> Callable:
    f = partial(F.linear_cross_entropy, reduction="none", options=options)
    return lambda h, w, y: -f(h, w, y)


def _liger() -> Callable:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as f

    return lambda h, w, y: -f(h, w, y, reduction="none")


def _cut() -> Callable:
    from cut_cross_entropy import linear_cross_entropy as f

    return lambda h, w, y: -f(h, w, y, reduction="none")


# the race


def race(machine: Machine, shape: Shape, dtype: str, seconds: float) -> list[Row]:
    """Forward, then forward and backward, beside the products of matrices that they are made of."""
    hidden, weight, tokens, upstream = made(machine, shape, dtype)
    bench.compiled_anew()
    racers = contenders(machine)
    running = {who: f for who, f in racers.items() if callable(f) and fits(machine, shape, who)}

    def product(_):
        return hidden @ weight.mT

    forward = {who: lambda _, f=f: f(hidden, weight, tokens) for who, f in running.items()}
    with torch.no_grad():
        alone = bench.race({"mm": product} | forward, machine, seconds=seconds)
    dx = product(0)

    def three(_):
        return product(0), dx @ weight, dx.mT @ hidden

    def step(f):
        h, w = (x.detach().requires_grad_() for x in (hidden, weight))
        out = f(h, w, tokens)
        return torch.autograd.grad(out, (h, w), upstream.to(out.dtype))

    whole = {who: lambda _, f=f: step(f) for who, f in running.items()}
    both = bench.race({"mm": three} | whole, machine, seconds=2 * seconds)
    at = {"shape": str(shape), "dtype": dtype}
    rows = [
        at | {"who": who} | told(alone, who, "fwd ", "/ mm") | told(both, who, "both ", "/ 3 mm")
        for who in alone
    ]
    rows += [at | {"who": who, "why": f} for who, f in racers.items() if isinstance(f, str)]
    return rows + targets(shape, dtype, alone, both)


def told(times: dict, who: str, prefix: str, unit: str) -> Row:
    """Milliseconds, multiples of the bare products, megabytes."""
    t = times[who]
    if isinstance(t, str):
        return {prefix + "ms": t.split(":")[0], "why": t}
    return {
        prefix + "ms": t.median * 1e3,
        prefix + "quartiles": f"{t.low * 1e3:.4g}–{t.high * 1e3:.4g}",
        prefix + unit: t.median / times["mm"].median,
        prefix + "MB": t.peak / 1e6,
    }


def fits(machine: Machine, shape: Shape, who: str) -> bool:
    """On a CPU: not what would hold many times the logits, nor what takes minutes."""
    if machine.device == "cuda":
        return True
    if who.endswith("chunked"):
        return shape.vocab < 2**16
    return 4 * 4 * shape.tokens * shape.vocab < MOST


def made(machine: Machine, shape: Shape, dtype: str):
    """(hidden, weight, tokens, upstream gradient)."""
    generator = torch.Generator(machine.device).manual_seed(0)
    options = {"device": machine.device, "generator": generator}
    hidden = torch.randn(shape.tokens, shape.width, **options).to(DTYPES[dtype])
    weight = torch.randn(shape.vocab, shape.width, **options).mul_(2 / shape.width**0.5)
    tokens = torch.randint(shape.vocab, (shape.tokens,), **options)
    return hidden, weight.to(DTYPES[dtype]), tokens, torch.rand(shape.tokens, **options) - 0.5


# what was wanted, and what was predicted


def targets(shape: Shape, dtype: str, alone: dict, both: dict) -> list[Row]:
    """Of a GPU in half precision, in multiples of the bare products of the same rounds."""
    if dtype == "fp32":
        return []
    forward = predicted(shape)
    again = 1.20 if shape.width < 4096 else 1.10
    goals = (
        ("forward", 1.08, forward, alone, "ours", 1.0),
        ("both, again", again, (2 * forward + 2) / 4, both, "ours", 4 / 3),
        ("both, kept", 1.12, (forward + 2) / 3, both, "ours, kept", 1.0),
    )
    rows = []
    for name, wanted, guess, times, who, products in goals:
        if not isinstance(times.get(who), str) and who in times:
            measured = times[who].median / times["mm"].median / products
            row = {"target": name, "shape": str(shape), "wanted": f"≤ {wanted} of the products"}
            rows.append(
                row | {"predicted": guess, "measured": measured}
                | {"met": "yes" if measured <= wanted else "no"}
            )  # fmt: skip
    return rows


def predicted(shape: Shape) -> float:
    """Multiples of a bare product that forward takes."""
    return 1 / SHARE + EPILOGUE * RATE / (2 * shape.width * ISSUED)


# a real effect


PARAMETERS, LAYERS, WIDTH, VOCAB = 0.49e9, 24, 896, 151936  # Qwen2.5-0.5B, its embedding tied


def fitting(machine: Machine, budget: int) -> list[Row]:
    """How many tokens of a GRPO step fit: computed for the model, and measured for its head alone.

    Computed: bf16 weights and gradients, float32 moments; one bf16 vector per layer and token, as
    checkpointing keeps; of logits bf16 ones, float32 ones and their gradient, as autograd keeps.
    """
    fixed = 12 * PARAMETERS
    per_token = 2 * LAYERS * WIDTH
    head = {"with logits": 10 * VOCAB, "without": 8 * WIDTH}
    room = budget - fixed
    computed = {
        who: int((room - (2**28 if who == "without" else 0)) / (per_token + size))
        for who, size in head.items()
    }
    at = {"tokens that fit in": f"{budget / 1e9:.0f} GB"}
    rows = [at | computed | {"how": "a step, computed"}]
    if machine.device == "cuda" and torch.cuda.mem_get_info()[1] >= budget:
        each = {who: largest(machine, f, budget) for who, f in heads().items()}
        rows.append(at | each | {"how": "its head, measured (powers of two)"})
    return rows


def heads() -> Contenders:
    """The two ways from hidden states to log-probs."""
    return {
        "with logits": lambda h, w, y: rlhf_fn.token_logprobs(h @ w.mT, y),
        "without": rlhf_kernels.linear_token_logprobs,
    }


def largest(machine: Machine, function: Callable, budget: int) -> int:
    """The most tokens, 1024 times a power of two, of which forward and backward fit."""

    def peak(tokens: int) -> int:
        hidden, weight, y, up = made(machine, Shape(tokens, WIDTH, VOCAB), "bf16")
        given = hidden.requires_grad_(), weight.requires_grad_()
        held = machine.peak(lambda: torch.autograd.grad(function(*given, y), given, up))
        return held + hidden.nbytes + weight.nbytes

    tokens = 1024
    while tokens < 2**20:
        try:
            if peak(2 * tokens) > budget:
                break
        except (torch.cuda.OutOfMemoryError, ValueError):
            break
        tokens *= 2
    return tokens


def main() -> None:
    """All shapes that suit this machine, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", nargs="*", help="TOKENSxWIDTHxVOCAB, for instance 1024x512x32000"
    )
    parser.add_argument("--dtype", nargs="*", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each race")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    machine = bench.here()
    shapes = ON_GPU if machine.device == "cuda" else ON_CPU
    if asked.shape:
        shapes = [Shape(*map(int, text.split("x"))) for text in asked.shape]
    dtypes = asked.dtype or (["bf16"] if machine.device == "cuda" else ["fp32", "bf16"])
    todo = jobs(machine, shapes=shapes, dtypes=dtypes, seconds=asked.seconds)
    rows = bench.run(todo, 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    about = ", ".join(f"{k} {v}" for k, v in bench.versions(machine).items())
    print(about, shown(rows), sep="\n\n")


if __name__ == "__main__":
    main()
