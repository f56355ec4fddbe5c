"""Collect a run's answers in input order: counted as they pass, and written whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from os import fspath
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.core.config import (
    DB_URL_DEFAULT,
    one_of,
)
from lbr.core.errors import UsageError
from lbr.core.types import JobState, Shape
from lbr.io import writers
from lbr.store import reads, runs
from lbr.store.database import opened

if TYPE_CHECKING:
    from lbr.core.types import Json, PathOrUrl, Run
    from lbr.store.database import Database

import os
from collections import Counter
from typing import TYPE_CHECKING

from lbr.store import results_db

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from lbr.core.types import Json, Row, Run
    from lbr.store.database import Database


WAIT_SECONDS = 0.2
MAX_REASONS = 1_000


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collect wrote.

    `rows` holds the answers as dicts where no output was named, else None. `by_status` counts the rows
    written, `cut_off` those whose answer reached its token limit, whether they are done or failed because of it;
    `limited` is True if the run's settings set that limit. `sealed` tells whether all inputs are in. `reasons` counts the rows that
    failed by what their last attempt said.
    """

    run: str
    by_status: dict[str, int]
    sealed: bool
    rows: list[dict[str, Json]] | None = None
    cut_off: int = 0
    limited: bool = False
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return sum(self.by_status.values())

    @property
    def unfinished(self) -> int:
        """How many rows wait for an answer that may still come."""
        return self.by_status.get(JobState.PENDING, 0) + self.by_status.get(JobState.INFLIGHT, 0)

    @property
    def failed(self) -> int:
        """How many rows have no answer and get none."""
        return self.by_status.get(JobState.FAILED, 0) + self.by_status.get(JobState.CANCELLED, 0)


@checked
async def collect(
    run: str,
    *,
    out: PathOrUrl | None = None,
    shape: str = Shape.ORIGINAL,
    format: str | None = None,  # noqa: A002 - the word of the command line
    wait: bool = False,
    spreadsheet_safe: bool = False,
    bom: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> Collected:
    """Write a run's answers in input order, or return them as `rows` where `out` is None; "-" is stdout.

    A file appears whole or not at all; a results database keeps the rows of other runs. With `wait`, only once every job has come to its end; else whatever
    there is now. In CSV, `spreadsheet_safe` puts an apostrophe before a text that a spreadsheet would run as a
    formula, and `bom` begins with a byte order mark, by which Excel knows UTF-8. Raises RunNotFoundError, UsageError, OutputError or DatabaseError.
    """
    target = None if out is None or fspath(out) == "-" else fspath(out)
    if out is not None:
        writers.check_output(target)
    kind = (
        writers.OutputFormat(one_of("format", format, tuple(writers.OutputFormat)))
        if format is not None
        else None
    )
    kind = kind or writers.format_of(target)
    style = writers.CsvStyle(spreadsheet_safe, bom)
    style.check(kind)
    chosen = Shape(one_of("shape", shape, tuple(Shape)))
    if kind is writers.OutputFormat.DB and target is None:
        raise UsageError("expected -o FILE for a results database, got: stdout")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        runs.check_not_removing(found)
        if wait:
            await until_finished(database, found)
        pages = Tally(reads.rows(database, found, chosen))
        rows = None
        if out is None:
            rows = [row.to_dict() async for page in pages for row in page]
        else:
            await write_pages(database, found, pages, target, kind, style)
        found = await reads.find_run(database, run)
        limited = bool(pages.cut_off) and await reads.limits_answers(database, found)
        sealed = found.sealed_at is not None
        return Collected(
            run, dict(pages.by_status), sealed, rows, pages.cut_off, limited, dict(pages.reasons)
        )


async def until_finished(database: Database, run: Run) -> None:
    """Wait until every job of a run has come to its end and all its inputs are in.

    Returns as well where the run is paused or cancelled: nothing more would come.
    """
    while True:
        (counts,) = await reads.counts(database, [run.id])
        if counts.finished or (counts.run.state != "active" and not counts.of(JobState.INFLIGHT)):
            return
        await asyncio.sleep(WAIT_SECONDS)


class Tally:
    """Passes pages of rows on and counts them by status, and those that were cut off."""

    def __init__(self, pages: AsyncIterator[list[Row]]) -> None:
        self._pages = pages
        self.by_status: Counter[str] = Counter()
        self.cut_off = 0
        self.reasons: Counter[str] = Counter()

    async def __aiter__(self) -> AsyncIterator[list[Row]]:
        async for page in self._pages:
            self.by_status.update([row.status for row in page])
            self.cut_off += sum([row.cut_off for row in page])
            for row in page:
                if row.status == JobState.FAILED and (
                    len(self.reasons) < MAX_REASONS or row.error in self.reasons
                ):
                    self.reasons[row.error or "it said nothing"] += 1
            yield page


async def write_pages(
    database: Database,
    run: Run,
    pages: AsyncIterable[list[Row]],
    target: str | None,
    kind: writers.OutputFormat,
    style: writers.CsvStyle,
) -> None:
    """Write a run's pages to a file, or as lines to stdout where `target` is None."""
    if target is None:
        await _write_lines(database, run, pages, None, kind, style)
        return
    async with writers.output_lock(target):
        if kind is not writers.OutputFormat.DB:
            await _write_lines(database, run, pages, target, kind, style)
        elif os.path.lexists(target):  # noqa: ASYNC240 - one stat
            # The rows of other runs stay; that it is one transaction makes it whole.
            await results_db.write_run(target, run.name, pages)
        else:
            with writers.atomic_path(target) as temporary:
                await results_db.write_run(str(temporary), run.name, pages)


async def _write_lines(
    database: Database,
    run: Run,
    pages: AsyncIterable[list[Row]],
    target: str | None,
    kind: writers.OutputFormat,
    style: writers.CsvStyle,
) -> None:
    columns = await reads.columns(database, run) if kind is writers.OutputFormat.CSV else []
    with writers.open_writer(target, kind, columns=columns, style=style) as writer:
        async for page in pages:
            writer.write(page)
