"""CSV as pandas, spreadsheets and people write it: the delimiter, the header, and the rows under it."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from lbr.core.errors import InputError, UsageError
from lbr.core.text import pluralize
from lbr.io.records import Place, names, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from lbr.io.records import Fields, Template

    Records = Iterator[tuple[Place, str, Any]]
    """Place, text and parsed form of each record."""

MAX_LINE = 2**28
"""The most characters of a line, and of a cell."""
SAMPLE_CHARACTERS = 2**16
DELIMITERS = ",;\t|"
AGREEING = {False: 0.9, True: 0.5}
"""The share of rows with as many cells as the header; a header with the wanted columns needs less evidence."""


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
        sample, whole = _sample(lines)
        wanted = {column} if template is None else template.columns
        self._delimiter = delimiter or _likely_delimiter(sample, wanted, whole=whole)
        spaced = _has_spaces_after(self._delimiter, sample)
        self.records = _records(itertools.chain(sample, lines), name, self._delimiter, spaced=spaced)
        first = next(self.records, None)
        if first is None:
            raise InputError("the file is empty; the first line must name the columns", source=name)
        place, text, header = first
        check_text(text, place)
        self._line = place.line
        self._header = _column_names(_cells(header, place), place)
        self._named = _count_named(header)
        hint = f" (delimiter {shown(self._delimiter)})"
        if len(self._header) == 1:
            hint += "; set --delimiter if these are several columns"
        if template is not None:
            template.check_columns(self._header, name, hint)
        elif column not in self._header:
            msg = f"{name}: there is no column {shown(column)}; there are: {names(self._header)}{hint}"
            raise UsageError(f"{msg}; set --prompt-column or --template")

    def fields(self, row: list[str] | csv.Error, place: Place) -> Fields:
        """Return the cells of a row by column name, without empty ones in unnamed columns at its end. Raises InputError."""
        cells = _cells(row, place)
        if not self._named <= len(cells) <= len(self._header):
            msg = f"expected {pluralize(len(self._header), 'cell')} as in line {self._line}, got: {len(cells)}"
            other = "tab (this file has one column)" if len(self._header) == 1 else "to a different one"
            way_out = f"put cells that hold the delimiter {shown(self._delimiter)} in quotes"
            raise place.error(f"{msg}; {way_out}, or set --delimiter {other}")
        while len(cells) > self._named and not cells[-1]:
            cells.pop()
        return dict(zip(self._header, cells, strict=False))


def _cells(row: list[str] | csv.Error, place: Place) -> list[str]:
    if isinstance(row, csv.Error):
        way_out = "close every quote, double those within a cell, and put cells with line breaks in quotes"
        raise place.error(f"the row is not valid CSV: {row}; {way_out}") from row
    return row


def _records(lines: Iterator[str], name: str, delimiter: str, *, spaced: bool) -> Records:
    """Yield each row, or its csv.Error; skip blank lines.

    After an error, reading continues with the next line: an unclosed quote swallows everything after it.
    """
    held: list[str] = []
    again: list[str] = []
    count = 0

    def feed() -> Iterator[str]:
        nonlocal count
        while (line := again.pop() if again else next(lines, None)) is not None:
            count += 1
            held.append(line)
            yield line

    def start() -> Iterator[list[str]]:
        return csv.reader(feed(), delimiter=delimiter, skipinitialspace=spaced, strict=True)

    reader = start()
    while True:
        held.clear()
        place = Place(name, count + 1)
        row: list[str] | csv.Error | None
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = error
            again += reversed(held[1:])
            count -= len(held) - 1
            del held[1:]
            reader = start()
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


def _rows_of(lines: list[str], delimiter: str, *, spaced: bool = False) -> Iterator[list[str]]:
    """Yield the rows of a sample, up to the first that cannot be read."""
    with suppress(csv.Error):
        for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced):
            if len(row) > 1 or "".join(row).strip():
                yield row


def _likely_delimiter(lines: list[str], wanted: set[str | None] | set[str], *, whole: bool) -> str:
    """Return the delimiter of a CSV file, judged by its first lines.

    A comma if that gives the wanted columns; else the first one that makes several columns and gives nearly all rows
    the same number of cells, preferably with the wanted columns; else a comma.
    """
    fitting = []
    for delimiter in DELIMITERS:
        rows = list(_rows_of(lines, delimiter, spaced=True))
        if not whole and len(rows) > 1:
            rows.pop()  # it may be half a row
        header = rows[0] if rows else []
        named = _count_named(header)
        has_wanted = bool(wanted) and wanted <= {name.strip() for name in header}
        if delimiter == "," and has_wanted:
            return delimiter
        agreeing = sum(named <= len(row) <= len(header) for row in rows)
        if len(header) > 1 and agreeing >= AGREEING[has_wanted] * len(rows):
            fitting.append((has_wanted, delimiter))
    return max(fitting, key=lambda one: one[0])[1] if fitting else ","


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


def _column_names(header: list[str], place: Place) -> list[str]:
    """Return the names of the columns, `column_1` for an unnamed one. Raises InputError for duplicate names."""
    taken = set(header)
    if twice := [name for name, count in Counter(header).items() if count > 1 and name.strip()]:
        raise place.error(f"several columns have the same name: {names(twice)}; rename them")
    found = []
    for number, given in enumerate(header, start=1):
        name = given if given.strip() else f"column_{number}"
        while name in taken and name != given:
            name += "_"
        found.append(name)
    return found
