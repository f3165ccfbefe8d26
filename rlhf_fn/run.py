"""The folder of a run: config.json, metrics.jsonl, checkpoints, and one writer at a time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.hub import cached_file

from rlhf_fn import checkpoint
from rlhf_fn.config import Config, ConfigError, differences, inputs
from rlhf_fn.ranks import agree, place, together
from rlhf_fn.storage import guarded, make_directory, replace
from rlhf_fn.train import Log

WHERE = ("out", "device", "shards", "layerwise")  # a run may go on elsewhere
_READ = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # the files that make a model


class Run(NamedTuple):
    directory: Path
    log: Log

    def checkpoints(self, stage: str) -> Path:
        return self.directory / "checkpoints" / stage


@contextmanager
def opened(config: Any, *, resume: bool) -> Iterator[Run]:
    """Lock `config.out`, settle that it belongs to this configuration, and yield its `Run`.

    Of several ranks the first locks and claims it for all; the others only read there.

    Raises:
        ConfigError: a run is there already, or there is none to resume, or it had other options,
            or a file that it reads has changed.
        CheckpointLocked: another live process writes there.
        StorageError: the folder cannot be written; nothing has been computed yet.
        RankError: one of these, where it was another rank's.
        ValueError: the ranks have other options, or read other files.
    """
    directory = Path(config.out)
    if resume and not (directory / "config.json").is_file():
        raise ConfigError(f"--resume: there is no run in {directory}; leave --resume out")
    with guarded(f"--out {directory}", directory):
        make_directory(directory)
    with ExitStack() as held, guarded(f"--out {directory}", directory):

        def claim() -> None:
            if not place().rank:
                held.enter_context(checkpoint.lock(directory))
                _claim(directory / "config.json", config, resume, read)

        read = fingerprints(config)
        together(claim)
        agree_on(config, read)
        yield Run(directory, Log(directory / "metrics.jsonl"))


def agree_on(config: Config, read: dict[str, str]) -> None:
    """Raise a ValueError unless all ranks have these options and `fingerprints`."""
    agree(options=asdict(config), files=sorted(read.values()))


def _claim(path: Path, config: Config, resume: bool, read: dict[str, str]) -> None:
    options = json.loads(json.dumps({"command": type(config).__name__.lower(), **asdict(config)}))
    if not resume:
        if path.exists() or (path.parent / "checkpoints").exists():
            raise ConfigError(
                f"--out {path.parent} holds a run already; "
                "go on with it by --resume, or choose another folder"
            )
        replace(path, (json.dumps(options | {"inputs": read}, indent=2) + "\n").encode())
        return
    before, read_before = _settings(path)
    here = {name: options[name] for name in WHERE if name in options}
    if changed := differences(before | here, options):
        raise ConfigError(
            f"--resume: the run in {path.parent} had other options ({'; '.join(changed)}); "
            "give the same ones, or choose another --out"
        )
    if changed := sorted(dict(read_before.items() ^ read.items())):
        raise ConfigError(
            f"--resume: changed since the run in {path.parent} began: {', '.join(changed)}; "
            "restore what was there, or choose another --out"
        )


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of the run that began here, and the fingerprints of what it read."""
    try:
        before = json.loads(path.read_bytes())
        read = before.pop("inputs")
        return before, {str(name): str(digest) for name, digest in read.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); "
            "restore it, or choose another --out"
        ) from error


def fingerprints(config: Config) -> dict[str, str]:
    """The SHA-256 of every file that a configuration's inputs name, by option and file."""
    found = {}
    for flag, path in inputs(config):
        for file in _files(path):
            with file.open("rb") as content:
                found[f"{flag} {file}"] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def _files(path: str) -> list[Path]:
    """A file; of a model, folder or hub id, what is read of it; of a reward function, nothing."""
    if Path(path).is_file():
        return [Path(path)]
    is_folder = Path(path).is_dir()
    if ":" in path and not is_folder:
        return []  # a reward function that raised may be mended before --resume
    folder = Path(path) if is_folder else Path(str(cached_file(path, "config.json"))).parent
    return [file for file in sorted(folder.iterdir()) if file.suffix in _READ]
