"""CSV as pandas, spreadsheets and people write it: the delimiter, the header, and the rows under it."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter, deque
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
AGREEING = 0.9
"""The share of rows that have as many cells as the header."""


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
        self._line = place.line
        header = _cells(header, place)
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


def _records(lines: Iterator[str], name: str, delimiter: str, sample: list[str]) -> Records:
    """Yield each row, or its csv.Error; skip blank lines.

    After an error, reading continues with the next line: an unclosed quote swallows everything after it.
    """
    spaced = _has_spaces_after(delimiter, sample)
    again: deque[str] = deque()
    held: list[str] = []

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            held.append(line)
            yield line

    number = 1
    while True:
        row: list[str] | csv.Error | None
        try:
            row = next(csv.reader(feed(), delimiter=delimiter, skipinitialspace=spaced, strict=True), None)
        except csv.Error as error:
            row = error
            again.extendleft(reversed(held[1:]))
            del held[1:]
        if row is None:
            return
        if isinstance(row, csv.Error) or len(row) > 1 or not held[0].isspace():
            yield Place(name, number), "".join(held), row
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
        agreeing = sum(_count_named(header) <= len(row) <= len(header) for row in rows)
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
