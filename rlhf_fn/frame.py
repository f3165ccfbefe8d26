"""What stands before and after the work of every command: its rows, its results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fn import data, readers, report
from rlhf_fn.collate import PairExample, keep_ends
from rlhf_fn.config import ConfigError
from rlhf_fn.loading import Policy
from rlhf_fn.models import Params, save_policy
from rlhf_fn.ranks import by_first
from rlhf_fn.sharding import on_first


def save_tuned(directory: Path, policy: Policy, params: Params) -> None:
    """The tuned model and its tokenizer, as a folder that transformers loads.

    What rank 0 writes may take long, and the others wait 60 s for it: so this comes last.
    """
    by_first(save_policy)(policy.module, on_first(params), directory)
    by_first(policy.tokenizer.save_pretrained)(directory)


@by_first
def say(results: dict[str, str]) -> None:
    """A line for each result."""
    for name, value in results.items():
        print(f"{name}: {value}")


def read(paths: Sequence[str], reader: Callable[[str], Any]) -> list[Any]:
    """The records of all files together."""
    return [record for path in paths for record in reader(path).records]


def split(rows: Sequence[Any], key: Tensor, share: float, what: str) -> tuple[list, list]:
    """(kept, held out), or which option leaves a side empty."""
    try:
        return data.split(rows, key, share)
    except ValueError as error:
        message = f"--held-out {share} of the {len(rows)} {what} leaves a side empty; give more"
        raise ConfigError(message) from error


def at_least(number: int, rows: Sequence[Any], what: str) -> None:
    """Raise a `ConfigError` where fewer rows than that can be used."""
    if len(rows) < number:
        raise ConfigError(f"{what}: {len(rows)} usable, {number} or more are needed")


@by_first
def finish(run: Any, title: str, results: dict[str, str], samples: Sequence[Any] = ()) -> None:
    """Print the results and write `report.md`."""
    say(results)
    report.write(
        run.directory, title=title, results=results, records=run.log.records(), samples=samples
    )
    print(f"report: {run.directory / 'report.md'}")


def read_pairs(paths: Sequence[str]) -> tuple[list[readers.Pair], int]:
    """Pairs of JSON files, or sentences of a .pos (chosen) and a .neg file; how many were bad."""
    if sorted(Path(p).suffix for p in paths) == [".neg", ".pos"]:
        negative, positive = sorted(paths, key=lambda p: Path(p).suffix)
        return readers.read_sentences(positive, negative).records, 0
    read = [readers.read_pairs(path, on_bad="skip") for path in paths]
    return [pair for r in read for pair in r.records], sum(len(r.skipped) for r in read)


def tokenised_pairs(
    encoder: data.Encoder, pairs: Sequence[readers.Pair], max_length: int
) -> list[PairExample]:
    """Pairs as examples of at most `max_length` tokens that keep BOS and the end, the answer's."""
    whole = data.tokenise_pairs(encoder, pairs, max_length=2**30).examples
    head = int(encoder.bos is not None)
    cut = [data.PairExample(*keep_ends(pair, max_length, head=head)) for pair in whole]
    return [pair for pair in cut if pair.chosen != pair.rejected]


def tokenised_prompts(policy: Policy, texts: Sequence[str], length: int) -> list[list[int]]:
    """Prompts cut to their first `length` tokens."""
    return [data.encode_prompt(policy.encoder, text)[:length] for text in texts]
