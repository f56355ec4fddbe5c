"""Read records from Parquet files, a slice of rows at a time, with polars."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lbr.core.errors import InputError, UsageError
from lbr.io import frames
from lbr.io.records import Fields, Place, json_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.io.readers import Input

FIRST_ROWS = 1_000
MAX_ROWS = 50_000
SLICE_BYTES = 2**24
"""About what a slice takes in memory."""
REFUSED_TYPES = {"Binary", "Object", "Duration", "Unknown"}
NANOSECONDS = "%Y-%m-%dT%H:%M:%S%.f"
"""ISO form with as many digits as there are; Python's times have microseconds."""


def read_parquet(given: Input) -> Iterator[tuple[Place, str, Fields | InputError]]:
    """Yield place (a row, counted from 1), JSON and fields of each row. Raises UsageError for types without JSON."""
    if not os.path.isfile(given.source):
        raise UsageError(f"expected a Parquet file, got: the stream {given.source}; name a file")
    pl = frames.library("polars")
    with _named(pl, given.name):
        frame = pl.scan_parquet(given.source, glob=False, hive_partitioning=False)
        schema = frame.collect_schema()
    for name, type_ in schema.items():
        if _is_refused(type_):
            raise UsageError(
                f"{given.name}: lbr cannot read column {name!r}, which has the type {type_}; write it as text, or leave it out"
            )
    if given.column is None and given.template is None and "messages" not in schema:
        given.column = "prompt"
    given.check_columns(list(schema))
    frame = frame.with_columns(
        pl.col(name).dt.strftime(NANOSECONDS + "%:z" * (type_.time_zone is not None))
        for name, type_ in schema.items()
        if isinstance(type_, pl.Datetime) and type_.time_unit == "ns"
    )
    number, size = 0, FIRST_ROWS
    while True:
        with _named(pl, given.name):
            rows = frame.slice(number, size).collect()
        if rows.is_empty():
            return
        for row in rows.iter_rows(named=True):
            number += 1
            place = Place(given.name, number)
            try:
                fields, text = json_of(row, place)
            except InputError as error:
                yield place, repr(row), error
            else:
                yield place, text.decode(), fields
        size = max(1, min(MAX_ROWS, SLICE_BYTES * rows.height // max(1, rows.estimated_size())))


def _is_refused(type_: Any) -> bool:
    inner = [one.dtype for one in getattr(type_, "fields", ())] or [getattr(type_, "inner", None)]
    return str(type_.base_type()) in REFUSED_TYPES or any(map(_is_refused, filter(None, inner)))


@contextmanager
def _named(pl: Any, name: str) -> Iterator[None]:
    """Raise UsageError, with the file's name, for what polars cannot read."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot read {name} as Parquet: {reason}; write it again, or set --format") from error
