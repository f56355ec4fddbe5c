"""Lazy readers: files and streams of prompts become items, one line or record in memory at a time.

What is wrong with a request is a UsageError, raised before the first item where it can be known by then;
what is wrong with a line is an InputError that names file and line.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import stat
import sys
from contextlib import nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import orjson

from lbr.core.digits import LEAST_WHOLE, MOST_WHOLE, may_be_lost
from lbr.core.errors import InputError, UsageError
from lbr.io.records import Place, Template, check_storable, item_of, leaves, names, shortened, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from lbr.core.types import Item
    from lbr.io.records import Fields

    _Lines = Iterator[tuple[Place, str]]
    _Records = Iterator[tuple[Place, Fields]]

_T = TypeVar("_T", str, list[str])

STDIN = "-"
BOM = b"\xef\xbb\xbf"
HOLDS_DIGITS = frozenset({str, int, bool, type(None)})
"""The types of values whose digits are all there; most records have no others."""
CSV_FIELD_LIMIT = 2**31 - 1  # the most that fits a C long everywhere; Python's own limit is 128 KiB


class InputFormat(StrEnum):
    """How a source spells its prompts."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"


FORMAT_OF_ENDING = {f".{format_}": format_ for format_ in InputFormat} | {".ndjson": InputFormat.JSONL}
WAY_OUT_OF_ENDING = {
    ".json": "write it as JSONL, one object per line (jq -c '.[]' does that), and name it .jsonl",
    ".parquet": "write it as JSONL or CSV",
    ".xlsx": "save it as CSV",
    ".gz": "unpack it first",
}


def read_items(
    sources: Sequence[str],
    *,
    format: InputFormat | None = None,  # noqa: A002 - the word of the command line
    template: str | None = None,
    prompt_column: str | None = None,
) -> Iterator[Item]:
    """Return the items of all sources, in order; `-` is stdin.

    `format` None goes by the ending of each name. `template` is Jinja, rendered over the fields of each
    record; it and `prompt_column` exclude each other. Raises UsageError at once for sources, flags or a
    template that cannot be used; InputError, and UsageError for columns that are not there, while reading.
    """
    if template is not None and prompt_column is not None:
        raise UsageError("expected --template or --prompt-column, got: both; name the column in the template")
    check_sources(sources)
    formats = [format or _format_of(source) for source in sources]
    if prompt_column is not None and InputFormat.TEXT in formats:
        source = sources[formats.index(InputFormat.TEXT)]
        raise UsageError(f"expected --prompt-column with columns, got: {source} as text; set --format")
    compiled = None if template is None else Template(template)
    read = partial(_read, template=compiled, column=prompt_column)
    return itertools.chain.from_iterable(map(read, sources, formats))


def check_sources(sources: Sequence[str]) -> None:
    """Raise UsageError for the first source that cannot be read; nothing is taken from a stream."""
    if not sources:
        raise UsageError("expected at least one input, got: none; name a file, or - for stdin")
    if sources.count(STDIN) > 1:
        raise UsageError("expected - (stdin) once, got: it twice; it can be read only once")
    for source in sources:
        if source != STDIN:
            _check_file(source)


def is_stream(source: str) -> bool:
    """Return whether a source can be read only once: stdin, a pipe, a device."""
    return source == STDIN or not os.path.isfile(source)


def load_text(text_or_at_file: str, what: str) -> str:
    """Return the argument itself, or what is in the UTF-8 file that `@path` names; `what` is its name in messages.

    The line break that ends a file is no part of it: editors put it there.
    A template that starts with the sign itself is written `{{ '@' }}`. Raises UsageError.
    """
    if not text_or_at_file.startswith("@"):
        return text_or_at_file
    path = text_or_at_file[1:]
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"expected {path} to be UTF-8, got: {_bad_byte(error)}; convert it") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"expected {what} at {path!r}, got: {_reason(error)}; check the path") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"0x{error.object[error.start]:02x} as byte {error.start + 1}"


def _format_of(source: str) -> InputFormat:
    ending = Path(source).suffix.lower()
    if way_out := WAY_OUT_OF_ENDING.get(ending):
        raise UsageError(f"expected text, JSONL, CSV or TSV, got: {source}; {way_out}")
    return FORMAT_OF_ENDING.get(ending, InputFormat.TEXT)


def _check_file(source: str) -> None:
    try:
        mode = Path(source).stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"expected an input file, got: the folder {source}; name the files in it")
        if stat.S_ISREG(mode):
            Path(source).open("rb").close()
        elif not os.access(source, os.R_OK):
            raise PermissionError(None, "Permission denied")
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> UsageError:
    return UsageError(f"expected a readable file, got: {source!r}: {_reason(error)}; check path and mode")


def _open(source: str) -> AbstractContextManager[IO[bytes]]:
    if source == STDIN:
        if sys.stdin is None:  # it is where the process was started with stdin closed
            raise UsageError("expected prompts on stdin, got: a closed stdin; pipe them in or name a file")
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise _unreadable(source, error) from error


