"""`lbr.doctor`: look at a queue from all sides, say what to do, and mend what can be mended without asking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.api.diagnosis import FIXING, Finding, Served, findings
from lbr.core.config import DB_URL_DEFAULT, load_environment
from lbr.core.errors import DatabaseError, LbrError, UsageError
from lbr.core.types import RunState
from lbr.models.base import Kind, kind_of
from lbr.models.build import Authority, build_model
from lbr.store import health, recount
from lbr.store.engines import opened
from lbr.store.queue_health import Problem
from lbr.worker import spool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.types import PathOrUrl, Run
    from lbr.store.health import Health
    from lbr.store.recount import Drift


@checked
async def doctor(
    *, fix: bool = False, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> list[Finding]:
    """Return what there is to say about a queue: in use or not, damaged, of another version, or none at all.

    Nothing is changed, unless `fix` is set: then counters that are off are mended, beside running workers. Each
    finding has a `check`, a `gravity` (ok, note, warning or error), what was `found`, and what to `do`. Raises
    UsageError for what cannot be a database's path or URL.
    """
    env = load_environment(Path.cwd())
    seen = await health.examine(db_url, allow_network_fs=allow_network_fs)
    mended: list[Drift] = []
    if fix and seen.queue is not None and seen.queue.drifts:
        try:
            mended = await _mend(seen, db_url, allow_network_fs=allow_network_fs)
        except LbrError as error:
            seen.problems.append(Problem(FIXING, str(error)))
        else:
            seen = await health.examine(db_url, allow_network_fs=allow_network_fs)
    return findings(
        seen, kept=spool.waiting(seen.spool_places), served=await _served(seen, env), mended=mended
    )


async def _mend(seen: Health, db_url: PathOrUrl, *, allow_network_fs: bool) -> list[Drift]:
    if seen.file is not None and seen.damages != []:
        raise DatabaseError("counters are not mended in a damaged file; see to the damage first")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await recount.mend(database)


async def _served(seen: Health, env: Mapping[str, str]) -> list[Served]:
    """Return of each run that goes on whether a worker with this environment could serve it."""
    if seen.queue is None or seen.queue.view is None:
        return []
    runs = [
        one.run
        for one in seen.queue.view.runs
        if one.run.state is not RunState.CANCELLED and not one.finished
    ]
    authority = Authority(openrouter_api_key=env.get("OPENROUTER_API_KEY") or None)
    return [await _serve(run, authority) for run in runs]


async def _serve(run: Run, authority: Authority) -> Served:
    answerer = run.task.answerer
    if kind_of(run.task) is Kind.FUNCTION:
        only = "the program that defines it" if run.task.fingerprint else f"--function {run.task.function}"
        return Served(run.name, answerer, None, function=only)
    try:
        # What a worker does first; neither the key nor the network is tried.
        model = build_model(run.task, authority, concurrency=1)
    except UsageError as error:
        return Served(run.name, answerer, str(error))
    await model.aclose()
    return Served(run.name, answerer, None)
