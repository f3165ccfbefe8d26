"""One real training step: a small Llama's policy loss with our log-probs in one compiled graph."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from llamas import Shape, llama, policy_batch

COLUMNS = ("who", "ms", "quartiles", "extra MB", "tokens/s", "gradient error", "first s")
ALLOWED = 1e-4  # of the gradient, relative, from floor 0 in eager float32


class Size(NamedTuple):
    vocab: int = 32000
    width: int = 512
    layers: int = 4
    heads: int = 8
    batch: int = 16
    time: int = 512


SIZE = Size()


shown = partial(bench.told, columns=COLUMNS)


def jobs(machine: Machine, *, size: Size = SIZE, seconds: float = 10.0) -> Iterator[Job]:
    """One job: all ways must agree before they are timed."""
    yield f"policy loss, {size.batch} x {size.time} tokens", partial(raced, machine, size, seconds)


def raced(machine: Machine, size: Size, seconds: float) -> list[Row]:
    """Ours and floor 0, eager and compiled: the gradient of each, then the time of each."""
    apply, params, batch = setting(machine, size)
    bench.compiled_anew()
    ways = gradients(machine, apply)
    exact = ways["floor 0"](params, batch)[0]
    norm = torch.stack([g.double().norm() for g in exact.values()]).norm()
    errors, first = {}, {}
    for who, way in ways.items():
        taken = bench.cpu().seconds(lambda way=way: way(params, batch))
        gaps = [
            (g.double() - exact[name].double()).norm() for name, g in way(params, batch)[0].items()
        ]
        errors[who], first[who] = (torch.stack(gaps).norm() / norm).item(), taken
    laps = {who: lambda _, way=way: way(params, batch) for who, way in ways.items()}
    times = bench.race(laps, machine, seconds=seconds)
    return [_row(who, times[who], errors[who], first[who], size) for who in ways]


def gradients(machine: Machine, apply: Callable) -> dict[str, Callable]:
    """name -> (params, batch) -> (gradient, ...), by torch.autograd.grad outside of the graph."""
    import rlhf_fn
    from rlhf_fn.kl import k2
    from rlhf_fn.losses import of_tokens, policy_loss
    from rlhf_fn.policy import clipped_surrogate
    from rlhf_fn.random import key
    from rlhf_fn.steps import autograd_gradient

    once = key(0, device=machine.device)

    def way(token_logprobs: Callable, graph: bool) -> Callable:
        loss = policy_loss(
            apply, surrogate=of_tokens(clipped_surrogate, clip_low=0.2, clip_high=0.2), penalty=k2,
            temperature=1.0, kl_coef=0.05, entropy_coef=0.0,
            token_logprobs=token_logprobs,
        )  # fmt: skip
        gradient = autograd_gradient(machine.compiled(loss) if graph else loss)
        return lambda params, batch: gradient(params, batch, once)

    floor, ours = rlhf_fn.token_logprobs, rlhf_kernels.token_logprobs
    return {
        "floor 0": way(floor, False),
        "ours": way(ours, False),
        "floor 0, compiled": way(floor, True),
        "ours, compiled": way(ours, True),
    }


def setting(machine: Machine, size: Size) -> tuple[Callable, dict, Any]:
    """(apply, params, batch)."""
    shape = Shape(
        size.vocab, size.width, 2 * size.width, size.layers, size.heads, kv_heads=size.heads
    )
    module = llama(machine, shape, size.time)

    from rlhf_fn.models import causal_lm

    return *causal_lm(module), policy_batch(machine, size.vocab, size.batch, size.time)


def _row(who: str, times: bench.Times | str, error: float, first: float, size: Size) -> Row:
    if isinstance(times, str):
        return {"who": who, "status": "FAILED", "why": f"{who}: {times}"}
    row = {
        "who": who, "ms": times.median * 1e3,
        "quartiles": f"{times.low * 1e3:.4g}–{times.high * 1e3:.4g}",
        "extra MB": times.peak / 1e6, "tokens/s": size.batch * size.time / times.median,
        "gradient error": error, "first s": first,
    }  # fmt: skip
    bad = {"status": "FAILED", "why": f"{who}: the gradient is {error:.2g} from floor 0's"}
    return row if error <= ALLOWED else row | bad
