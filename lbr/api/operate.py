"""Show and change runs that exist."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.batches import look
from lbr.api.status import RunStatus, Status, limit_fields, run_status
from lbr.api.task import answer_validator, check_settings
from lbr.core.config import DB_URL_DEFAULT, a_minute, at_least_one, nanos_of, one_of
from lbr.core.errors import UsageError
from lbr.core.text import pluralize, seconds_of
from lbr.core.types import JobState
from lbr.models.base import model_string
from lbr.store import batches, inputs, leases, limits, reads, redo, runs
from lbr.store.database import backup as backup_queue
from lbr.store.database import file_of, opened
from lbr.store.health import open_unchanged
from lbr.store.runs import cancel_unchanged
from lbr.worker.runs import check_tells_cost, check_tells_other_cost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from lbr.core.types import Json, PathOrUrl, Paused, Run
    from lbr.store.database import Database
    from lbr.store.reads import JobDetail
    from lbr.store.redo import Reparsed

FUNCTION = "function:"
MAX_SCOPE = 1_000
WAIT_SECONDS = 0.2
NAMES_SECONDS = 2.0


@checked
async def status(
    run: str | None = None, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> Status:
    """Return the state of one run, or of all, with the workers that report."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await look(database, run)


async def names(db_url: PathOrUrl) -> list[tuple[str, str]]:
    """Return the names of the newest runs, each with its model or function, and change nothing; [] without a queue."""
    if (file := file_of(db_url)) is not None and not file.is_file():
        return []
    database = open_unchanged(db_url)
    try:
        async with asyncio.timeout(NAMES_SECONDS):
            return await database.quick_read(runs.newest_names)
    finally:
        await database.close()


