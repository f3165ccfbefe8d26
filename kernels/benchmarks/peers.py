"""Which peers race here, and what each answers on the inputs that kernels are known to fail on."""

from collections.abc import Callable, Iterator
from functools import partial

import bench
import contenders
import torch
from bench import Job, Machine, Row
from torch import Tensor

COLUMNS = ("who", "version", "banned block", "π → 1", "far below", "func.grad")


shown = partial(bench.told, columns=COLUMNS)


def jobs(machine: Machine, *, vocab: int = 32000) -> Iterator[Job]:
    """One for each contender of the log-probs: they print side by side."""
    installed = contenders.installed()
    for who, function in contenders.logprobs(machine).items():
        if callable(function):
            yield who, partial(answers, machine, who, function, vocab)
    for name, version in installed.items():
        yield f"version of {name}", lambda n=name, v=version: [{"who": n, "version": v}]


def answers(machine: Machine, who: str, function: Callable, vocab: int) -> list[Row]:
    """Relative errors in float32; an error message where a call raises."""
    row: Row = {"who": who}
    for name, made in INPUTS.items():
        row[name] = _tried(lambda made=made: _error(function, *made(machine.device, vocab)))
    x, y, _ = _far(machine.device, vocab)
    row["func.grad"] = _tried(
        lambda: "yes" if torch.func.grad(lambda x: function(x, y).sum())(x).any() else "zeros"
    )
    return [row]


def _tried(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        return bench.said(error).split(":")[0]


def _error(function: Callable, x: Tensor, y: Tensor, exact: Tensor) -> float:
    out = function(x.clone(), y)  # some overwrite their input
    return ((out.double() - exact[: len(out)]) / exact[: len(out)]).abs().max().item()


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """log π by the sum over the others, in float64: right however near to 1 it is."""
    chosen = x.double().gather(-1, y[:, None])
    u = (x.double() - chosen).scatter(-1, y[:, None], -torch.inf)
    return -u.exp().sum(-1).log1p()


def _of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, y, _exact(x, y)


def _plain(device: str, vocab: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, vocab, device=device)
    return x, torch.randint(vocab // 2, vocab, (64,), device=device)


def _banned(device: str, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _plain(device, vocab)
    x[:, : vocab // 2] = -torch.inf
    return _of(x, y)


def _certain(device: str, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _plain(device, vocab)
    return _of(x.scatter(-1, y[:, None], 30.0), y)


def _far(device: str, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _plain(device, vocab)
    return _of(x.scatter(-1, y[:, None], -200.0), y)


INPUTS = {"banned block": _banned, "π → 1": _certain, "far below": _far}
