"""Write a run's rows as their jobs finish, behind those that an output has already."""

from __future__ import annotations

import asyncio
import time
from itertools import takewhile
from typing import TYPE_CHECKING

from lbr.core.errors import UsageError
from lbr.core.types import JobState, Order, Shape
from lbr.io import writers
from lbr.store import reads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Container

    from lbr.core.types import AnswerRow, Run
    from lbr.store.database import Database

    Pages = AsyncIterator[list[AnswerRow]]

LOOK_SECONDS = 0.5
PAUSE_SHARE = 10
"""The pause after a look is at least this many times as long as the look, which may read a large run."""
OPEN = frozenset({JobState.PENDING, JobState.INFLIGHT})


async def write_finished(
    database: Database,
    run: Run,
    path: str | None,
    *,
    order: Order,
    include: Container[str],
    counted: Callable[[Pages], Pages],
) -> None:
    """Write rows until every job has finished and all inputs are in, or the run is paused or cancelled.

    `counted` passes the rows on. Raises UsageError for a file with something else than finished rows of this run, and
    if its samples become more.
    """
    with writers.open_appender(path, run.samples) as (writer, written, last):
        if last is not None:
            await _check_same(database, run, path, *last)
        pages = finished(database, run, written, order=order, include=include, sleep=_sleep)
        async for page in counted(pages):
            writer.write(page)
            writer.flush()


async def finished(
    database: Database,
    run: Run,
    written: bytearray,
    *,
    order: Order,
    include: Container[str],
    sleep: Callable[[float], Awaitable[None]],
) -> AsyncGenerator[list[AnswerRow], None]:
    """Yield pages of rows without a 1 in `written` as their jobs finish, and set it, until all have or the run is over.

    `sleep` gets how long the last look took, and waits until the next one.
    """
    seen = None
    while True:
        started = time.monotonic()
        (counts,) = await database.read(reads.counts, [run.id])
        if counts.run.samples != run.samples:
            raise UsageError(f"run {run.name!r} gets more samples now; run the same command again")
        if seen != (seen := (counts.inputs, counts.open)) or counts.is_over:
            written.extend(bytes(max(0, counts.inputs * run.samples - len(written))))
            async for page in _finished(database, run, order, include, written):
                yield page
                for row in page:
                    written[row.idx * run.samples + (row.sample or 0)] = 1
        if counts.is_over:
            return
        await sleep(time.monotonic() - started)


async def _sleep(took: float) -> None:
    await asyncio.sleep(max(LOOK_SECONDS, PAUSE_SHARE * took))


async def _check_same(database: Database, run: Run, path: str | None, idx: int, key: str) -> None:
    async for page in reads.rows(database, run, Shape.ORIGINAL, between=(idx - 1, idx + 1)):
        if any(row.key == key for row in page):
            return
    raise UsageError(f"{path} has rows of another run than {run.name!r}; name another file")


async def _finished(database: Database, run: Run, order: Order, include: Container[str], written: bytearray) -> Pages:
    """Yield pages of finished rows without a 1 in `written`; in input order only those before the first open job."""
    chosen = takewhile if order is Order.INPUT else filter

    def is_new(idx: int, sample: int | None) -> bool:
        place = idx * run.samples + (sample or 0)
        return place < len(written) and not written[place]

    after = divmod(written.find(0) - 1 if 0 in written else len(written), run.samples)
    while found := await database.read(reads.places, run, after):
        ended = [(idx, sample) for idx, sample, _ in chosen(lambda place: place[2] not in OPEN, found)]
        new = [idx for idx, sample in ended if is_new(idx, sample)]
        if new:
            between = (new[0] - 1, new[-1] + 1)
            async for page in reads.rows(database, run, Shape.ORIGINAL, include=include, between=between):
                # A job may have been put back meanwhile.
                yield [row for row in chosen(lambda row: row.status not in OPEN, page) if is_new(row.idx, row.sample)]
        if order is Order.INPUT and len(ended) < len(found):
            return
        after = found[-1][:2]
