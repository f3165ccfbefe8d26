"""Bytes on disk into text and JSON records that know their line and column."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rlhf_fn.errors import DataError

R = TypeVar("R")


@dataclass(frozen=True)
class Read(Generic[R]):
    """What a file held: the records in order, and the errors of those passed over."""

    records: list[R]
    skipped: tuple[DataError, ...]


class Source(NamedTuple):
    """The text of a file, and where things are in it."""

    path: str
    text: str

    def error(self, message: str, position: int) -> DataError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return DataError(message, file=self.path, line=line, column=column)


class Record(NamedTuple):
    """A JSON object, and the part of the source that it came from."""

    source: Source
    start: int
    end: int
    fields: dict[str, Any]

    def error(self, message: str, key: str | None = None) -> DataError:
        at = -1 if key is None else self.source.text.find(f'"{key}"', self.start, self.end)
        return self.source.error(message, self.start if at < 0 else at)

    def string(self, key: str, *, empty: bool = False) -> str:
        """The text of a field; neither empty (unless allowed), nor with NUL or half a character."""
        if key not in self.fields:
            has = ", ".join(map(repr, self.fields)) or "no fields"
            raise self.error(f"no field {key!r} (it has {has}); add it")
        value = self.fields[key]
        if not isinstance(value, str):
            kind = type(value).__name__
            raise self.error(f"{key!r} is of type {kind}, expected a string; convert it", key)
        if not empty and not value.strip():
            raise self.error(f"{key!r} is empty; fill it in or remove the record", key)
        if "\0" in value:
            raise self.error(f"{key!r} contains NUL (\\u0000); remove it", key)
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error(f"{key!r} contains a lone surrogate (half a character); fix it", key)
        return value


class _Duplicate(NamedTuple):
    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Duplicate:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            return _Duplicate(key)
        fields[key] = value
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def read_text(path: str | Path, *, fallback: str | None = None) -> Source:
    """The text of a file, decompressed if need be, without BOM, lines ending in LF.

    Args:
        fallback: the encoding to try where the bytes are not UTF-8.

    Raises:
        DataError: a damaged .gz, or bytes that are no text.
    """
    raw, name = Path(path).read_bytes(), str(path)
    if name.endswith(".gz") or raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            message = f"damaged gzip ({error}); copy or compress the file again"
            raise DataError(message, file=name, line=1) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is None:
            before = raw[: error.start].decode("utf-8-sig", "replace")
            message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
            raise Source(name, before).error(message, len(before)) from error
        text = raw.decode(fallback)
    return Source(name, text.replace("\r\n", "\n"))


def collect(path: str | Path, parse: Callable[[Record], R], on_bad: str) -> Read[R]:
    """Parse every JSON object of a file; "raise" the first error, or "skip" and keep them all.

    Raises:
        DataError: see `error`; and where no record is left.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad is {on_bad!r}, expected "raise" or "skip"')
    source = read_text(path)
    records: list[R] = []
    skipped: list[DataError] = []
    for found in _objects(source):
        try:
            if isinstance(found, DataError):
                raise found
            records.append(parse(found))
        except DataError as error:
            if on_bad == "raise":
                raise
            skipped.append(error)
    return not_empty(records, skipped, source)


def not_empty(records: list[R], skipped: list[DataError], source: Source) -> Read[R]:
    """The records and what was skipped; a `DataError` where no record is left."""
    if records:
        return Read(records, tuple(skipped))
    if skipped:
        message = f"none of {len(skipped)} records can be used; the first: {skipped[0]}"
        raise DataError(message, file=source.path, line=skipped[0].line)
    raise source.error("the file has no records; is it the right one?", 0)


def _objects(source: Source) -> Iterator[Record | DataError]:
    """The records of a JSON list or of JSONL, whichever the text begins like."""
    start = _skip_space(source.text, 0)
    return _list(source, start) if source.text.startswith("[", start) else _lines(source)


def _lines(source: Source) -> Iterator[Record | DataError]:
    start = 0
    while start < len(source.text):
        end = source.text.find("\n", start)  # not splitlines: U+2028 is no end of a JSON line
        end = len(source.text) if end < 0 else end
        if source.text[start:end].strip():
            yield _line(source, start, end)
        start = end + 1


def _line(source: Source, start: int, end: int) -> Record | DataError:
    line = source.text[start:end]
    begin = _skip_space(line, 0)
    try:
        value, stop = _JSON.raw_decode(line, begin)
    except (ValueError, RecursionError) as error:
        return _corrupt(source, error, start)
    after = _skip_space(line, stop)
    if after < len(line):
        return source.error(
            "text after the record; put one JSON object on each line", start + after
        )
    return _record(source, start + begin, start + stop, value)


def _list(source: Source, start: int) -> Iterator[Record | DataError]:
    text, at = source.text, _skip_space(source.text, start + 1)
    while not (text.startswith("]", at) and text[at - 1] != ","):
        try:
            value, stop = _JSON.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _corrupt(source, error, 0, at) from error
        yield _record(source, at, stop, value)
        at = _skip_space(text, stop)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise source.error("expected ',' or ']' after a record; is the file cut short?", at)
        at = _skip_space(text, at + 1)
    after = _skip_space(text, at + 1)
    if after < len(text):
        raise source.error("text after the end of the list; remove it", after)


def _record(source: Source, start: int, end: int, value: Any) -> Record | DataError:
    if isinstance(value, _Duplicate):
        return source.error(f"field {value.key!r} occurs twice; keep one", start)
    if not isinstance(value, dict):
        kind = type(value).__name__
        return source.error(f"a record of type {kind}, expected an object {{...}}", start)
    return Record(source, start, end, value)


def _corrupt(source: Source, error: Exception, offset: int, at: int = 0) -> DataError:
    position = error.pos if isinstance(error, json.JSONDecodeError) else at
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return source.error(f"corrupt JSON: {reason}; correct or remove the record", offset + position)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at
