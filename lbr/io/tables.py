"""CSV as pandas, spreadsheets and people write it: the delimiter, the header, and the rows under it."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from typing import TYPE_CHECKING

from lbr.core.errors import InputError, UsageError
from lbr.core.plurals import counted
from lbr.io.records import Place, names, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from lbr.io.records import Fields, Template

    Records = Iterator[tuple[Place, str, Any]]
    """Place, text and parsed form of each record."""

MAX_LINE = 2**28
"""The most characters of a line, and of a cell."""
SAMPLE_CHARACTERS = 2**16
DELIMITERS = ",;\t|"
AGREEING = {False: 0.9, True: 0.5}
"""The share of rows that must have as many cells as the header; a header with the wanted columns needs less proof."""


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
    ) -> None:
        csv.field_size_limit(MAX_LINE)
        sample, whole = _sample(lines)
        wanted = {column} if template is None else template.columns
        self._delimiter = delimiter or _likely_delimiter(sample, wanted, whole=whole)
        spaced = _begins_with_spaces(next(_rows_of(sample, self._delimiter), []))
        self.records = _records(itertools.chain(sample, lines), name, self._delimiter, spaced=spaced)
        first = next(self.records, None)
        if first is None:
            raise InputError(
                "expected a header row, got: an empty file; name the columns in line 1", source=name
            )
        place, _, header = first
        self._line = place.line
        self._header = _names_of(_cells(header, place), place)
        self._named = _named(header)
        self._check(name, template, column)

    def _check(self, name: str, template: Template | None, column: str | None) -> None:
        hint = f" (delimiter {shown(self._delimiter)})"
        if len(self._header) == 1:
            hint += "; set --delimiter if these are several columns"
        if template is not None:
            template.check_columns(self._header, name, hint)
        elif column not in self._header:
            msg = f"{name}: expected a column {shown(column)}, got: {names(self._header)}{hint}"
            raise UsageError(f"{msg}; set --prompt-column or --template")

    def fields(self, row: list[str] | csv.Error, place: Place) -> Fields:
        """Return the cells of a row by column name, without empty ones in unnamed columns at its end. Raises InputError."""
        cells = _cells(row, place)
        if not self._named <= len(cells) <= len(self._header):
            msg = f"expected {counted(len(self._header), 'cell')} as in line {self._line}, got: {len(cells)}"
            other = "tab (this file has one column)" if len(self._header) == 1 else "to a different one"
            way_out = f"put cells that hold the delimiter {shown(self._delimiter)} in quotes"
            raise place.error(f"{msg}; {way_out}, or set --delimiter {other}")
        while len(cells) > self._named and not cells[-1]:
            cells.pop()
        return dict(zip(self._header, cells, strict=False))


def _cells(row: list[str] | csv.Error, place: Place) -> list[str]:
    if isinstance(row, csv.Error):
        msg = f"expected a well-formed record, got: {row}; close every quote, double those within"
        raise place.error(msg) from row
    return row


def _records(lines: Iterator[str], name: str, delimiter: str, *, spaced: bool) -> Records:
    """Yield each row, or its csv.Error; skip blank lines."""
    held: list[str] = []

    def feed() -> Iterator[str]:
        for line in lines:
            held.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, skipinitialspace=spaced, strict=True)
    while True:
        held.clear()
        place = Place(name, reader.line_num + 1)
        row: list[str] | csv.Error | None
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = error
        if row is None:
            return
        text = "".join(held)
        if isinstance(row, csv.Error) or len(row) > 1 or not text.isspace():
            yield place, text, row


def _sample(lines: Iterator[str]) -> tuple[list[str], bool]:
    """Take the first lines. Return them, and True if there are no more."""
    sample, room = [], SAMPLE_CHARACTERS
    for line in lines:
        sample.append(line)
        room -= len(line)
        if room <= 0:
            return sample, False
    return sample, True


def _rows_of(lines: Iterable[str], delimiter: str, *, spaced: bool = False) -> Iterator[list[str]]:
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced)
    return (row for row in rows if len(row) > 1 or "".join(row).strip())


def _likely_delimiter(lines: list[str], wanted: set[str | None] | set[str], *, whole: bool) -> str:
    """Return the delimiter of a CSV file, judged by its first lines.

    It is a comma if that gives the wanted columns, or else the first one that makes several columns and gives nearly
    all rows the same number of cells. One that gives the wanted columns is preferred. Without any, it is a comma.
    """
    fitting = []
    for delimiter in DELIMITERS:
        rows = list(_rows_of(lines, delimiter, spaced=True))
        if not whole and len(rows) > 1:
            rows.pop()  # it may be half a row
        header = rows[0] if rows else []
        named = _named(header)
        has_wanted = bool(wanted) and wanted <= {name.strip() for name in header}
        if delimiter == "," and has_wanted:
            return delimiter
        agreeing = sum(named <= len(row) <= len(header) for row in rows)
        if len(header) > 1 and agreeing >= AGREEING[has_wanted] * len(rows):
            fitting.append((has_wanted, delimiter))
    return max(fitting, key=lambda one: one[0])[1] if fitting else ","


def _begins_with_spaces(header: list[str]) -> bool:
    """Return True if every delimiter of a header has a space after it, as in `id, prompt`."""
    return len(header) > 1 and all(name.startswith(" ") for name in header[1:])


def _named(header: list[str]) -> int:
    """Return the number of columns up to the last one that has a name."""
    return max((place for place, name in enumerate(header, start=1) if name.strip()), default=0)


def _names_of(header: list[str], place: Place) -> list[str]:
    """Return the names of the columns, `column_1` for an unnamed one. Raises InputError for duplicate names."""
    taken = set(header)
    if twice := [name for name, count in Counter(header).items() if count > 1 and name.strip()]:
        raise place.error(f"expected different column names, got twice: {names(twice)}; rename one")
    found = []
    for number, given in enumerate(header, start=1):
        name = given if given.strip() else f"column_{number}"
        while name in taken and name != given:
            name += "_"
        found.append(name)
    return found
