"""Read records from CSV: find the delimiter, check the header, and give each row the line that it begins in."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lbr.core.errors import InputError
from lbr.core.text import pluralize
from lbr.io.records import Fields, Place, names, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.io.readers import Input, Records

MAX_LINE = 2**28
"""The most characters of a line, and of a cell."""
SAMPLE_CHARACTERS = 2**16
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r'sep=([^\w"\s]|\t)\s*', re.IGNORECASE)
"""A first line that tells Excel the delimiter, and is no header."""
AGREEING = 0.9
"""The share of rows that have as many cells as the header."""


class _Header:
    """The columns of a CSV file.

    Raises InputError for columns that cannot be used, UsageError if one that the prompt needs is not there.
    """

    def __init__(self, given: Input, delimiter: str, place: Place, cells: list[str]) -> None:
        self._line, self._delimiter = place.line, delimiter
        self._named = _count_named(cells)
        self._names = [cell if cell.strip() else f"column_{n}" for n, cell in enumerate(cells, start=1)]
        if twice := [one for one, count in Counter(self._names).items() if count > 1]:
            raise place.error(f"several columns have the same name: {names(twice)}; rename them")
        hint = f" (delimiter {shown(self._delimiter)})"
        if len(self._names) == 1:
            hint += "; set --delimiter if these are several columns"
        given.check_columns(self._names, hint)

    def fields(self, cells: list[str], place: Place) -> Fields | InputError:
        """Return the cells of a row by column name, without empty ones in unnamed columns at its end."""
        if not self._named <= len(cells) <= len(self._names):
            msg = f"expected {pluralize(len(self._names), 'cell')} as in line {self._line}, got: {len(cells)}"
            other = "tab (this file has one column)" if len(self._names) == 1 else "to a different one"
            way_out = f"put cells that hold the delimiter {shown(self._delimiter)} in quotes"
            return place.error(f"{msg}; {way_out}, or set --delimiter {other}")
        while len(cells) > self._named and not cells[-1]:
            cells.pop()
        return dict(zip(self._names, cells, strict=False))


def read_csv(given: Input) -> Records:
    """Yield place, text and fields of each row, or its error; `delimiter` None is found in the first lines."""
    csv.field_size_limit(MAX_LINE)
    lines = given.lines(newline="")  # the csv module finds the ends of rows itself
    sample, room = [], SAMPLE_CHARACTERS
    while room > 0 and (line := next(lines, None)) is not None:
        sample.append(line)
        room -= len(line)
    named = None
    if sample and (named := SEPARATOR_LINE.fullmatch(sample[0])):
        sample[0] = "\n"  # blank lines are skipped, but counted
    delimiter = given.delimiter or (named[1] if named else _likely_delimiter(sample, given))
    rows = _rows(itertools.chain(sample, lines), given.name, delimiter, sample)
    place, text, cells = next(rows, (None, "", []))
    if place is None:
        raise InputError("the file is empty; the first line must name the columns", source=given.name)
    given.check(text, place)
    if isinstance(cells, InputError):
        raise cells
    header = _Header(given, delimiter, place, cells)
    for place, text, cells in rows:
        yield place, text, cells if isinstance(cells, InputError) else header.fields(cells, place)


def _rows(lines: Iterator[str], name: str, delimiter: str, sample: list[str]) -> Iterator[tuple[Place, str, Any]]:
    """Yield place, text and cells of each row, or its error; skip blank lines.

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
        row: Any
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


def _likely_delimiter(lines: list[str], given: Input) -> str:
    """Return the delimiter of a CSV file, judged by its first lines.

    The first that gives the wanted columns; else the first that makes several columns and gives nearly all rows the
    same number of cells; else a comma.
    """
    wanted = given.template.columns if given.template else {given.column}
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
