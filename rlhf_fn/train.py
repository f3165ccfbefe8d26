"""The fold: `state, metrics = iteration(state, key)` over steps, with its log and checkpoints.

The only mutable loop of the library. An iteration is a pure function of (state, key), its key is
`fold_in(run key, step)`, and the state is a pytree of tensors, so a run that was killed goes on
from its last checkpoint to the same bits as a run that never was.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rlhf_fn import checkpoint, random
from rlhf_fn.storage import guarded

Iteration = Callable[[Any, Tensor, int], tuple[Any, dict[str, Tensor]]]


class NonFiniteError(ValueError):
    """A loss or a reward that is NaN or infinite: the step is not kept."""


class Log:
    """`metrics.jsonl`: a line per step, rewound to where the resumed checkpoint left it."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        path.touch()

    def write(self, record: dict[str, Any]) -> None:
        with guarded("metrics not written", self.path), self.path.open("r+b") as file:
            file.truncate(self.position)
            file.seek(self.position)
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            self.position = file.tell()

    def records(self) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            return [json.loads(line) for line in file.read(self.position).splitlines()]


@contextmanager
def _until_sigterm():
    """Yield a function that says whether SIGTERM has come; the step in hand is finished first."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _floats(metrics: dict[str, Tensor], where: str) -> dict[str, float]:
    values = {name: value.item() for name, value in metrics.items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if values.pop("finite", 1.0) != 1.0:
        bad.append("a gradient is not finite")
    if bad:
        raise NonFiniteError(
            f"{where}: {', '.join(bad)}; the step was not kept, the last checkpoint is intact. "
            "Lower the learning rate or look at the data of this step."
        )
    return values


def fold(
    iteration: Iteration,
    state: Any,
    key: Tensor,
    *,
    stage: str,
    steps: int,
    log: Log,
    checkpoints: Path,
    every: int,
    stop: Callable[[Any], bool] = lambda state: False,
) -> Any:
    """Run `iteration(state, fold_in(key, step), step)` for `steps` steps and return the last state.

    Continues from the newest verified checkpoint in `checkpoints` if there is one. `stop(state)`
    ends the run early. A checkpoint is written every `every` steps, at the end and on SIGTERM
    (exit code 143).

    Raises:
        NonFiniteError: a metric is NaN or infinite; the state before it is kept.
        CheckpointError: what is in `checkpoints` cannot be trusted or belongs to another run.
    """
    done = 0
    saved = checkpoint.load_latest(checkpoints)
    if saved is not None:
        done, tensors, meta = saved
        state = checkpoint.unflatten(state, tensors)
        log.position = meta["metrics_bytes"]

    def save() -> None:
        meta = {"stage": stage, "metrics_bytes": log.position}
        checkpoint.save(checkpoints, done, checkpoint.flatten(state), meta)

    with _until_sigterm() as asked_to_stop, _progress(stage, done, steps) as bar:
        while done < steps and not stop(state):
            state, metrics = iteration(state, random.fold_in(key, done), done)
            record = _floats(metrics, f"{stage} step {done}")
            bar(record)
            log.write({"stage": stage, "step": done, **record})
            done += 1
            last = done == steps or stop(state)
            if last or asked_to_stop() or done % every == 0:
                save()
            if asked_to_stop() and not last:
                raise SystemExit(143)
    return state


@contextmanager
def _progress(stage: str, done: int, steps: int):
    """A bar with tokens per second and the time left; silent when output is not a terminal."""
    began, tokens = time.perf_counter(), 0.0
    with tqdm(total=steps, initial=done, desc=stage, disable=None, unit="step") as bar:

        def update(record: dict[str, float]) -> None:
            nonlocal tokens
            tokens += record.get("tokens", 0.0)
            rate = tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s, loss {record.get('loss', math.nan):.3f}")
            bar.update()

        yield update