@checked
async def retry(
    run: str,
    *,
    where: str | Sequence[str] = (),
    settings: dict[str, Json] | None = None,
    model: str | None = None,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> int:
    """Put a run's failed and cancelled jobs back to pending, or those that match all of `where`; return how many.

    A condition is `family=…`, `error~TEXT`, `finish_reason=WORD` or `status=…`. An answer that is redone stays in the
    job's history. `settings` override the task's for these jobs only, and `model` answers them instead of the run's,
    also at later retries without any. No other run reuses these answers.

    Raises UsageError, and changes nothing, for other conditions, and for settings that no call can have.
    """
    conditions = redo.read_conditions([where] if isinstance(where, str) else where)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        own = dict(settings or {})
        if own or model is not None:
            name = None if model is None else model_string(model)
            check_settings(found.task, own, found.keep, name)
            if name is not None:
                check_tells_other_cost(found, name)
                own["model"] = name
        return await redo.retry(database, found, conditions, own or None)


@checked
async def reparse(
    run: str, *, result_types: Sequence[Any] = (), db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> Reparsed:
    """Validate the bad answers of a run's failed jobs again, without a call, and accept those that fit.

    `result_types`, as objects or `pkg.mod:name`, may hold the class of the run's schema, to validate with it. Raises
    UsageError for a run without a schema.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        return await redo.reparse(database, found, answer_validator(run, found.task, result_types).check)


@checked
async def cancel(run: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False) -> int:
    """Cancel a run and its pending jobs; return how many. Calls in flight finish, and their answers are kept.

    The next worker asks the provider to end its batches, and keeps the answers that they have.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        return await runs.cancel(database, found) + await database.write(batches.cancel, found)


@checked
async def remove(
    run: str,
    *,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> int:
    """Remove a run with its inputs and answers; return how many jobs it had.

    It is cancelled first, and calls in flight are waited for. Safe to repeat after an interruption. Raises UsageError
    for a run that is being or was moved, and while a batch of it is open.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        await database.read(batches.check_none_out, found)
        await runs.cancel(database, found)
        await database.read(batches.check_none_out, found)  # again: none can come now
        count = await _remove_cancelled(database, found, notify)
        await database.give_back_space()
        return count


async def _remove_cancelled(database: Database, run: Run, notify: Callable[[str], None]) -> int:
    warned = False
    while inflight := (await database.read(reads.counts, [run.id]))[0].of(JobState.INFLIGHT):
        if not warned:
            notify(f"run {run.name}: waiting for {pluralize(inflight, 'call')} in flight; no more jobs are claimed")
        warned = True
        # Perhaps no other worker is left to do it.
        await leases.reclaim(database, await database.read(leases.dead_workers, database.presence))
        await asyncio.sleep(WAIT_SECONDS)
    return await runs.remove(database, run)


@checked
async def prune(
    older: str,
    *,
    runs: Sequence[str] | None = None,
    dry_run: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> list[RunStatus]:
    """Remove the finished and cancelled runs whose last change is `older`, for example `30d`; return them.

    `runs` limits this to some names. With `dry_run`, nothing is removed. A run that changes meanwhile stays, and so
    does one that was moved, or has a batch out. Safe to repeat after an interruption. Raises UsageError for what is no
    time span.
    """
    age_ms = seconds_of("--older", older) * 1000
    pruned = []
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        now, out = await database.read(reads.time), await database.read(batches.runs_of_open)
        for seen in await database.read(reads.idle_runs, age_ms):
            if runs is not None and seen.run.name not in runs:
                continue
            if seen.run.id in out:
                continue
            if not dry_run:
                if not await database.write(cancel_unchanged, seen.run, seen.counts):
                    continue
                await _remove_cancelled(database, seen.run, notify)
            pruned.append(run_status(seen, now))
        if not dry_run:
            await database.give_back_space()
    return pruned


@checked
async def backup(
    file: PathLike[str] | str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> None:
    """Copy a SQLite queue to a new file, as it is at one moment, while workers go on; only you can read the file.

    Raises UsageError for a queue on PostgreSQL and for a file that exists, OutputError if it cannot be written.
    """
    await backup_queue(db_url, file, allow_network_fs=allow_network_fs)


@checked
async def pause(
    run: str, *, reason: str = "by the user", db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> None:
    """Stop claiming a run's jobs until `resume`; calls in flight go on.

    Raises UsageError for a reason that is not printable, and for a run that is cancelled, or being or was moved.
    """
    runs.check_reason(reason)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        await database.write(runs.pause, await database.read(reads.find_run, run), reason)


@checked
async def resume(
    run: str, *, max_cost: float | None = None, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> Paused | None:
    """Let a paused run's jobs be claimed again; return why it was paused, None if it was not.

    `max_cost` limits the run's total cost in US dollars, past calls included; inf removes the limit, None leaves it.
    Raises UsageError if that leaves no room for a call.
    """
    nanos = None if max_cost is None or max_cost == math.inf else nanos_of("max_cost", max_cost)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        if nanos is not None:
            check_tells_cost(found)
        new_limit = found.budget_nanos if max_cost is None else nanos
        if new_limit is not None:
            (seen,) = (await database.read(reads.overview, run)).runs
            budget = limits.budget_of(new_limit, seen.counts)
            if seen.open and budget.is_spent:
                raise UsageError(f"run {run}: {budget.spent_message}; give it more with --max-cost")
        if max_cost is None:
            await database.write(runs.resume, found)
        else:
            await database.write(runs.resume, found, budget_nanos=nanos)
        return found.pause


@checked
async def limit(
    scope: str | None = None,
    values: Mapping[str, int | None] | None = None,
    *,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> list[dict[str, Json]]:
    """Set the limits of one model or function for all workers, and return them; without a `scope`, return all.

    `scope` is its name as in `status`. `values` may have `rpm` and `tpm`, requests and tokens a minute, and `concurrency`,
    calls at a time; None removes a limit, and those not named stay. `runs` in the result is the number of its runs in the
    queue. Raises UsageError for a name or a number out of range.
    """
    changes = dict(values or {})
    for name, value in changes.items():
        one_of("limit", name, ("rpm", "tpm", "concurrency"))
        if value is not None:
            at_least_one(name, value) if name == "concurrency" else a_minute(name, value)
    answerer = None if scope is None else _answerer(scope)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        if changes and answerer is not None:
            await database.write(limits.set_limits, answerer, changes)
        view = await database.read(reads.overview)
        answered = Counter(one.run.task.answerer for one in view.runs)
        found = [limit_fields(one) | {"runs": answered[one.answerer]} for one in view.limits]
        return [one for one in found if answerer in {None, one["answerer"]}]


def _answerer(scope: str) -> str:
    """Return the model or function that a scope names; UsageError for what cannot be a name."""
    name = scope.removeprefix(FUNCTION)
    if not name or name != name.strip() or not scope.isprintable() or len(scope) > MAX_SCOPE:
        raise UsageError(
            f"expected a name as in `lbr status`, for example openai-chat:gpt-4o-mini or function:module:name, got: "
            f"{scope[:100]!r}"
        )
    return scope if name != scope else model_string(scope)


@checked
async def show(
    run: str,
    idx: int | None = None,
    *,
    custom_id: str | None = None,
    sample: int = 0,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> JobDetail:
    """Return everything about one input: its job, its answer, and every attempt that failed or came too late.

    `idx` is its index from 0, or `custom_id` its id as text. `sample`: which of its answers, from 0, if the run has
    several samples.
    """
    if (idx is None) == (custom_id is None):
        raise UsageError("name one input: by its index, from 0, or by its id")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        if custom_id is not None:
            idx = await database.read(inputs.idx_of, found, custom_id)
        return await database.read(reads.story, found, idx or 0, sample)
