"""Collect a run's answers in input order: return them, or write them to a file."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import fspath
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.api.follow import write_finished
from lbr.core.config import DB_URL_DEFAULT, one_of, some_of
from lbr.core.errors import UsageError
from lbr.core.extras import Extra, Include
from lbr.core.types import JobState, Order, Shape
from lbr.io import writers
from lbr.io.table import OWN_COLUMNS, Kind, Kinds, make_table
from lbr.store import inputs, reads, results_db, runs
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container, Sequence

    from lbr.core.types import AnswerRow, Json, PathOrUrl, Run
    from lbr.io.table import Table
    from lbr.store.database import Database

WAIT_SECONDS = 0.2
MAX_REASONS = 1_000


@dataclass(slots=True)
class Collected:
    """What a collect wrote.

    `by_status` counts the rows. `sealed`: whether the run's enqueue has finished. `rows`: the answers as dicts, None if
    they were written to an output. `cut_off` counts the answers that reached their token limit, done or failed;
    `limited` is True if the run's settings set that limit. `reasons` counts the failed rows by their last error.
    `left_out` are the fields of answers that the schema does not name, which a table has no column for.
    """

    run: str
    by_status: Counter[str] = field(default_factory=Counter)
    sealed: bool = False
    rows: list[dict[str, Json]] | None = None
    cut_off: int = 0
    limited: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)

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


@dataclass(slots=True)
class Output:
    """Where and how `collect` writes rows, by its arguments; `path` None is stdout. Raises UsageError.

    `read` is what to read beside the answers.
    """

    out: PathOrUrl | None
    format: str | None = None
    columns: str = "default"
    unnest: bool = True
    include: str | Sequence[str] = ()
    spreadsheet_safe: bool = False
    bom: bool = False
    path: str | None = field(init=False)
    kind: writers.OutputFormat = field(init=False)
    style: writers.CsvStyle = field(init=False)
    read: set[str] = field(init=False)

    def __post_init__(self) -> None:
        """Check what the format can have."""
        path = self.path = None if self.out is None or fspath(self.out) == "-" else fspath(self.out)
        if self.out is not None:
            writers.check_output(path)  # before its format: a folder or a device has none
        one_of("--columns", self.columns, tuple(OWN_COLUMNS))
        wanted = self.format and one_of("format", self.format, tuple(writers.OutputFormat))
        kind = self.kind = writers.OutputFormat(wanted) if wanted else writers.format_of(path)
        if self.out is not None:
            writers.check_output(path, kind)
        self.style = writers.CsvStyle(self.spreadsheet_safe, self.bom)
        self.style.check(kind)
        self.read = set(some_of("--with", self.include, tuple(Include)))
        flags = {"--columns": self.columns == "all", "--no-unnest": not self.unnest, "--with": bool(self.read)}
        for flag in (flag for flag, is_set in flags.items() if is_set and kind not in writers.TABLES):
            if flag != "--with" or kind is not writers.OutputFormat.JSONL:
                raise UsageError(
                    f"{flag} is for tables, got: {kind}; omit it, or write a .csv, .parquet or .sqlite file"
                )
        if kind is writers.OutputFormat.OPENAI:
            self.read.add(Include.USAGE)


@checked
async def collect(
    run: str,
    *,
    out: PathOrUrl | None = None,
    shape: str = Shape.ORIGINAL,
    format: str | None = None,  # noqa: A002 - the word of the command line
    columns: str = "default",
    unnest: bool = True,
    include: str | Sequence[str] = (),
    failed: bool = False,
    status: str | Sequence[str] = (),
    wait: bool = False,
    follow: bool = False,
    order: str = Order.INPUT,
    spreadsheet_safe: bool = False,
    bom: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> Collected:
    """Return a run's answers in input order as `rows`, or write them to `out`; "-" is stdout.

    A file is written completely or not at all; a results database keeps the rows of other runs. `format` (jsonl, csv,
    parquet, sqlite, db, openai or messages) None goes by the file's name. `shape`: "original", a row per input, or
    "unique", a row per distinct input. `columns` "all" adds lbr's own columns to a table, and `unnest` makes a column
    of each field of a structured answer. `include` is what rows have beside their answers: "usage", and "reasoning",
    "logprobs" and "raw" if the run keeps them. `status` leaves out rows with another one; `failed` is short for
    `status` "failed". `wait`: first wait until every job has finished. `follow`: write JSONL rows as
    their jobs finish, to stdout or behind the rows that the file has, until all have; `order` "finished" does not wait
    for jobs that come before. For CSV, `spreadsheet_safe` puts an apostrophe before text that a spreadsheet would run as a formula, and `bom` adds a byte order mark, by which Excel recognizes
    UTF-8.

    Raises RunNotFoundError, UsageError, OutputError or DatabaseError.
    """
    output = Output(out, format, columns, unnest, include, spreadsheet_safe, bom)
    chosen = Shape(one_of("shape", shape, tuple(Shape)))
    states = {*some_of("--status", status, tuple(JobState)), *([JobState.FAILED] if failed else [])}
    sequence = Order(one_of("--order", order, tuple(Order)))
    _check_follow(output, follow=follow, alone=not states and chosen is Shape.ORIGINAL, order=sequence)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        runs.check_not_removing(found)
        check_kept(output.read, found.keep)
        collected = Collected(run)
        if wait:
            await _until_finished(database, found)
        pages = _counted(reads.rows(database, found, chosen, states, output.read), collected)
        if follow:
            note = partial(_counted, collected=collected)
            await write_finished(database, found, output.path, order=sequence, include=output.read, counted=note)
            collected.by_status = Counter(await database.read(reads.rows_by_state, found))
        elif out is None:
            collected.rows = [row.to_dict() async for page in pages for row in page]
        else:
            async with nullcontext() if output.path is None else writers.output_lock(output.path):
                collected.left_out = await _write(database, found, pages, output)
        collected.sealed = (await database.read(reads.find_run, run)).sealed_at is not None
        collected.limited = bool(collected.cut_off) and await database.read(reads.limits_answers, found)
        return collected


def _check_follow(output: Output, *, follow: bool, alone: bool, order: Order) -> None:
    """Raise UsageError if rows cannot be written as they finish; `alone` if no other flag chooses rows."""
    if not follow and order is Order.FINISHED:
        raise UsageError("--order finished is for --follow; add it, or omit --order")
    if follow and (output.out is None or output.kind is not writers.OutputFormat.JSONL):
        raise UsageError("--follow writes JSONL; use -o with a .jsonl file, or with - for stdout")
    if follow and not alone:
        raise UsageError("--follow writes a row for every input; use it without --status, --failed and --shape")


def check_kept(include: Container[str], keep: Sequence[str]) -> None:
    """Raise UsageError if rows are to have what their run does not keep."""
    if lacking := ",".join(kind for kind in Extra if kind in include and kind not in keep):
        raise UsageError(f"the run does not keep {lacking}; enqueue it under another name with {lacking} in --keep")


async def _until_finished(database: Database, run: Run) -> None:
    """Wait until every job of a run has finished and all inputs are in, or the run is paused or cancelled."""
    while True:
        (counts,) = await database.read(reads.counts, [run.id])
        if counts.is_over:
            return
        await asyncio.sleep(WAIT_SECONDS)


async def _counted(pages: AsyncIterator[list[AnswerRow]], collected: Collected) -> AsyncIterator[list[AnswerRow]]:
    """Yield the pages and count their rows."""
    failed = JobState.FAILED
    async for page in pages:
        collected.by_status.update([row.status for row in page])
        collected.cut_off += sum([row.cut_off for row in page])
        for reason in [row.error or "no reason given" for row in page if row.status == failed]:
            if len(collected.reasons) < MAX_REASONS or reason in collected.reasons:
                collected.reasons[reason] += 1
        yield page


async def _write(database: Database, run: Run, pages: AsyncIterator[list[AnswerRow]], output: Output) -> list[str]:
    """Write the pages; return the fields of answers that a table had no column for."""
    target = output.path
    if output.kind is not writers.OutputFormat.DB or target is None:
        table = await _table(database, run, output)
        with writers.open_writer(target, output.kind, table=table, style=output.style) as writer:
            async for page in pages:
                writer.write(page)
        return sorted(table.left_out)
    if os.path.lexists(target):  # noqa: ASYNC240 - one stat
        await results_db.write_run(target, run.name, pages)  # one transaction; the rows of other runs stay
    else:
        with writers.atomic_path(target) as temporary:
            await results_db.write_run(str(temporary), run.name, pages)
    return []


async def _table(database: Database, run: Run, output: Output) -> Table:
    """Return the columns to write. The inputs are read for them, if the format has columns."""
    if output.kind not in writers.TABLES:
        return make_table(run.task)
    kinds, typed = Kinds(), output.kind in writers.TYPED
    found = await reads.columns(database, run, kinds.note if typed else None)
    numbers = typed and await database.read(inputs.ids_are_numbers, run)
    table = make_table(
        run.task,
        found,
        kind_of=kinds.of,
        id_kind=Kind.INT if numbers else Kind.TEXT,
        columns=output.columns,
        unnest=output.unnest,
        include=output.read,
        samples=run.samples,
        fold=str.lower if output.kind is writers.OutputFormat.SQLITE else str,
    )
    if output.kind is writers.OutputFormat.PARQUET:
        table.row_bytes = await database.read(reads.typical_bytes, run)
    return table
