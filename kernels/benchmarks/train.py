"""The whole training step, forward, backward, clip and AdamW, by each way there is to take it.

    python kernels/benchmarks/train.py [--vocab 512 32000] [--threads 2]

A Llama of 3.2 million parameters besides its embedding, the loss of GRPO on 8 x 128 tokens. The
usual way is a module, `loss.backward()`, `clip_grad_norm_` and `torch.optim.AdamW(fused=True)`.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from llamas import Shape, llama, policy_batch

COLUMNS = ("vocab", "who", "ms", "quartiles", "× usual", "extra MB", "norm error", "first s")
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
RATE, MAX_NORM = 1e-4, 1.0
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}  # of the gradient's norm, relative, from the usual one


class Size(NamedTuple):
    shape: Shape = Shape(vocab=512, width=256, inner=688, layers=4, heads=4, kv_heads=4)
    batch: int = 8
    time: int = 128

    def of(self, vocab: int) -> "Size":
        return self._replace(shape=self.shape._replace(vocab=vocab))


SIZES = Size(), Size().of(vocab=32000)

shown = partial(bench.told, columns=COLUMNS)


def jobs(
    machine: Machine, *, sizes: Sequence[Size] = SIZES, seconds: float = 60.0
) -> Iterator[Job]:
    """A race for each size of the vocabulary."""
    for size in sizes:
        yield f"vocabulary {size.shape.vocab}", partial(raced, machine, size, seconds)


def raced(machine: Machine, size: Size, seconds: float) -> list[Row]:
    """Every way from the same parameters: the norm of its first gradient, then its time."""
    bench.compiled_anew()
    ways, norms, first = contenders(machine, size), {}, {}
    for who, step in ways.items():
        start = time.perf_counter()
        norms[who] = float(step())
        first[who] = time.perf_counter() - start
    laps = {who: lambda _, step=step: step() for who, step in ways.items()}
    times = bench.race(laps, machine, rounds=30, least=3, seconds=seconds, warm=1)
    usual = times["usual"]
    rows = []
    for who, taken in times.items():
        row: Row = {"vocab": size.shape.vocab, "who": who}
        if isinstance(taken, str) or isinstance(usual, str):
            rows.append(row | {"status": "FAILED", "why": f"{who}: {taken}"})
            continue
        error = abs(norms[who] / norms["usual"] - 1)
        row |= {
            "ms": taken.median * 1e3, "× usual": taken.median / usual.median,
            "quartiles": f"{taken.low * 1e3:.4g}–{taken.high * 1e3:.4g}",
            "extra MB": taken.peak / 1e6, "norm error": error, "first s": first[who],
        }  # fmt: skip
        allowed = ALLOWED["bfloat16" if "bf16" in who else "float32"]
        bad = {"status": "FAILED", "why": f"{who}: the norm is {error:.2g} from the usual one"}
        rows.append(row if error <= allowed else row | bad)
    return rows


def contenders(machine: Machine, size: Size) -> dict[str, Callable[[], torch.Tensor]]:
    """name -> a step from where the last one ended, which returns the norm of its gradient."""
    import rlhf_fn
    from rlhf_fn.compiled import compiled_gradient
    from rlhf_fn.precision import in_dtype
    from rlhf_fn.projection import of_projection
    from rlhf_fn.steps import autograd_gradient, functional_gradient
    from rlhf_fn.updates import adamw

    module, (plain, bare), batch = setting(machine, size)
    half, half_bare = (in_dtype(model, torch.bfloat16) for model in (plain, bare))
    graph = partial(compiled_gradient, rows=size.batch, time=size.time, backend=machine.backend)
    floor = of_projection(rlhf_fn.linear_token_logprobs_and_entropy)
    kernel = of_projection(rlhf_kernels.linear_token_logprobs_and_entropy)
    logits = rlhf_fn.token_logprobs

    def donated(model: Any, token_logprobs: Callable, gradient: Any) -> Callable:
        return stepped(batch, model.params, gradient(loss_of(model.apply, token_logprobs)))

    slope = functional_gradient(loss_of(plain.apply, logits))
    pure = adamw(lambda _: torch.tensor(RATE), max_norm=MAX_NORM, weight_decay=0.01)
    return {
        "usual": usual(module, batch),
        "usual, bf16": usual(copy.deepcopy(module), batch, half=True),
        "pure": stepped(batch, plain.params, slope, pure),
        "donated": donated(plain, logits, autograd_gradient),
        "donated, compiled": donated(plain, logits, graph),
        "donated, bf16": donated(half, logits, autograd_gradient),
        "donated, compiled, bf16": donated(half, logits, graph),
        "no logits, floor 0": donated(bare, floor, autograd_gradient),
        "no logits, floor 0, compiled": donated(bare, floor, graph),
        "no logits, kernel": donated(bare, kernel, autograd_gradient),
        "no logits, kernel, compiled": donated(bare, kernel, graph),
        "no logits, kernel, compiled, bf16": donated(half_bare, kernel, graph),
    }


def loss_of(apply: Callable, token_logprobs: Callable) -> Callable:
    """The loss of GRPO."""
    from rlhf_fn import recipes

    return recipes.grpo.loss(apply, token_logprobs=token_logprobs)


def stepped(
    batch: Any, params: Any, gradient: Callable, pure: Any = None
) -> Callable[[], torch.Tensor]:
    """Our step along a gradient of (params, batch, key): by a pure optimizer, or in place."""
    from rlhf_fn.fused import fused_adamw
    from rlhf_fn.models import frozen
    from rlhf_fn.random import key
    from rlhf_fn.steps import donating_step, gradient_step, train_state

    optimizer = pure or fused_adamw(RATE, **ADAM, max_norm=MAX_NORM)
    make: Any = gradient_step if pure else donating_step
    step, state = make(None, optimizer, gradient=lambda _: gradient), None
    once = key(0, device=batch.tokens.device)

    def taken() -> torch.Tensor:
        nonlocal state
        if state is None:
            state = train_state(frozen(params), optimizer)
        state, metrics = step(state, batch, once)
        return metrics["grad/norm"]

    return taken


def usual(module: Any, batch: Any, half: bool = False) -> Callable[[], torch.Tensor]:
    """A module that is trained in place by torch.optim; `half`: under autocast to bfloat16."""
    from rlhf_fn import token_logprobs

    settings = {"betas": (ADAM["b1"], ADAM["b2"]), "eps": ADAM["eps"], "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(module.parameters(), RATE, fused=True, **settings)

    def apply(params, tokens, attention):
        return module(input_ids=tokens, attention_mask=attention.long(), use_cache=False).logits

    loss = loss_of(apply, token_logprobs)

    def step() -> torch.Tensor:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=half):
            total, _ = loss({}, batch, None)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return step


def setting(machine: Machine, size: Size) -> tuple[Any, tuple[Any, Any], Any]:
    """(module, (with logits, without), batch)."""
    module = llama(machine, size.shape, 2 * size.time)

    from rlhf_fn.models import causal_lm
    from rlhf_fn.projection import projected_lm

    batch = policy_batch(machine, size.shape.vocab, size.batch, size.time)
    return module, (causal_lm(module), projected_lm(module)), batch


def main() -> None:
    """The table of both vocabularies, in a few minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vocab", type=int, nargs="*", default=[size.shape.vocab for size in SIZES]
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each race")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    machine = bench.here()
    todo = jobs(machine, sizes=[Size().of(vocab=v) for v in asked.vocab], seconds=asked.seconds)
    rows = bench.run(todo, 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    about = ", ".join(f"{k} {v}" for k, v in bench.versions(machine).items())
    print(about, shown(rows), sep="\n\n")
    raise SystemExit(1 if bench.failed(rows) else 0)


if __name__ == "__main__":
    main()
