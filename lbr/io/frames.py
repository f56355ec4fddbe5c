"""Frames of polars and pandas: read as records, and made of answers; and Parquet files. Both are imported when used."""

from __future__ import annotations

import importlib
import queue
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from lbr.core.errors import OutputError, UsageError
from lbr.io.table import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lbr.core.types import AnswerRow
    from lbr.io.table import Table

LOOK_SECONDS = 0.1
GROUP_BYTES = 8 << 20
"""What a row group holds at most. polars takes ten times that in memory."""
GROUP_ROWS = 100_000
LIBRARIES = {"polars": "'lbr[polars]'", "pandas": "pandas"}
"""The libraries of frames, with what to install for each."""
_PANDAS_TYPES = {Kind.INT: "Int64", Kind.FLOAT: "float64", Kind.BOOL: "boolean", Kind.TEXT: "str"}


def library(name: str) -> Any:
    """Import polars or pandas. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module(name)  # slow, and rarely used
    except ImportError:
        raise UsageError(f"{name} is not installed: `pip install {LIBRARIES[name]}`") from None


def library_of(value: object) -> str | None:
    """Return the library of a DataFrame; None for anything else."""
    classes = {(one.__module__.partition(".")[0], one.__name__) for one in type(value).__mro__}
    return next((name for name in LIBRARIES if (name, "DataFrame") in classes), None)


def names(frame: Any) -> list[str]:
    """Return the names of a frame's columns as text."""
    return [str(name) for name in frame.columns]


def records(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a frame as records. Raises UsageError for a MultiIndex, and for two columns of one name."""
    if getattr(frame.columns, "nlevels", 1) > 1:
        way_out = 'df.columns = ["_".join(map(str, one)) for one in df.columns]'
        raise UsageError(f"the columns of the frame are a MultiIndex; give each one name first, for example {way_out}")
    if getattr(getattr(frame, "index", None), "nlevels", 1) > 1:
        raise UsageError("the index of the frame is a MultiIndex; make columns of it first: df.reset_index()")
    columns = names(frame)
    if double := [name for name, count in Counter(columns).items() if count > 1]:
        raise UsageError(f"the frame has several columns named {double[0]!r}; rename all but one of them")
    rows = frame.iter_rows() if library_of(frame) == "polars" else frame.itertuples(index=False, name=None)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def frame(table: Table, rows: Iterable[AnswerRow], kind: str = "polars") -> Any:
    """Return rows as a DataFrame of a library. Raises OutputError for a value that does not fit its column."""
    made, cells = library(kind), [table.typed_cells(row) for row in rows]
    if kind == "polars":
        schema = {column.name: getattr(made, column.kind) for column in table.columns}
        return made.DataFrame(cells, schema=schema, orient="row")
    columns = {
        column.name: made.Series([row[place] for row in cells], dtype=_PANDAS_TYPES[column.kind])
        for place, column in enumerate(table.columns)
    }
    return made.DataFrame(columns)


def taken(frame: Any, places: list[int]) -> Any:
    """Return the rows of a frame at these places."""
    if not places:
        return frame.head(0)
    if places == list(range(len(frame))):
        return frame
    return frame[places] if library_of(frame) == "polars" else frame.iloc[places]


def beside(frame: Any, answers: Any) -> Any:
    """Return a frame with the columns of another one of its library behind its own, and its index."""
    if library_of(frame) == "polars":
        return frame.hstack(answers)
    return frame.assign(**{name: answers[name].array for name in answers.columns})


class ParquetWriter:
    """Writes rows into a Parquet file, a row group at a time.

    polars asks for the rows in a thread of its own, which waits for them at a queue.
    """

    def __init__(self, path: Path, table: Table, *, name: str) -> None:
        self._table, self._name = table, name
        self._frames: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._error: Exception | None = None
        self._empty = frame(table, [])
        self._thread = threading.Thread(target=self._sink, args=(path,), daemon=True)
        self._thread.start()

    def write(self, rows: Iterable[AnswerRow]) -> None:
        """Write rows in the order they come. Raises OutputError."""
        self._put(frame(self._table, rows))

    def close(self) -> None:
        """Write the end of the file. Raises OutputError."""
        self._put(None)
        self._thread.join()
        if self._error is not None:
            self._put(None)

    def _put(self, item: Any) -> None:
        while self._error is None:
            try:
                return self._frames.put(item, timeout=LOOK_SECONDS)
            except queue.Full:
                continue
        raise OutputError(f"cannot write {self._name}: {self._error}; make room, or write a .csv file")

    def _sink(self, path: Path) -> None:
        from polars.io.plugins import register_io_source  # noqa: PLC0415

        def batches(*_: Any) -> Iterator[Any]:
            yield self._empty
            while (one := self._frames.get()) is not None:
                yield one

        rows = min(GROUP_ROWS, GROUP_BYTES // max(1, self._table.row_bytes)) or 1
        try:
            register_io_source(batches, schema=self._empty.schema).sink_parquet(path, row_group_size=rows)
        except Exception as error:  # noqa: BLE001 - it is raised where rows are written
            self._error = error