def _read(source: str, kind: InputFormat, template: Template | None, column: str | None) -> Iterator[Item]:
    name = "stdin" if source == STDIN else source
    if column is None and kind is not InputFormat.JSONL:
        column = "prompt"
    with _open(source) as handle:
        lines = _lines(handle, name)
        records: _Records
        match kind:
            case InputFormat.TEXT:
                records = _text_records(lines, name, template)
            case InputFormat.JSONL:
                records = _json_records(lines)
            case InputFormat.CSV | InputFormat.TSV:
                delimiter = "," if kind is InputFormat.CSV else "\t"
                records = _csv_records(lines, name, delimiter, template, column)
        for place, fields in records:
            yield item_of(fields, place, template, column)


def _lines(handle: IO[bytes], name: str) -> _Lines:
    """Yield each line with its end. Raises InputError where it is not text in UTF-8."""
    for number in itertools.count(1):
        place = Place(name, number)
        try:
            raw = handle.readline()
            line = (raw.removeprefix(BOM) if number == 1 else raw).decode()
        except UnicodeDecodeError as error:
            raise place.error(f"expected UTF-8, got: {_bad_byte(error)}; convert the file") from error
        except OSError as error:
            raise place.error(f"expected to read on, got: {_reason(error)}") from error
        if not raw:
            return
        if "\x00" in line:
            raise place.error("expected text, got: a NUL character; remove it (UTF-16? convert it to UTF-8)")
        yield place, line


def _without_blank_end(records: Iterable[tuple[Place, _T]], way_out: str) -> Iterator[tuple[Place, _T]]:
    """Leave out the blank records at the end; one that others follow is an InputError."""
    first_blank: Place | None = None
    for place, record in records:
        if _is_blank(record):
            first_blank = first_blank or place
        elif first_blank is not None:
            raise first_blank.error(f"expected a prompt, got: an empty line; {way_out}")
        else:
            yield place, record


def _is_blank(record: str | list[str]) -> bool:
    """Return whether nothing is there; a row of one empty cell is how CSV reads a line of spaces."""
    return not (record.strip() if isinstance(record, str) else len(record) > 1 or "".join(record).strip())


def _text_records(lines: _Lines, name: str, template: Template | None) -> _Records:
    if template is not None:
        template.check_columns(["prompt"], name)
    for place, line in _without_blank_end(lines, "remove it, or use JSONL for prompts of several lines"):
        yield place, {"prompt": line.removesuffix("\n").removesuffix("\r")}


def _json_records(lines: _Lines) -> _Records:
    for place, line in _without_blank_end(lines, "remove it"):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            msg = f"expected one whole JSON object, got: {error.msg} (character {error.colno}); mend the line"
            raise place.error(msg) from error
        if not isinstance(fields, dict):
            raise place.error(f'expected a JSON object, got: {shown(fields)}; write {{"prompt": …}}')
        check_storable(fields, place)
        if not HOLDS_DIGITS.issuperset(map(type, fields.values())) and may_be_lost(fields):
            _check_whole_numbers(line, place)
        yield place, fields


class _Digits(str):
    """A whole number as it stands in the file."""

    __slots__ = ()


def _check_whole_numbers(line: str, place: Place) -> None:
    """Raise InputError for the first whole number of a record that has more than 64 bits."""
    for name, leaf in leaves(json.loads(line, parse_int=_Digits)):
        if isinstance(leaf, _Digits) and not LEAST_WHOLE <= int(leaf) <= MOST_WHOLE:
            raise place.error(
                f"expected {shown(name)} to be a whole number of at most 64 bits, got: {shortened(leaf)}; "
                f"put it in quotes"
            )


def _csv_records(
    lines: _Lines, name: str, delimiter: str, template: Template | None, column: str | None
) -> _Records:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    rows = _without_blank_end(_csv_rows(lines, name, delimiter), "remove it")
    place, header = next(rows, (None, None))
    if place is None or header is None:
        raise InputError("expected a header row, got: an empty file; name the columns in line 1", source=name)
    _check_header(header, place)
    if template is not None:
        template.check_columns(header, name)
    elif column not in header:
        msg = f"{name}: expected a column {shown(column)}, got: {names(header)}"
        raise UsageError(f"{msg}; set --prompt-column or --template")
    for place, row in rows:
        if len(row) != len(header):
            raise place.error(
                f"expected {len(header)} cells as in line 1, got: {len(row)}; mend or quote them"
            )
        yield place, dict(zip(header, row, strict=True))


def _csv_rows(lines: _Lines, name: str, delimiter: str) -> Iterator[tuple[Place, list[str]]]:
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    while True:
        place = Place(name, reader.line_num + 1)
        try:
            row = next(reader, None)
        except csv.Error as error:
            msg = f"expected a well-formed record, got: {error}; close every quote, double those within"
            raise place.error(msg) from error
        if row is None:
            return
        yield place, row


def _check_header(header: list[str], place: Place) -> None:
    if not all(name.strip() for name in header):
        raise place.error(f"expected a name for every column, got: {names(header)}; fill the empty one in")
    if len(set(header)) < len(header):
        twice = dict.fromkeys(name for name in header if header.count(name) > 1)
        raise place.error(f"expected different column names, got twice: {names(twice)}; rename one")
