"""Read prompts from files and streams, one line or record in memory at a time; text formats may be compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from lbr.core.errors import InputError, UsageError
from lbr.core.text import pluralize
from lbr.io.csv import MAX_LINE, read_csv
from lbr.io.parquet import read_parquet
from lbr.io.records import EmptyPromptError, Fields, Place, Template, check_storable, item_of, names, shown
from lbr.io.samples import ALL
from lbr.io.writers import atomic_path, named_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lbr.core.types import Item
    from lbr.io.samples import Sample

Records = Iterator[tuple[Place, str, Fields | InputError]]
"""Place, text and fields of each record, or its error."""

STDIN = "-"
STDIN_FILE = 0
DELIMITER_NAMES = {"\\t": "\t", "tab": "\t"}
SHOWN_BAD = 5


class InputFormat(StrEnum):
    """How an input holds its prompts."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"


UNREADABLE = (OSError, UnicodeError, EOFError, zlib.error)
GZIP, GZIP_ENDING = b"\x1f\x8b", ".gz"
DELIMITER_OF = {InputFormat.CSV: None, InputFormat.TSV: "\t"}
FORMAT_OF_ENDING = {f".{format_}": format_ for format_ in InputFormat}
FORMAT_OF_ENDING |= {".ndjson": InputFormat.JSONL, ".pq": InputFormat.PARQUET}
INSTEAD_OF = {
    ".json": "write it as JSONL, one object per line (jq -c '.[]' does that), and name it .jsonl",
    ".parquet.gz": "unpack it, because Parquet is compressed inside",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z"), "unpack it, or compress it with gzip instead"),
}


