"""The batches of runs: what is at the provider, and how to give one up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.api.status import printable, status_of
from lbr.core.batches import BatchState
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.text import aligned, duration
from lbr.core.types import Report
from lbr.store import batches as store
from lbr.store import counters, reads
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import Collection

    from lbr.api.status import Status
    from lbr.core.batches import BatchRow
    from lbr.core.types import Millis, PathOrUrl
    from lbr.store.database import Database

LISTED = ("run", "batch", "state", "requests", "size", "age", "next step", "at the provider")


@dataclass(frozen=True, slots=True)
class BatchStatus(Report):
    """One batch: `requests` are its lines, `completed` and `failed` those that the provider reports so far.

    `state` is planned, uploaded, sending, sent, ended or unsure (its creation was not confirmed), and at the end settled
    or released. `seconds_since_sent` is None before it is sent, and `next_step_seconds` at its end. `error` is the latest
    problem.
    """

    run: str
    nonce: str
    state: str
    requests: int
    bytes: int | None
    provider: str | None
    provider_id: str | None
    completed: int | None
    failed: int | None
    age_seconds: float
    seconds_since_sent: float | None
    next_step_seconds: float | None
    error: str | None


def _status_of(row: BatchRow, run: str, now: Millis) -> BatchStatus:
    found = row.found
    return BatchStatus(
        run=run,
        nonce=row.nonce,
        state=row.state,
        requests=row.count,
        bytes=row.bytes,
        provider=row.provider,
        provider_id=None if found is None else found.provider_id,
        completed=None if found is None else found.completed,
        failed=None if found is None else found.failed,
        age_seconds=max(0, now - row.created_at) / 1000,
        seconds_since_sent=None if row.sent_at is None else max(0, now - row.sent_at) / 1000,
        next_step_seconds=max(0, row.next_poll_at - now) / 1000 if row.state.is_open else None,
        error=row.error,
    )


async def _read(database: Database, run: str | None) -> list[BatchStatus]:
    now, found = await database.read(store.of_runs, run)
    return [_status_of(row, name, now) for name, row in found]


@checked
async def batches(
    run: str | None = None, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> list[BatchStatus]:
    """Return the batches of one run, or of all, the oldest first."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await _read(database, run)


@checked
async def forget_batch(nonce: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False) -> int:
    """Give up an open batch, for example of a lost key; return how many of its jobs are due again.

    What the provider answers to them is lost, and they are paid for again. Raises UsageError if no open batch has it.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await database.write(store.forget, nonce)


async def look(database: Database, names: str | Collection[str] | None) -> Status:
    """Return the state of one run, of all, or of the open ones and those named, with their open batches."""
    view = await database.read(reads.overview, names)
    status = status_of(view)
    if not any(one.counts[counters.PARKED] for one in view.runs):
        return status
    found = await _read(database, names if isinstance(names, str) else None)
    return replace(status, batches=[one.to_dict() for one in found if BatchState(one.state).is_open])


def describe(found: list[BatchStatus]) -> str:
    """Return the table that `lbr batches` prints."""
    if not found:
        return "no batches; `lbr enqueue --lane batch` makes a run that a worker sends in batches"
    return aligned([LISTED, *map(_listed, found)])


def _listed(one: BatchStatus) -> tuple[str, ...]:
    size = "-" if one.bytes is None else f"{one.bytes / 1e6:.1f} MB"
    step = (
        "-"
        if one.next_step_seconds is None
        else "due"
        if not one.next_step_seconds
        else f"in {duration(one.next_step_seconds)}"
    )
    place = f"{one.provider_id}, {one.completed or 0} done, {one.failed or 0} failed" if one.provider_id else "-"
    error = f"; {one.error}" if one.error else ""
    words = (one.run, one.nonce, one.state, str(one.requests), size, duration(one.age_seconds), step, place + error)
    return tuple(map(printable, words))
