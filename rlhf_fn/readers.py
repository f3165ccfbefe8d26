"""Files into records: instructions, preference pairs, prompts and labelled sentences.

JSON lists, JSONL and text, each also as .gz; UTF-8 with or without BOM, LF or CRLF. Whatever is
wrong is a `DataError` that begins `file:line:column`, and `on_bad="skip"` passes over single bad
records and returns their errors with the rest.
"""

from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fn.errors import DataError
from rlhf_fn.sources import Read, Record, Source, collect, not_empty, read_text

Template = Callable[[str, str], str]

TURN = "\n\nAssistant:"
SEPARATOR = "<|endoftext|>"


class Demonstration(NamedTuple):
    prompt: str
    completion: str


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def alpaca(instruction: str, input: str) -> str:
    """The prompt that Stanford Alpaca was trained with.

    Taori et al. 2023: https://github.com/tatsu-lab/stanford_alpaca
    """
    context = ", paired with an input that provides further context" if input else ""
    given = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{given}"
        "### Response:\n"
    )


def read_instructions(
    path: str | Path, *, template: Template = alpaca, on_bad: str = "raise"
) -> Read[Demonstration]:
    """Demonstrations `{instruction, input?, output}`, or `{prompt, completion}`.

    Args:
        template: (instruction, input) -> prompt.
        on_bad: "raise" at the first bad record, or "skip" it and return its error.

    Raises:
        DataError: corrupt, missing, empty or mistyped fields; no record at all.
    """

    def parse(record: Record) -> Demonstration:
        if "prompt" in record.fields:
            return Demonstration(record.string("prompt"), record.string("completion"))
        return Demonstration(_instruction(record, template), record.string("output"))

    return collect(path, parse, on_bad)


def read_pairs(
    path: str | Path, *, template: Template = alpaca, on_bad: str = "raise"
) -> Read[Pair]:
    """Preference pairs `{chosen, rejected}` with a `prompt`, or an `instruction`, or neither.

    With neither, they are two dialogues: the prompt is what both begin with, up to and including
    the last "\\n\\nAssistant:" in it (Bai et al. 2022, https://arxiv.org/abs/2204.05862), and is
    empty where there is none.

    Args:
        template: (instruction, input) -> prompt.
        on_bad: "raise" at the first bad record, or "skip" it and return its error.

    Raises:
        DataError: as `read_instructions`, and where chosen and rejected are the same.
    """

    def parse(record: Record) -> Pair:
        chosen, rejected = record.string("chosen"), record.string("rejected")
        if chosen == rejected:
            raise record.error("'chosen' and 'rejected' are identical; remove it", "rejected")
        if "prompt" in record.fields:
            return Pair(record.string("prompt", empty=True), chosen, rejected)
        if "instruction" in record.fields:
            return Pair(_instruction(record, template), chosen, rejected)
        prompt = dialogue_prompt(chosen, rejected)
        pair = Pair(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
        for key in ("chosen", "rejected"):
            if not getattr(pair, key).strip():
                raise record.error(f"{key!r} says nothing after the prompt; remove the record", key)
        return pair

    return collect(path, parse, on_bad)


def dialogue_prompt(chosen: str, rejected: str) -> str:
    """What two dialogues share, up to and including the last "\\n\\nAssistant:" in it."""
    shared = commonprefix([chosen, rejected])
    at = shared.rfind(TURN)
    return shared[: at + len(TURN)] if at >= 0 else ""


def read_prompts(path: str | Path, *, field: str = "prompt", on_bad: str = "raise") -> Read[str]:
    """Prompts: a field of a .json or .jsonl file, or the pieces of a text file.

    Text is cut at `<|endoftext|>` where it has that, and otherwise into lines; blank pieces are
    no prompts.

    Raises:
        DataError: as `read_instructions`.
    """
    if Path(str(path).removesuffix(".gz")).suffix in {".json", ".jsonl"}:
        return collect(path, lambda record: record.string(field), on_bad)
    source = read_text(path)
    _check_text(source)
    pieces = source.text.split(SEPARATOR if SEPARATOR in source.text else "\n")
    return not_empty([piece.strip("\n") for piece in pieces if piece.strip()], [], source)


def read_prompt_records(
    path: str | Path, *, field: str = "prompt", on_bad: str = "raise"
) -> Read[dict[str, Any]]:
    """`read_prompts`, as {"prompt": ...} with every other field of its record.

    Raises:
        DataError: as `read_instructions`, and where a record has other fields than the first one.
    """
    if Path(str(path).removesuffix(".gz")).suffix not in {".json", ".jsonl"}:
        read = read_prompts(path)
        return Read([{"prompt": text} for text in read.records], read.skipped)
    names: list[str] = []

    def parse(record: Record) -> dict[str, Any]:
        fields = {"prompt": record.string(field)} | {
            name: value for name, value in record.fields.items() if name not in (field, "prompt")
        }
        if names and sorted(fields) != sorted(names):
            raise record.error(
                f"its fields are {', '.join(record.fields)}, but the first record is of "
                f"{', '.join(names)}; give every record the same"
            )
        names[:] = fields
        return fields

    return collect(path, parse, on_bad)


def read_fields(
    path: str | Path, fields: tuple[str, ...], *, on_bad: str = "raise"
) -> Read[dict[str, str]]:
    """The named text fields of every record, such as ("question", "answer").

    Raises:
        DataError: as `read_instructions`.
    """
    return collect(path, lambda record: {f: record.string(f) for f in fields}, on_bad)


def read_sentences(positive: str | Path, negative: str | Path) -> Read[Pair]:
    """Two files of sentences, one a line: the i-th positive one is preferred to the i-th negative.

    There is no prompt. A file that is not UTF-8 is read as Latin-1.

    Raises:
        DataError: a blank line, NUL, control characters that no Latin-1 text has, identical
            sentences, or files of different length.
    """
    good, bad = (_sentences(path) for path in (positive, negative))
    if len(good) != len(bad):
        longer = positive if len(good) > len(bad) else negative
        line = min(len(good), len(bad)) + 1
        raise DataError(
            f"{len(good)} positive and {len(bad)} negative sentences; cut the longer file",
            file=str(longer), line=line,
        )  # fmt: skip
    for line, (chosen, rejected) in enumerate(zip(good, bad), 1):
        if chosen == rejected:
            message = f"also line {line} of {positive}: no preference; remove one"
            raise DataError(message, file=str(negative), line=line)
    return Read([Pair("", chosen, rejected) for chosen, rejected in zip(good, bad)], ())


def _instruction(record: Record, template: Template) -> str:
    given = record.string("input", empty=True) if "input" in record.fields else ""
    return template(record.string("instruction"), given)


def _check_text(source: Source) -> None:
    if (at := source.text.find("\0")) >= 0:
        raise source.error("NUL; this is no text file, or remove it", at)


def _sentences(path: str | Path) -> list[str]:
    source = read_text(path, fallback="latin-1")
    _check_text(source)
    for at, c in enumerate(source.text):
        if "\x80" <= c <= "\x9f":
            message = f"control character U+{ord(c):04X}: neither UTF-8 nor Latin-1; save as UTF-8"
            raise source.error(message, at)
    lines = source.text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError("blank line; remove it", file=source.path, line=number)
    return lines