class BadRows:
    """Rows that cannot be used: refused in one message, or left out, counted and written to a file.

    `empty` counts those that `skip_empty` leaves out, `count` all others, `blank` those of them without a prompt. With
    `dry`, nothing is written, and the error is not raised: `refusal` returns it.
    """

    def __init__(
        self, *, skip_bad: str | None = None, skip_empty: bool = False, at_once: bool = False, dry: bool = False
    ) -> None:
        self.count = 0
        self.empty = 0
        self.blank = 0
        self._path = skip_bad
        self._skip_empty = skip_empty
        self._at_once = at_once
        self._dry = dry
        self._file: IO[bytes] | None = None
        self._first: list[InputError] = []

    def add(self, error: InputError, text: str) -> None:
        """Count a row, and write it to the file if there is one. Raises its error if reading stops at once."""
        is_empty = isinstance(error, EmptyPromptError)
        if self._skip_empty and is_empty:
            self.empty += 1
            return
        self.count += 1
        self.blank += is_empty
        if self._file is not None:
            # Bytes that cannot be decoded are written as escapes.
            readable = text.rstrip("\r\n").encode(errors="surrogateescape").decode(errors="backslashreplace")
            row = {"source": error.source, "line": error.line, "reason": error.message, "text": readable}
            with named_errors(str(self._path)):
                self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                self._file.flush()
        elif len(self._first) < SHOWN_BAD:
            self._first.append(error)
            if self._at_once and (refusal := self.refusal()):
                raise refusal

    def through(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; after the last one, publish the file, or raise InputError for the bad rows."""
        if self._path is None or self._dry:
            yield from items
        else:
            with atomic_path(self._path) as temporary, temporary.open("wb") as self._file:
                yield from items
        if not self._dry and (refusal := self.refusal()):
            raise refusal

    def refusal(self) -> InputError | None:
        """Return the error for the bad rows so far; None without any, or if they go to a file."""
        if not self._first or self._path is not None:
            return None
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
    id_column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    bad: BadRows | None = None,
    sample: Sample = ALL,
    fit: Callable[[Item], Item] = lambda item: item,
) -> Iterator[Item]:
    """Return the items of all sources, in order, or a sample of them; `-` is stdin.

    `format` None goes by the ending of each name, `delimiter` None by the first lines of each CSV file, `encoding`
    None by its BOM. `template` is Jinja, rendered with the fields of each record. `fit` may change or refuse an item
    that has settings of its own. Raises UsageError at once for sources, flags or a template that cannot be used; while
    reading, UsageError for columns that are not there, and at the end InputError for the rows that `bad` refuses.
    """
    if template is not None and prompt_column is not None:
        raise UsageError("--template and --prompt-column exclude each other; name the column in the template")
    check_sources(sources)
    formats = [format or format_of(source) for source in sources]
    for flag, column in (("--prompt-column", prompt_column), ("--id-column", id_column)):
        if column is not None and InputFormat.TEXT in formats:
            source = sources[formats.index(InputFormat.TEXT)]
            raise UsageError(f"{flag} needs columns, and {source} is read as text; set --format")
    if id_column is not None and id_column == prompt_column:
        raise UsageError(f"--prompt-column and --id-column are the same, {shown(id_column)}; name two columns")
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

    def items(source: str, kind: InputFormat) -> Iterator[Item]:
        column = prompt_column or (None if kind in {InputFormat.JSONL, InputFormat.PARQUET} else "prompt")
        separator = character or DELIMITER_OF.get(kind)
        return _read(Input(source, compiled, column, id_column, separator, encoding), kind, bad, fit)

    return bad.through(sample.of(itertools.chain.from_iterable(map(items, sources, formats))))


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


def _unreadable(source: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"cannot read {source!r}: {reason}; check the path and its permissions")


def _broken(place: Place, error: Exception) -> InputError:
    cut_off = "the compressed file is cut off; copy it again" if isinstance(error, EOFError) else None
    return place.error(f"cannot be read: {cut_off or getattr(error, 'strerror', None) or error}")


def format_of(source: str) -> InputFormat:
    """Return the format that a source's name asks for. Raises UsageError for one that is not read."""
    name = Path(source).name.lower()
    unpacked = Path(name.removesuffix(GZIP_ENDING)).suffix
    instead = INSTEAD_OF.get("".join(Path(name).suffixes[-2:])) or INSTEAD_OF.get(unpacked)
    if instead:
        raise UsageError(f"cannot read {source}: lbr reads text, JSONL, CSV, TSV and Parquet; {instead}")
    return FORMAT_OF_ENDING.get(unpacked, InputFormat.TEXT)


@dataclass(slots=True)
class Input:
    """A source and how it is read; `encoding` is None until a BOM or the default decides."""

    source: str
    template: Template | None
    column: str | None
    id_column: str | None
    delimiter: str | None
    encoding: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return "stdin" if self.source == STDIN else self.source

    def check_columns(self, columns: Collection[str], hint: str = "") -> None:
        """Raise UsageError if a column that the prompt or the id needs is not there."""
        flags = {"--id-column": self.id_column}
        if self.template is not None:
            self.template.check_columns(columns, self.name, hint)
        else:
            flags["--prompt-column or --template"] = self.column
        for flag, column in flags.items():
            if column is not None and column not in columns:
                msg = f"{self.name}: there is no column {shown(column)}; there are: {names(columns)}{hint}"
                raise UsageError(f"{msg}; set {flag}")

    def lines(self, *, newline: str = "\n") -> Iterator[str]:
        """Yield each line with its end; bytes that cannot be decoded become surrogates, as in PEP 383.

        Raises UsageError if the source cannot be opened, InputError for a line that is too long or cannot be read.
        """
        packed: Any
        try:
            is_file = self.source != STDIN
            packed = file = open(self.source if is_file else STDIN_FILE, "rb", closefd=is_file)  # noqa: SIM115
            head = file.peek(3)
        except OSError as error:
            raise _unreadable(self.source, error) from error
        if head.startswith(GZIP):
            packed = gzip.GzipFile(fileobj=file)
            try:
                head = packed.peek(3)
            except UNREADABLE as error:
                file.close()
                raise _broken(Place(self.name, 1), error) from error
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.encoding = "utf-16"
        elif self.encoding is None or head.startswith(codecs.BOM_UTF8):
            self.encoding = "utf-8-sig"
        with file, io.TextIOWrapper(packed, self.encoding, "surrogateescape", newline=newline) as text:
            readline, most = text.readline, MAX_LINE + 1
            for number in itertools.count(1):
                try:
                    line = readline(most)
                except UNREADABLE as error:
                    raise _broken(Place(self.name, number), error) from error
                if not line:
                    return
                if len(line) == most:
                    msg = f"the line is longer than {MAX_LINE >> 20} MB; break the input into lines"
                    raise Place(self.name, number).error(msg)
                yield line

    def check(self, text: str, place: Place) -> None:
        """Raise InputError for bytes that could not be decoded, and for NUL characters."""
        if "\x00" in text:
            raise place.error("the line has a NUL character; remove it, or set --encoding (utf-16-le?)")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            encoding = (self.encoding or "utf-8").removesuffix("-sig")
            at = len(text[: error.start].encode(encoding, "surrogateescape")) + 1
            raise place.error(
                f"the line is not {encoding.upper()}: it has 0x{ord(text[error.start]) & 0xFF:02x} as byte {at}; name "
                f"the file's encoding, for example --encoding cp1252"
            ) from error


def _read(given: Input, kind: InputFormat, bad: BadRows, fit: Callable[[Item], Item]) -> Iterator[Item]:
    template, column, id_column = given.template, given.column, given.id_column
    for place, text, fields in READERS[kind](given):
        try:
            if not text.isascii() or "\x00" in text:
                given.check(text, place)
            if isinstance(fields, InputError):
                raise fields
            item = item_of(fields, place, template, column, id_column)
            if item.prompt.settings is not None:
                item = fit(item)
        except InputError as error:
            bad.add(error, text)
        else:
            yield item


def _read_text(given: Input) -> Records:
    if given.template is not None:
        given.template.check_columns(["prompt"], given.name)
    name = given.name
    for number, line in enumerate(given.lines(), start=1):
        if not line.isspace():
            yield Place(name, number), line, {"prompt": line.removesuffix("\n").removesuffix("\r")}


def _read_jsonl(given: Input) -> Records:
    name = given.name
    for number, line in enumerate(given.lines(), start=1):
        if not line.isspace():
            place = Place(name, number)
            try:
                yield place, line, _json_fields(line, place)
            except InputError as error:
                yield place, line, error


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
    check_storable(fields, place, line)
    return fields


READERS: dict[InputFormat, Callable[[Input], Records]] = {
    InputFormat.TEXT: _read_text,
    InputFormat.JSONL: _read_jsonl,
    InputFormat.CSV: read_csv,
    InputFormat.TSV: read_csv,
    InputFormat.PARQUET: read_parquet,
}
"""What yields place, text and fields of each record of a source, or its error instead of the fields."""
