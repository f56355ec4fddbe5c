"""Be a worker of a queue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.finish import Hooks, reported
from lbr.api.metrics import served
from lbr.api.task import authorize, change_warnings
from lbr.core import config
from lbr.core.batches import Lane
from lbr.core.config import DB_URL_DEFAULT, WorkOptions, load_environment, one_of
from lbr.core.types import Until
from lbr.store import reads
from lbr.store.database import opened
from lbr.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lbr.core.types import PathOrUrl
    from lbr.worker.calls import WorkReport


@checked
async def work(
    *,
    run: str | Sequence[str] | None = None,
    functions: Sequence[Callable[..., Any] | str] = (),
    result_types: Sequence[Any] = (),
    openrouter_api_key: str | None = None,
    concurrency: int = config.CONCURRENCY,
    lease: float = config.LEASE,
    until: str = Until.DONE,
    grace: float = config.GRACE,
    timeout: float | None = None,
    patience: float = config.PATIENCE,
    rpm: int | None = None,
    tpm: int | None = None,
    max_cost: float | None = None,
    outage_patience: float = config.OUTAGE_PATIENCE,
    on_finish: str | None = None,
    notify_url: str | None = None,
    metrics: int | None = None,
    lane: str = Lane.ALL,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    verbose: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    on_start: Callable[[Worker], None] = lambda _: None,
) -> WorkReport:
    """Be one worker of the queue: claim jobs and answer them. Times are in seconds.

    `run`: the runs to serve, None for all that this process can serve.
    `functions`, `result_types`: what it may use besides models, as objects or "pkg.mod:name".
    `concurrency`: calls at a time. `timeout`: the longest that a call may take; None is 120, or 900 at flex.
    `lease`: seconds before a silent worker's jobs are taken over.
    `until`: "done", when every job has finished; "empty", when nothing can be claimed; or "forever".
    `grace`: how long a drain waits for calls in flight. `patience`: how long a busy or unreachable database is waited for.
    `rpm`, `tpm`: requests and tokens a minute of all workers together, for each model or function that this one serves.
    `max_cost`: the most that each run that it serves may cost, in US dollars. None leaves the limits as they are.
    `outage_patience`: how long to wait for an unreachable model before its runs are paused.
    `on_finish`: a command line for /bin/sh, run when a run that it serves has finished or is paused; `notify_url`: gets a
    POST of JSON then. Of several workers, one does it.
    `metrics`: a port of 127.0.0.1 that serves numbers of the queue for Prometheus; 0 takes a free one.
    `lane`: "online" to only call, "batch" to only send and settle batches, or "all".
    `notify`: called with each message for the user, with one for each failed attempt if `verbose`. `on_start`: called with the worker, which you can `drain` or `abort`.

    Raises UsageError, NothingToServeError or DatabaseError. Cancelled, it gives its jobs back first.
    """
    end = Until(one_of("until", until, tuple(Until)))
    rest: dict[str, Any] = {"max_cost": max_cost, "outage_patience": outage_patience, "verbose": verbose}
    rest["lane"] = Lane(one_of("lane", lane, (Lane.ONLINE, Lane.BATCH, Lane.ALL)))
    options = WorkOptions(concurrency, lease, end, grace, timeout, patience, rpm, tpm, **rest)
    env = load_environment(Path.cwd())
    key = openrouter_api_key or env.get("OPENROUTER_API_KEY") or None
    names = [run] if isinstance(run, str) else run
    authority = authorize(functions, result_types, openrouter_api_key=key, runs_are_named=names is not None)
    hooks = Hooks(on_finish, notify_url, db_url, notify)
    async with opened(db_url, allow_network_fs=allow_network_fs, patience=patience) as database:
        worker = Worker(database, authority, options, run_names=names, notify=notify)
        on_start(worker)
        try:
            async with served(database, metrics, notify), reported(database, worker.served, hooks):
                return await worker.run()
        finally:
            for notice in change_warnings(authority):
                notify(notice)


async def check_queue(db_url: PathOrUrl, names: Sequence[str], *, allow_network_fs: bool, patience: float) -> None:
    """Raise LbrError if a worker could not open its queue, or a named run does not exist."""
    async with opened(db_url, allow_network_fs=allow_network_fs, patience=patience) as database:
        for name in names:
            await database.quick_read(reads.find_run, name)
