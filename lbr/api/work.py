"""Work off a queue: one worker in this process, or several processes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.task import authorize, changed_by_use
from lbr.core.config import (
    DB_URL_DEFAULT,
    OUTAGE_PATIENCE,
    PATIENCE,
    WorkOptions,
    load_environment,
    one_of,
)
from lbr.core.types import Until
from lbr.store import reads
from lbr.store.database import opened, sole_worker
from lbr.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from lbr.core.types import PathOrUrl
    from lbr.worker.calls import WorkReport


@checked
async def work(
    *,
    run: str | Sequence[str] | None = None,
    functions: Sequence[Callable[..., Any] | str] = (),
    result_types: Sequence[Any] = (),
    openrouter_api_key: str | None = None,
    concurrency: int = 32,
    lease: float = 60.0,
    until: str = Until.DONE,
    grace: float = 30.0,
    timeout: float = 120.0,
    patience: float = PATIENCE,
    rpm: int | None = None,
    tpm: int | None = None,
    max_cost: float | None = None,
    outage_patience: float = OUTAGE_PATIENCE,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    on_start: Callable[[Worker], None] = lambda _: None,
) -> WorkReport:
    """Be one worker of the queue, until `done`, `empty` or `forever`.

    `run` names the runs to serve, None all that this process can. `functions` and `result_types`, as objects
    or `pkg.mod:name`, are what it may use beside models. Times are in seconds. `rpm` and `tpm` set the
    requests and tokens a minute of all workers together, for whatever this one serves, `max_cost` what each run
    that it serves may cost, in US dollars. `outage_patience` is how much waiting for a model that no call reaches it
    takes until its runs are paused. `notify` gets a line for
    whatever a person should know; `on_start` gets the worker, which can be told to `drain` or `abort`.

    Raises UsageError, NothingToServeError or DatabaseError. Cancelled, it gives its jobs back first.
    """
    options = WorkOptions(
        concurrency,
        lease,
        Until(one_of("until", until, tuple(Until))),
        grace,
        timeout,
        patience,
        rpm,
        tpm,
        max_cost,
        outage_patience,
    )
    env = load_environment(Path.cwd())
    key = openrouter_api_key or env.get("OPENROUTER_API_KEY") or None
    names = [run] if isinstance(run, str) else run
    authority = authorize(functions, result_types, openrouter_api_key=key, runs_are_named=names is not None)
    async with opened(db_url, allow_network_fs=allow_network_fs, patience=patience) as database:
        worker = Worker(database, authority, options, run_names=names, notify=notify)
        on_start(worker)
        try:
            return await worker.run()
        finally:
            for notice in changed_by_use(authority):
                notify(notice)


async def check_queue(
    db_url: PathOrUrl, names: Sequence[str], *, allow_network_fs: bool, patience: float
) -> None:
    """Raise what a worker would that cannot open its queue, or has a run named that is not there."""
    async with opened(db_url, allow_network_fs=allow_network_fs, patience=patience) as database:
        for name in names:
            await reads.find_run(database, name)


def exclusive(db_url: PathOrUrl, *, wanted: bool = True) -> AbstractAsyncContextManager[None]:
    """Be the only exclusive worker of a queue; AlreadyRunningError where another one is. A killed one frees it."""
    return sole_worker(db_url) if wanted else nullcontext()
