"""Looking after runs that are there: how they stand, and what a person may change of them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.status import RunStatus, Status, limit_fields, status_of
from lbr.api.task import check_settings, checker
from lbr.core.config import DB_URL_DEFAULT, a_minute, at_least_one, nanos_of, one_of
from lbr.core.errors import UsageError
from lbr.core.text import pluralize
from lbr.core.types import JobState
from lbr.models.base import model_string
from lbr.store import limiting, reads, redo, runs
from lbr.store.budgets import budget_of
from lbr.store.database import opened
from lbr.store.queue import Queue
from lbr.worker.runs import check_tells_cost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from lbr.core.types import Json, PathOrUrl, Paused, Run
    from lbr.store.database import Database
    from lbr.store.reads import JobDetail
    from lbr.store.redo import Reparsed

FUNCTION = "function:"
MAX_SCOPE = 1_000
WAIT_SECONDS = 0.2


@checked
async def status(
    run: str | None = None, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> Status:
    """Return how one run stands, or all of them, with the workers that report."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return status_of(await reads.overview(database, run))


async def follow(
    run: str, *, seconds: float, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> AsyncIterator[RunStatus]:
    """Yield a run's status now and every so often, until it has finished."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        while True:
            (now,) = status_of(await reads.overview(database, run)).runs
            yield now
            if now.finished:
                return
            await asyncio.sleep(seconds)


@checked
async def retry(
    run: str,
    *,
    where: str | Sequence[str] = (),
    settings: dict[str, Json] | None = None,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> int:
    """Put a run's failed and cancelled jobs back to pending, or those that meet all of `where`; return how many.

    A condition is `family=…`, `error~TEXT`, `finish_reason=WORD` or `status=…`. An answer that is redone is kept among
    its job's tries. `settings` go over the task's for these jobs alone, also at later retries that name none.

    Raises UsageError, and changes nothing, for other conditions and for settings that no call could be made with.
    """
    conditions = redo.read_conditions([where] if isinstance(where, str) else where)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        if settings:
            check_settings(found.task, settings)
        return await redo.retry(database, found, conditions, settings or None)


@checked
async def reparse(
    run: str,
    *,
    result_types: Sequence[Any] = (),
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> Reparsed:
    """Validate the bad answers that a run's jobs failed with again, without a call; those that fit are taken.

    `result_types`, as objects or `pkg.mod:name`, are what the run's schema may be checked by. Raises UsageError for a
    run without a schema.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        return await redo.reparse(database, found, checker(run, found.task, result_types).check)


@checked
async def cancel(run: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False) -> int:
    """Cancel a run's pending jobs; return how many. Calls in flight end and their answers are kept."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await runs.cancel(database, await reads.find_run(database, run))


@checked
async def remove(
    run: str,
    *,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> int:
    """Remove a run with its inputs and answers, once its calls in flight have ended; return how many jobs it had.

    It is cancelled first, so that no job is claimed any more. Safe to repeat if it was interrupted. Raises UsageError
    for a run that is being or was moved.
    """
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        await runs.cancel(database, found)
        queue, told = Queue(database), False
        while (held := (await reads.counts(database, [found.id]))[0].of(JobState.INFLIGHT)) > 0:
            if not told:
                told = True
                notify(
                    f"run {run}: waiting for {pluralize(held, 'call')} in flight; no job is claimed any more"
                )
            # The jobs of dead workers, which no other may be there to take back.
            await queue.reclaim(await queue.dead_workers())
            await asyncio.sleep(WAIT_SECONDS)
        return await runs.remove(database, found)


@checked
async def pause(
    run: str, *, reason: str = "by hand", db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> None:
    """Stop the claiming of a run's jobs until `resume`.

    Raises UsageError for a reason that is not printable, and for a run that is cancelled, or being or was moved.
    """
    runs.check_reason(reason)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        await runs.pause(database, await reads.find_run(database, run), reason)


@checked
async def resume(
    run: str,
    *,
    max_cost: float | None = None,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> Paused | None:
    """Let a paused run's jobs be claimed again; return why it was paused, None where it was not.

    `max_cost` is what the run may cost from now on, in US dollars, all that it has cost included; inf lifts what
    is set, None leaves it. Raises UsageError where that leaves no room for a call.
    """
    nanos = None if max_cost is None or max_cost == math.inf else nanos_of("max_cost", max_cost)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        if nanos is not None:
            check_tells_cost(found)
        budget: dict[str, Any] = {} if max_cost is None else {"budget_nanos": nanos}
        await _check_room(database, found, budget.get("budget_nanos", found.budget_nanos))
        await runs.resume(database, found, **budget)
        return found.pause


async def _check_room(database: Database, run: Run, limit: int | None) -> None:
    """Raise UsageError where a run has jobs left, and no room for a call in so many billionths of a US dollar."""
    if limit is None:
        return
    (seen,) = (await reads.overview(database, run.name)).runs
    budget = budget_of(limit, seen.counts)
    if seen.open and budget.is_spent:
        raise UsageError(f"run {run.name}: {budget.spent_message}; give it more with --max-cost")


@checked
async def limit(
    scope: str | None = None,
    values: Mapping[str, int | None] | None = None,
    *,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> list[dict[str, Json]]:
    """Set the limits of one answerer for all workers, and return them; with no `scope`, return those of all.

    `scope` is the name of a model or function as `status` tells it. `values` may have `rpm` and `tpm`, requests
    and tokens a minute, and `concurrency`, calls at a time; None lifts what is set, and what has no name in it
    stays. Each has beside its limits, in `runs`, how many runs of the queue are answered so. Raises UsageError for a
    name or a number out of range.
    """
    changes = dict(values or {})
    for name, value in changes.items():
        one_of("limit", name, ("rpm", "tpm", "concurrency"))
        if value is not None:
            at_least_one(name, value) if name == "concurrency" else a_minute(name, value)
    answerer = None if scope is None else _answerer(scope)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        if changes and answerer is not None:
            await limiting.change(database, answerer, changes)
        view = await reads.overview(database)
        answered = Counter(one.run.task.answerer for one in view.runs)
        found = [limit_fields(one) | {"runs": answered[one.answerer]} for one in view.limits]
        return [one for one in found if answerer in {None, one["answerer"]}]


def _answerer(scope: str) -> str:
    """Return the answerer that a scope names; UsageError for what can be the name of none."""
    named = scope.removeprefix(FUNCTION)
    if not named or named != named.strip() or not scope.isprintable() or len(scope) > MAX_SCOPE:
        raise UsageError(
            f"expected a scope as `lbr status` names it, openai-chat:gpt-4o-mini or function:module:name say, got: "
            f"{scope[:100]!r}"
        )
    return scope if named != scope else model_string(scope)


@checked
async def show(
    run: str, idx: int, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> JobDetail:
    """Return everything about one input: its job, its answer and every try that was no plain success."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await reads.story(database, await reads.find_run(database, run), idx)
