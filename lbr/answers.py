"""Collected answers: counted as they pass, and written whole."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr import outputs
from lbr.jobs import JobState
from lbr.store import mirror, reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from lbr.jobs import Json, Row, Run
    from lbr.store.database import Database


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collect wrote.

    `rows` holds the answers as dicts where no output was named, else None. `by_status` counts the rows
    written, `cut_off` those whose answer ends where its tokens did; `sealed` tells whether all inputs are in.
    """

    run: str
    by_status: dict[str, int]
    sealed: bool
    rows: list[dict[str, Json]] | None = None
    cut_off: int = 0

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


class Tally:
    """Passes pages of rows on and counts them by status, and those that were cut off."""

    def __init__(self, pages: AsyncIterator[list[Row]]) -> None:
        self._pages = pages
        self.by_status: Counter[str] = Counter()
        self.cut_off = 0

    async def __aiter__(self) -> AsyncIterator[list[Row]]:
        async for page in self._pages:
            self.by_status.update([row.status for row in page])
            self.cut_off += sum([row.cut_off for row in page])
            yield page


async def write_pages(
    database: Database,
    run: Run,
    pages: AsyncIterable[list[Row]],
    target: str | None,
    kind: outputs.OutputFormat,
) -> None:
    """Write a run's pages to a file, or as lines to stdout where `target` is None."""
    if target is None:
        await _write_lines(database, run, pages, None, kind)
        return
    async with outputs.output_lock(target):
        if kind is not outputs.OutputFormat.DB:
            await _write_lines(database, run, pages, target, kind)
        elif os.path.lexists(target):  # noqa: ASYNC240 - one stat
            # The rows of other runs stay; that it is one transaction makes it whole.
            await mirror.write_run(target, run.name, pages)
        else:
            with outputs.atomic_path(target) as temporary:
                await mirror.write_run(str(temporary), run.name, pages)


async def _write_lines(
    database: Database,
    run: Run,
    pages: AsyncIterable[list[Row]],
    target: str | None,
    kind: outputs.OutputFormat,
) -> None:
    columns = await reads.metadata_columns(database, run) if kind is outputs.OutputFormat.CSV else []
    with outputs.open_writer(target, kind, metadata_columns=columns) as writer:
        async for page in pages:
            writer.write(page)
