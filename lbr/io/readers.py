"""Read prompts from text, JSONL, CSV and TSV files and streams, one line or record in memory at a time."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
import stat
from collections import Counter, deque
from contextlib import contextmanager, suppress
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from lbr.core.errors import InputError, UsageError
from lbr.core.text import LONG, pluralize
from lbr.io.records import EmptyPromptError, Place, Template, check_storable, item_of, leaves, names, shortened, shown
from lbr.io.writers import atomic_path, named_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TextIO

    from lbr.core.types import Item
    from lbr.io.records import Fields

    Records = Iterator[tuple[Place, str, Any]]
    """Place, text and parsed form of each record."""

STDIN = "-"
STDIN_FILE = 0
EXACT_TYPES = frozenset({str, int, bool, type(None)})
"""Types that keep all digits of a number; most records have no other values."""
DELIMITER_NAMES = {"\\t": "\t", "tab": "\t"}
SHOWN_BAD = 5
MAX_LINE = 2**28
"""The most characters of a line, and of a cell."""
SAMPLE_CHARACTERS = 2**16
DELIMITERS = ",;\t|"
AGREEING = 0.9
"""The share of rows that have as many cells as the header."""


class InputFormat(StrEnum):
    """How an input holds its prompts."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"


DELIMITER_OF = {InputFormat.CSV: None, InputFormat.TSV: "\t"}
FORMAT_OF_ENDING = {f".{format_}": format_ for format_ in InputFormat} | {".ndjson": InputFormat.JSONL}
INSTEAD_OF = {
    ".json": "write it as JSONL, one object per line (jq -c '.[]' does that), and name it .jsonl",
    ".parquet": "write it as JSONL or CSV",
    ".xlsx": "save it as CSV",
    ".gz": "unpack it first",
}


