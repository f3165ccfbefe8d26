"""What a person types, on the GPU: `rlhf-fn pipeline` takes the steps there that it takes here."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench import Job, Machine, Row
from correctness import require

from rlhf_fn import cli, pipeline

Record = dict[str, Any]
TOLERANCE = 1e-3  # of every metric, relative, beside the same as a number: sums round otherwise


def jobs(machine: Machine, *, steps: int = 3, batch: int = 8) -> Iterator[Job]:
    """So many steps of each stage, of so many rows."""
    yield "rlhf-fn pipeline --device", partial(stages, machine, steps, batch)


def stages(machine: Machine, steps: int, batch: int) -> list[Row]:
    """How far the metrics of each stage are from those of the CPU."""
    here, there = (logged(device, steps, batch) for device in ("cpu", machine.device))
    require(len(here) == len(there) > 0, f"{len(there)} steps, and {len(here)} on the CPU")
    worst: dict[str, float] = {}
    for one, other in zip(here, there):
        stage = one.pop("stage")
        far = {n: abs(other[n] - x) / (abs(x) + 1) for n, x in one.items()}
        name = max(far, key=lambda n: far[n])
        require(far[name] <= TOLERANCE, f"{stage} step {one['step']}: {name} is {other[name]}")
        worst[stage] = max(worst.get(stage, 0.0), far[name])
    return [{"what": stage, "error": error, "allowed": TOLERANCE} for stage, error in worst.items()]


def logged(device: str, steps: int, batch: int) -> list[Record]:
    """The log of a short run on that device."""
    settings = pipeline.settings

    def short(out: str, seed: int) -> Any:
        return tuple(
            type(each)(**vars(each) | {"steps": steps, "batch": batch, "every": steps})
            for each in settings(out, seed)
        )

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(pipeline, "settings", short),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        out = Path(folder) / "run"
        require(cli.main(["pipeline", "--out", str(out), "--device", device]) == 0, "it failed")
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
