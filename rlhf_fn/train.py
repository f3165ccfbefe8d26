"""The fold: `state, metrics = iteration(state, key)` over steps, with its log and checkpoints.

The only mutable loop of the library. An iteration is a pure function of (state, key), its key is
`fold_in(run key, step)`, and the state is a pytree of tensors, so a run that was killed goes on
from its last checkpoint to the same bits as a run that never was.
"""

import hashlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from rlhf_fn import checkpoint, random, ranks, sharded
from rlhf_fn.checks import NonFiniteError
from rlhf_fn.errors import CorruptCheckpoint
from rlhf_fn.storage import guarded

Iteration = Callable[[Any, Tensor, int], tuple[Any, dict[str, Tensor]]]


class Log:
    """`metrics.jsonl`: a line per step, rewound to where the resumed checkpoint left it.

    The first rank writes it, and every rank may read.
    """

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        ranks.by_first(path.touch)()

    def write(self, record: dict[str, Any]) -> None:
        if ranks.place().rank:
            return
        with guarded("metrics not written", self.path), self.path.open("r+b") as file:
            file.truncate(self.position)
            file.seek(self.position)
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            self.position = file.tell()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._written().splitlines()]

    def mark(self) -> dict[str, Any]:
        """What a checkpoint remembers of the log: its length and its hash."""
        return {"metrics_bytes": self.position, "metrics_sha256": _digest(self._written())}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Go back to a mark.

        Raises:
            CorruptCheckpoint: the lines before it are not the ones that were written.
        """
        self.position = mark["metrics_bytes"]
        if _digest(self._written()) != mark["metrics_sha256"]:
            raise CorruptCheckpoint(
                f"{self.path}: its first {self.position} bytes were changed since they were "
                "written; restore the file, or begin again in another folder"
            )

    def _written(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(self.position)

    def unfinished(self) -> bool:
        """Whether there are lines behind the position."""
        return self.path.exists() and self.path.stat().st_size > self.position


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _until_sigterm():
    """Yield a function that says whether SIGTERM came to any rank; once all is done, exit with 143.

    Only what the ranks agreed on counts: one that comes while they ask each other is for the
    next time they do, or this rank would stop and the others wait for it. A second SIGTERM is
    not caught: it ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread gets signals
        return
    received = []

    def note(*_: Any) -> None:
        received.append(True)
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note) or signal.SIG_DFL
    try:
        yield lambda: ranks.anywhere(bool(received))
    finally:
        signal.signal(signal.SIGTERM, before)
    if ranks.anywhere(bool(received)):
        raise SystemExit(143)


@contextmanager
def _step_named(name: str):
    try:
        yield
    except NonFiniteError as error:
        message = f"{name}: {error}; the step was not kept, and what was saved before is intact"
        raise NonFiniteError(message) from error


def _floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    values = {name: value.item() for name, value in metrics.items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if values.pop("finite", 1.0) != 1.0:
        bad.append("a gradient is not finite")
    if bad:
        raise NonFiniteError(
            f"{', '.join(bad)}; lower the learning rate or look at the data of this step"
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
    ends the run early. A checkpoint is written every `every` steps and at the end. SIGTERM
    finishes the step, saves and exits with code 143; a second one ends the process at once.

    Called on every rank with the same arguments; the first writes the log, all write checkpoints.

    Raises:
        NonFiniteError: a metric is NaN or infinite; the state before it is kept.
        CheckpointError: what is in `checkpoints` cannot be trusted or belongs to another run.
        ValueError: the ranks do not begin in the same state.
    """
    done, state = _resumed(checkpoints, state, stage, log)
    ranks.agree(steps_done=done, parameters=state)
    kept = done

    def save() -> int:
        meta = {"stage": stage, **log.mark()}
        sharded.save(checkpoints, done, checkpoint.flatten(state), meta)
        return done

    finished = done >= steps or stop(state)
    with _until_sigterm() as asked_to_stop, _progress(stage, done, steps) as bar:
        while not (finished or asked_to_stop()):
            with _step_named(f"{stage} step {done}"):
                state, metrics = iteration(state, random.fold_in(key, done), done)
                record = _floats(metrics)
            bar(record)
            log.write({"stage": stage, "step": done, **record})
            done += 1
            finished = done >= steps or stop(state)
            if done % every == 0:
                kept = save()
        if done > kept:
            save()
    return state


def _resumed(checkpoints: Path, state: Any, stage: str, log: Log) -> tuple[int, Any]:
    """(steps done, state) of the newest checkpoint, or the ones to begin with."""
    saved = sharded.load_latest(checkpoints, checkpoint.flatten(state))
    if saved is not None:
        checkpoint.require({"stage": saved.meta.get("stage")}, {"stage": stage})
        log.rewind(saved.meta)
        return saved.step, checkpoint.unflatten(state, saved.tensors)
    if log.unfinished():
        warnings.warn(f"{stage}: nothing was saved yet; it begins at step 0 again", stacklevel=3)
    return 0, state


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