class BadRows:
    """Rows that cannot be used: refused in one message, or left out, counted and written to a file."""

    def __init__(self, *, skip_bad: str | None = None, skip_empty: bool = False, at_once: bool = False) -> None:
        self.count = 0
        self.empty = 0
        self._path = skip_bad
        self._skip_empty = skip_empty
        self._at_once = at_once
        self._file: IO[bytes] | None = None
        self._first: list[InputError] = []

    def add(self, error: InputError, text: str) -> None:
        """Count a row, and write it to the file if there is one. Raises its error if reading stops at once."""
        if self._skip_empty and isinstance(error, EmptyPromptError):
            self.empty += 1
            return
        self.count += 1
        if self._file is not None:
            # Bytes that cannot be decoded are written as escapes.
            readable = text.rstrip("\r\n").encode(errors="surrogateescape").decode(errors="backslashreplace")
            row = {"source": error.source, "line": error.line, "reason": error.message, "text": readable}
            with named_errors(str(self._path)):
                self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                self._file.flush()
        elif len(self._first) < SHOWN_BAD:
            self._first.append(error)
            if self._at_once:
                raise self._refused()

    def through(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; after the last one, publish the file, or raise InputError for the bad rows."""
        if self._path is None:
            yield from items
        else:
            with atomic_path(self._path) as temporary, temporary.open("wb") as self._file:
                yield from items
        if self._first:
            raise self._refused()

    def _refused(self) -> InputError:
        first, *rest = self._first
        more = "" if self.count == 1 else f" (and {pluralize(self.count - 1, 'more bad row')})"
        lines = [first.message + more, *map(str, rest)]
        if all(isinstance(error, EmptyPromptError) for error in self._first):
            lines.append(f"Use --skip-empty, or fill {'it' if self.count == 1 else 'them'} in")
        elif self.count > 1:
            lines.append("Fix them, or leave them out with --skip-bad FILE")
        message = ("\n" if self.count > 1 else ". ").join(lines)
        return InputError(message, source=first.source, line=first.line)


def read_items(
    sources: Sequence[str],
    *,
    format: InputFormat | None = None,  # noqa: A002 - the name of the flag
    template: str | None = None,
    prompt_column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    bad: BadRows | None = None,
) -> Iterator[Item]:
    """Return the items of all sources, in order; `-` is stdin.

    `format` None goes by the ending of each name, `delimiter` None by the first lines of each CSV file, `encoding`
    None by its BOM. `template` is Jinja, rendered with the fields of each record. Raises UsageError at once for
    sources, flags or a template that cannot be used; while reading, UsageError for columns that are not there, and
    at the end InputError for the rows that `bad` refuses.
    """
    if template is not None and prompt_column is not None:
        raise UsageError("--template and --prompt-column exclude each other; name the column in the template")
    check_sources(sources)
    formats = [format or _format_of(source) for source in sources]
    if prompt_column is not None and InputFormat.TEXT in formats:
        source = sources[formats.index(InputFormat.TEXT)]
        raise UsageError(f"--prompt-column needs columns, and {source} is read as text; set --format")
    if delimiter is not None and DELIMITER_OF.keys().isdisjoint(formats):
        raise UsageError(f"--delimiter is for CSV, and {sources[0]} is read as {formats[0]}; set --format csv")
    character = DELIMITER_NAMES.get(delimiter or "", delimiter)
    if character is not None and (len(character) != 1 or character in '"\r\n\x00'):
        raise UsageError(f"expected --delimiter to be one character, or tab, got: {shown(delimiter)}")
    try:
        "a".encode(encoding or "utf-8")
    except (LookupError, ValueError) as error:
        msg = f"expected --encoding to be a text encoding, for example cp1252, got: {shown(encoding)}"
        raise UsageError(f"{msg} ({error})") from error
    bad = BadRows() if bad is None else bad
    compiled = None if template is None else Template(template)
    read = partial(_read, template=compiled, column=prompt_column, delimiter=character, encoding=encoding, bad=bad)
    return bad.through(itertools.chain.from_iterable(map(read, sources, formats)))


def check_sources(sources: Sequence[str]) -> None:
    """Raise UsageError for the first source that cannot be read; nothing is taken from a stream."""
    if not sources:
        raise UsageError("no input given; name a file, or - for stdin")
    if sources.count(STDIN) > 1:
        raise UsageError("- (stdin) can be read only once, and is named twice")
    for source in sources:
        if source != STDIN:
            try:
                mode = os.stat(source).st_mode
                if stat.S_ISDIR(mode):
                    raise UsageError(f"{source} is a folder; name the files in it")
                if stat.S_ISREG(mode):
                    Path(source).open("rb").close()
            except (OSError, ValueError) as error:
                raise _unreadable(source, error) from error


def is_stream(source: str) -> bool:
    """Return whether a source can be read only once: stdin, a pipe, a device."""
    return source == STDIN or not os.path.isfile(source)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _unreadable(source: str, error: Exception) -> UsageError:
    return UsageError(f"cannot read {source!r}: {_reason(error)}; check the path and its permissions")


def _format_of(source: str) -> InputFormat:
    ending = Path(source).suffix.lower()
    if instead := INSTEAD_OF.get(ending):
        raise UsageError(f"cannot read {source}: lbr reads text, JSONL, CSV and TSV; {instead}")
    return FORMAT_OF_ENDING.get(ending, InputFormat.TEXT)


@contextmanager
def _opened(source: str, encoding: str | None, *, is_table: bool) -> Iterator[TextIO]:
    """Open a source as text; bytes that cannot be decoded become surrogates, as in PEP 383. A BOM decides."""
    try:
        handle = open(STDIN_FILE, "rb", closefd=False) if source == STDIN else open(source, "rb")  # noqa: SIM115
        head = handle.peek(3)
    except OSError as error:
        raise _unreadable(source, error) from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif encoding is None or head.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    # The csv module finds the ends of rows itself; elsewhere, a carriage return alone ends no line.
    with io.TextIOWrapper(handle, encoding, "surrogateescape", newline="" if is_table else "\n") as text:
        yield text


def _read(
    source: str,
    kind: InputFormat,
    *,
    template: Template | None,
    column: str | None,
    delimiter: str | None,
    encoding: str | None,
    bad: BadRows,
) -> Iterator[Item]:
    name = "stdin" if source == STDIN else source
    if column is None and kind is not InputFormat.JSONL:
        column = "prompt"
    with _opened(source, encoding, is_table=kind in DELIMITER_OF) as text:
        lines, check = _lines(text, name), partial(_check_text, encoding=text.encoding.removesuffix("-sig"))
        fields_of: Callable[[Any, Place], Fields] = _json_fields
        if kind in DELIMITER_OF:
            table = Table(lines, name, delimiter or DELIMITER_OF[kind], template, column, check)
            records, fields_of = table.records, table.fields
        else:
            numbered = enumerate(lines, start=1)
            records = ((Place(name, at), line, line) for at, line in numbered if not line.isspace())
            if kind is InputFormat.TEXT:
                fields_of = _text_fields
                if template is not None:
                    template.check_columns(["prompt"], name)
        for place, line, record in records:
            try:
                if not line.isascii() or "\x00" in line:
                    check(line, place)
                item = item_of(fields_of(record, place), place, template, column)
            except InputError as error:
                bad.add(error, line)
            else:
                yield item


def _lines(text: TextIO, name: str) -> Iterator[str]:
    """Yield each line with its end. Raises InputError if a line is too long or cannot be read."""
    for number in itertools.count(1):
        try:
            line = text.readline(MAX_LINE + 1)
        except (OSError, UnicodeError) as error:
            raise Place(name, number).error(f"cannot be read: {_reason(error)}") from error
        if not line:
            return
        if len(line) > MAX_LINE:
            msg = f"the line is longer than {MAX_LINE >> 20} MB; break the input into lines"
            raise Place(name, number).error(msg)
        yield line


def _check_text(text: str, place: Place, encoding: str) -> None:
    """Raise InputError for bytes that could not be decoded, and for NUL characters."""
    if "\x00" in text:
        raise place.error("the line has a NUL character; remove it, or set --encoding (utf-16-le?)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = len(text[: error.start].encode(encoding, "surrogateescape")) + 1
        raise place.error(
            f"the line is not {encoding.upper()}: it has 0x{ord(text[error.start]) & 0xFF:02x} as byte {at}; name the "
            f"file's encoding, for example --encoding cp1252"
        ) from error


def _text_fields(line: str, _: Place) -> Fields:
    return {"prompt": line.removesuffix("\n").removesuffix("\r")}


def _json_fields(line: str, place: Place) -> Fields:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        not_json = re.search(r"\bNaN\b|\bInfinity\b", line)
        hint = f"JSON has no {not_json[0]}: write null instead" if not_json else "fix it"
        with suppress(ValueError, RecursionError):
            if re.search("[\ud800-\udfff]", json.dumps(json.loads(line), ensure_ascii=False)):
                hint = "it has half a surrogate pair, which is not Unicode: remove it"
        raise place.error(f"the line is not a JSON object: {error.msg} (character {error.colno}); {hint}") from error
    if not isinstance(fields, dict):
        raise place.error(f'expected a JSON object, got: {shown(fields)}; write {{"prompt": …}}')
    check_storable(fields, place)
    # orjson makes floats of whole numbers with more than 64 bits.
    if not EXACT_TYPES.issuperset(map(type, fields.values())) and LONG.search(line):
        for name, leaf in leaves(json.loads(line, parse_int=Decimal)):
            if isinstance(leaf, Decimal) and not -(2**63) <= leaf < 2**64:
                raise place.error(
                    f"the number in {shown(name)} has more than 64 bits: {shortened(str(leaf))}; put it in quotes"
                )
    return fields


class Table:
    """A CSV file: its header, and its rows as `records`.

    Raises InputError if the header cannot be used, UsageError for a column that is not there.
    """

    def __init__(
        self,
        lines: Iterator[str],
        name: str,
        delimiter: str | None,
        template: Template | None,
        column: str | None,
        check_text: Callable[[str, Place], None],
    ) -> None:
        csv.field_size_limit(MAX_LINE)
        sample, room = [], SAMPLE_CHARACTERS
        while room > 0 and (line := next(lines, None)) is not None:
            sample.append(line)
            room -= len(line)
        self._delimiter = delimiter or _likely_delimiter(sample, template.columns if template else {column})
        self.records = _records(itertools.chain(sample, lines), name, self._delimiter, sample)
        place, text, header = next(self.records, (None, "", []))
        if place is None:
            raise InputError("the file is empty; the first line must name the columns", source=name)
        check_text(text, place)
        if isinstance(header, InputError):
            raise header
        self._line = place.line
        self._named = _count_named(header)
        self._header = [cell if cell.strip() else f"column_{n}" for n, cell in enumerate(header, start=1)]
        if twice := [one for one, count in Counter(self._header).items() if count > 1]:
            raise place.error(f"several columns have the same name: {names(twice)}; rename them")
        hint = f" (delimiter {shown(self._delimiter)})"
        if len(self._header) == 1:
            hint += "; set --delimiter if these are several columns"
        if template is not None:
            template.check_columns(self._header, name, hint)
        elif column not in self._header:
            msg = f"{name}: there is no column {shown(column)}; there are: {names(self._header)}{hint}"
            raise UsageError(f"{msg}; set --prompt-column or --template")

    def fields(self, cells: list[str] | InputError, place: Place) -> Fields:
        """Return the cells of a row by column name, without empty ones in unnamed columns at its end. Raises InputError."""
        if isinstance(cells, InputError):
            raise cells
        if not self._named <= len(cells) <= len(self._header):
            msg = f"expected {pluralize(len(self._header), 'cell')} as in line {self._line}, got: {len(cells)}"
            other = "tab (this file has one column)" if len(self._header) == 1 else "to a different one"
            way_out = f"put cells that hold the delimiter {shown(self._delimiter)} in quotes"
            raise place.error(f"{msg}; {way_out}, or set --delimiter {other}")
        while len(cells) > self._named and not cells[-1]:
            cells.pop()
        return dict(zip(self._header, cells, strict=False))


def _records(lines: Iterator[str], name: str, delimiter: str, sample: list[str]) -> Records:
    """Yield each row, or its error; skip blank lines.

    After an error, reading continues with the next line: an unclosed quote swallows everything after it.
    """
    spaced = _has_spaces_after(delimiter, sample)
    again: deque[str] = deque()
    held: list[str] = []

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            held.append(line)
            yield line

    number, reader = 1, None
    while True:
        place = Place(name, number)
        row: list[str] | InputError | None
        try:
            reader = reader or csv.reader(feed(), delimiter=delimiter, skipinitialspace=spaced, strict=True)
            row = next(reader, None)
        except csv.Error as error:
            reader = None
            way_out = "close every quote, double those within a cell, and put cells with line breaks in quotes"
            row = place.error(f"the row is not valid CSV: {error}; {way_out}")
            again.extendleft(reversed(held[1:]))
            del held[1:]
        if row is None:
            return
        if isinstance(row, InputError) or len(row) > 1 or not held[0].isspace():
            yield place, "".join(held), row
        number += len(held)
        held.clear()


def _rows_of(lines: list[str], delimiter: str, *, spaced: bool = False) -> Iterator[list[str]]:
    """Yield the rows of a sample, up to the first that cannot be read."""
    with suppress(csv.Error):
        for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced):
            if len(row) > 1 or "".join(row).strip():
                yield row


def _likely_delimiter(lines: list[str], wanted: set[str | None] | set[str]) -> str:
    """Return the delimiter of a CSV file, judged by its first lines.

    The first that gives the wanted columns; else the first that makes several columns and gives nearly all rows the
    same number of cells; else a comma.
    """
    fitting = []
    for delimiter in DELIMITERS:
        header, *rows = list(_rows_of(lines, delimiter, spaced=True)) or [[]]
        if wanted and wanted <= {name.strip() for name in header}:
            return delimiter
        named = _count_named(header)
        agreeing = sum(named <= len(row) <= len(header) for row in rows)
        if len(header) > 1 and agreeing >= AGREEING * len(rows):
            fitting.append(delimiter)
    return fitting[0] if fitting else ","


def _has_spaces_after(delimiter: str, sample: list[str]) -> bool:
    """Return whether spaces after delimiters belong to no cell: all header names have one, or a quote follows one."""
    header = next(_rows_of(sample, delimiter), [])
    if len(header) > 1 and all(name.startswith(" ") for name in header[1:]):
        return True
    # A quote that ends a cell, or is part of one, is followed by a delimiter, the end of the line or another quote.
    begin = re.compile(rf'{re.escape(delimiter)} +"[^"\r\n{re.escape(delimiter)}]')
    return any(map(begin.search, sample))


def _count_named(header: list[str]) -> int:
    """Return the number of columns up to the last one that has a name."""
    return max((place for place, name in enumerate(header, start=1) if name.strip()), default=0)
