"""A training step of half a billion parameters, bfloat16 to compute in, float32 to learn in.

    MFU = tokens · (6 · weights + 6 · layers · width · time) / seconds / FLOPs that the GPU names

of the weights that a token is multiplied with, and of attention that is causal. What is peak
memory holds parameters, moments and gradients too. Everybody is alone on the device in its turn.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench
import rlhf_kernels
import torch
import train
from bench import Job, Machine, Row
from llamas import HALF_BILLION, policy_batch

COLUMNS = ("who", "ms", "quartiles", "tokens/s", "MFU", "peak GB", "norm error")
FIRST = ("compiled", "seconds")
FLOPS = {"H100": 989e12, "H200": 989e12}  # a second, of dense bfloat16, of the SXM modules
SIZE = train.Size(HALF_BILLION, batch=8, time=1024)
USUAL = "torch.optim.AdamW(fused=True), autocast"


class Way(NamedTuple):
    params: dict[str, torch.Tensor]
    gradient: Callable  # of (params, batch, key)
    compiled: bool


class Setting(NamedTuple):
    """What all jobs share; `norms` are of the first gradients."""

    module: Any
    ways: dict[str, Way]
    norms: dict[str, float]


def shown(rows: list[Row]) -> str:
    """The steps, and what compiling them took."""
    return "\n".join(bench.told(rows, table) for table in (COLUMNS, FIRST))


def jobs(machine: Machine, *, size: train.Size = SIZE, seconds: float = 5.0) -> Iterator[Job]:
    """First everything is compiled, on two rows; then each way by itself."""
    made: list[Setting] = []
    yield "compiling", partial(begin, made, machine, size)
    for who in (USUAL, *gradients()):
        yield who, partial(alone, made, machine, size, who, seconds)


def begin(made: list[Setting], machine: Machine, size: train.Size) -> list[Row]:
    """The setting; a graph that cannot be made is a row, and fails again in its turn."""
    from rlhf_fn.random import key

    bench.compiled_anew()
    module, models, _ = train.setting(machine, size._replace(batch=2))
    ways = {who: gradient(machine, size, *models) for who, gradient in gradients().items()}
    made.append(Setting(module, ways, {}))
    few, rows = policy_batch(machine, size.shape.vocab, 2, size.time), []
    once = key(0, device=machine.device)
    for who, way in ways.items():
        if not way.compiled:
            continue
        try:
            taken = bench.cpu().seconds(partial(way.gradient, way.params, few, once))
            rows.append({"compiled": who, "seconds": taken})
        except Exception as error:
            rows.append({"who": who, "status": "FAILED", "why": f"{who}: {bench.said(error)}"})
    return rows


def gradients() -> dict[str, Callable[..., Way]]:
    """name -> (machine, size, model with logits, without) -> its way to the gradient."""
    import rlhf_fn
    from rlhf_fn.compiled import compiled_gradient
    from rlhf_fn.precision import in_dtype
    from rlhf_fn.projection import of_projection
    from rlhf_fn.steps import autograd_gradient

    kernel = of_projection(rlhf_kernels.linear_token_logprobs_and_entropy)

    def way(bare: bool, graph: bool) -> Callable[..., Way]:
        def made(machine: Machine, size: train.Size, *models: Any) -> Way:
            model = in_dtype(models[bare], torch.bfloat16)
            loss = train.loss_of(model.apply, kernel if bare else rlhf_fn.token_logprobs)
            sizes = {"rows": 2, "time": size.time, "backend": machine.backend}
            gradient = compiled_gradient(loss, **sizes) if graph else autograd_gradient(loss)
            return Way(model.params, gradient, graph)

        return made

    return {
        "donated": way(bare=False, graph=False),
        "no logits": way(bare=True, graph=False),
        "no logits, compiled": way(bare=True, graph=True),
        "donated, compiled": way(bare=False, graph=True),
    }


def alone(
    made: list[Setting], machine: Machine, size: train.Size, who: str, seconds: float
) -> list[Row]:
    """The norm of the first gradient, its peak of memory, then the time of those after it."""
    gc.collect()  # what the last one held
    setting, first = made[0], []
    batch = policy_batch(machine, size.shape.vocab, size.batch, size.time)

    def begun() -> Callable[[], torch.Tensor]:
        step = stepped(setting, batch, who)
        first.append(float(step()))
        return step

    peak = machine.peak(lambda: begun() and None)
    step = begun()
    laps = {who: lambda _: step()}
    taken = bench.race(laps, machine, rounds=10, least=3, seconds=seconds)[who]
    if isinstance(taken, str):
        raise RuntimeError(taken)
    setting.norms[who] = first[0]
    error = abs(first[0] / setting.norms.get(USUAL, first[0]) - 1)
    row = {
        "who": who, "ms": taken.median * 1e3,
        "quartiles": f"{taken.low * 1e3:.4g}–{taken.high * 1e3:.4g}",
        "tokens/s": size.batch * size.time / taken.median, "MFU": mfu(size, taken.median),
        "peak GB": peak / 1e9, "norm error": error,
    }  # fmt: skip
    bad = {"status": "FAILED", "why": f"{who}: the norm is {error:.2g} from the usual one"}
    return [row if error <= train.ALLOWED["bfloat16"] else row | bad]


def stepped(setting: Setting, batch: Any, who: str) -> Callable[[], torch.Tensor]:
    """Its step, from the first parameters on."""
    if who == USUAL:
        return train.usual(copy.deepcopy(setting.module), batch, half=True)
    way = setting.ways[who]
    return train.stepped(batch, way.params, way.gradient)


def mfu(size: train.Size, seconds: float) -> float | str:
    """The share of what the GPU names; "?" of another device."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [flops for gpu, flops in FLOPS.items() if gpu in name]
    shape = size.shape
    per_token = 6 * shape.products + 6 * shape.layers * shape.width * size.time
    return size.batch * size.time * per_token / seconds / peaks[0] if peaks else "?"
