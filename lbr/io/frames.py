"""Answers as frames of polars, in memory and in Parquet files. polars is an extra, imported when it is used."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from lbr.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lbr.core.types import AnswerRow
    from lbr.io.table import Table

LOOK_SECONDS = 0.1
GROUP_BYTES = 8 << 20
"""What a row group holds at most. polars takes ten times that in memory."""
GROUP_ROWS = 100_000


def polars() -> Any:
    """Import polars. Raises UsageError if it is not installed."""
    try:
        import polars as pl  # noqa: PLC0415 - slow, and rarely used
    except ImportError:
        raise UsageError("polars is not installed: `pip install 'lbr[polars]'`") from None
    return pl


def frame(table: Table, rows: Iterable[AnswerRow]) -> Any:
    """Return rows as a DataFrame. Raises OutputError for a value that does not fit its column."""
    pl = polars()
    schema = {column.name: getattr(pl, column.kind) for column in table.columns}
    return pl.DataFrame([table.typed_cells(row) for row in rows], schema=schema, orient="row")


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
