"""The folder of a run: config.json, metrics.jsonl, checkpoints, and one writer at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fn import checkpoint
from rlhf_fn.config import Config, ConfigError, differences
from rlhf_fn.storage import guarded, make_directory
from rlhf_fn.train import Log


class Run(NamedTuple):
    directory: Path
    log: Log

    def checkpoints(self, stage: str) -> Path:
        return self.directory / "checkpoints" / stage


@contextmanager
def opened(config: Any, *, resume: bool) -> Iterator[Run]:
    """Lock `config.out`, settle that it belongs to this configuration, and yield its `Run`.

    Raises:
        ConfigError: a run is there already, or there is none to resume, or it had other options.
        CheckpointLocked: another live process writes there.
        StorageError: the folder cannot be written; nothing has been computed yet.
    """
    directory = Path(config.out)
    with guarded(f"--out {directory}", directory):
        make_directory(directory)
    with checkpoint.lock(directory), guarded(f"--out {directory}", directory):
        _claim(directory / "config.json", config, resume)
        yield Run(directory, Log(directory / "metrics.jsonl"))


def _claim(path: Path, config: Config, resume: bool) -> None:
    now = json.loads(json.dumps({"command": type(config).__name__.lower(), **asdict(config)}))
    if resume and not path.exists():
        raise ConfigError(f"--resume: there is no run in {path.parent}; leave --resume out")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if not resume:
            raise ConfigError(
                f"--out {path.parent} holds a run already; "
                "go on with it by --resume, or choose another folder"
            )
        if changed := differences(before, now):
            raise ConfigError(
                f"--resume: the run in {path.parent} had other options ({'; '.join(changed)}); "
                "give the same ones, or choose another --out"
            )
        return
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
