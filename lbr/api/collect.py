"""Collect a run's answers in input order: return them, or write them to a file."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import fspath
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.core.config import DB_URL_DEFAULT, one_of
from lbr.core.errors import UsageError
from lbr.core.types import JobState, Shape
from lbr.io import writers
from lbr.store import reads, results_db, runs
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lbr.core.types import Json, PathOrUrl, Row, Run
    from lbr.store.database import Database

WAIT_SECONDS = 0.2
MAX_REASONS = 1_000


@dataclass(slots=True)
class Collected:
    """What a collect wrote.

    `by_status` counts the rows. `sealed`: whether the run's enqueue has finished. `rows`: the answers as dicts, None if
    they were written to an output. `cut_off` counts the answers that reached their token limit, done or failed;
    `limited` is True if the run's settings set that limit. `reasons` counts the failed rows by their last error.
    """

    run: str
    by_status: Counter[str] = field(default_factory=Counter)
    sealed: bool = False
    rows: list[dict[str, Json]] | None = None
    cut_off: int = 0
    limited: bool = False
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """The number of rows."""
        return sum(self.by_status.values())

    @property
    def unfinished(self) -> int:
        """The number of rows whose answer may still come."""
        return self.by_status[JobState.PENDING] + self.by_status[JobState.INFLIGHT]

    @property
    def failed(self) -> int:
        """The number of rows that get no answer."""
        return self.by_status[JobState.FAILED] + self.by_status[JobState.CANCELLED]


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
    """Return a run's answers in input order as `rows`, or write them to `out`; "-" is stdout.

    A file is written completely or not at all; a results database keeps the rows of other runs. `format` (jsonl, csv or
    db) None goes by the file's name. `shape`: "original", a row per input, or "unique", a row per distinct input.
    `wait`: first wait until every job has finished. For CSV, `spreadsheet_safe` puts an apostrophe before text that a
    spreadsheet would run as a formula, and `bom` adds a byte order mark, by which Excel recognizes UTF-8.

    Raises RunNotFoundError, UsageError, OutputError or DatabaseError.
    """
    target = None if out is None or fspath(out) == "-" else fspath(out)
    if out is not None:
        writers.check_output(target)
    formats = tuple(writers.OutputFormat)
    kind = writers.format_of(target) if format is None else writers.OutputFormat(one_of("format", format, formats))
    style = writers.CsvStyle(spreadsheet_safe, bom)
    style.check(kind)
    chosen = Shape(one_of("shape", shape, tuple(Shape)))
    if kind is writers.OutputFormat.DB and target is None:
        raise UsageError("expected -o FILE for a results database, got: stdout")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        runs.check_not_removing(found)
        if wait:
            await _until_finished(database, found)
        collected = Collected(run)
        pages = _counted(reads.rows(database, found, chosen), collected)
        if out is None:
            collected.rows = [row.to_dict() async for page in pages for row in page]
        else:
            async with nullcontext() if target is None else writers.output_lock(target):
                await _write(database, found, pages, target, kind, style)
        collected.sealed = (await database.read(reads.find_run, run)).sealed_at is not None
        collected.limited = bool(collected.cut_off) and await database.read(reads.limits_answers, found)
        return collected


async def _until_finished(database: Database, run: Run) -> None:
    """Wait until every job of a run has finished and all inputs are in, or the run is paused or cancelled."""
    while True:
        (counts,) = await database.read(reads.counts, [run.id])
        if counts.finished or (counts.run.state != "active" and not counts.of(JobState.INFLIGHT)):
            return
        await asyncio.sleep(WAIT_SECONDS)


async def _counted(pages: AsyncIterator[list[Row]], collected: Collected) -> AsyncIterator[list[Row]]:
    """Yield the pages and count their rows."""
    async for page in pages:
        collected.by_status.update([row.status for row in page])
        collected.cut_off += sum([row.cut_off for row in page])
        for reason in [row.error or "no reason given" for row in page if row.status == JobState.FAILED]:
            if len(collected.reasons) < MAX_REASONS or reason in collected.reasons:
                collected.reasons[reason] += 1
        yield page


async def _write(
    database: Database,
    run: Run,
    pages: AsyncIterator[list[Row]],
    target: str | None,
    kind: writers.OutputFormat,
    style: writers.CsvStyle,
) -> None:
    if kind is not writers.OutputFormat.DB or target is None:
        columns = await reads.columns(database, run) if kind is writers.OutputFormat.CSV else []
        with writers.open_writer(target, kind, columns=columns, style=style) as writer:
            async for page in pages:
                writer.write(page)
    elif os.path.lexists(target):  # noqa: ASYNC240 - one stat
        await results_db.write_run(target, run.name, pages)  # one transaction; the rows of other runs stay
    else:
        with writers.atomic_path(target) as temporary:
            await results_db.write_run(str(temporary), run.name, pages)
