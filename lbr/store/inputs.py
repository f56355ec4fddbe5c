"""Inputs of a run, found by their id, or because their jobs failed; and what kind their ids are. Nothing here writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import bindparam, func, literal_column, select

from lbr.core.errors import UsageError
from lbr.store.reads import last_try
from lbr.store.schema import attempts, items, jobs
from lbr.store.sql import is_after, pages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy import Connection

    from lbr.core.types import Millis, Run
    from lbr.store.database import Database

SHOWN = 500
"""How many characters of an error message are read."""
_LAST = attempts.alias("last")
_FAILED = (
    select(items.c.idx, items.c.sample, items.c.custom_id)
    .add_columns(*(func.coalesce(_LAST.c[name], "") for name in ("family", "error")))
    .add_columns(func.coalesce(func.substr(_LAST.c.message, 1, SHOWN), ""))
    .join_from(items, jobs, items.c.job_id == jobs.c.id)
    .outerjoin(_LAST, _LAST.c.id == last_try("id"))
    .where(items.c.run_id == bindparam("run"), items.c.first == 1, literal_column("jobs.state = 'failed'"))
    .where(is_after(items.c.idx, items.c.sample))
    .order_by(items.c.idx, items.c.sample)
    .limit(bindparam("limit"))
)


class FailedJob(NamedTuple):
    """A job that failed: the first of its inputs, its id as text, and its last error, whose message may be cut."""

    idx: int
    sample: int
    id: str | None
    family: str
    error: str
    message: str


async def failed_jobs(database: Database, run: Run) -> AsyncIterator[Sequence[FailedJob]]:
    """Yield a run's failed jobs in input order, page by page; each page is a short transaction of its own."""
    async for page in pages(lambda bound: database.read(_failed_page, run, bound)):
        yield page


def _failed_page(connection: Connection, _now: Millis, run: Run, bound: dict[str, int]) -> tuple[int, list[FailedJob]]:
    rows = [FailedJob(*row) for row in connection.execute(_FAILED, bound | {"run": run.id}).all()]
    return len(rows), rows


def idx_of(connection: Connection, _now: Millis, run: Run, custom_id: str) -> int:
    """Return the index of the input with this id. Raises UsageError if none has it, or several have."""
    query = select(items.c.idx).where(items.c.run_id == run.id, items.c.custom_id == custom_id, items.c.sample == 0)
    found = connection.execute(query.order_by(items.c.idx).limit(2)).scalars().all()
    if len(found) != 1:
        how_many = f"inputs {found[0]}, {found[1]} and perhaps more have" if found else "no input has"
        raise UsageError(f"{how_many} the id {custom_id!r} in run {run.name!r}; name the index of one, from 0")
    return int(found[0])


def ids_are_numbers(connection: Connection, _now: Millis, run: Run) -> bool:
    """Return whether every id of a run's inputs is a number of at most 64 bits."""
    length, largest = func.length(items.c.custom_id), str(2**63 - 1)
    fits = (length < len(largest)) | ((length == len(largest)) & (items.c.custom_id <= largest))
    is_number = (func.coalesce(items.c.id_is_number, 0) == 1) & fits
    query = select(items.c.idx).where(items.c.run_id == run.id, items.c.custom_id.is_not(None), ~is_number)
    return connection.scalar(query.limit(1)) is None
