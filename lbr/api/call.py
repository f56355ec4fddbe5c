"""One call of `prompt_map` or `stream`: its options are checked, and its prompts are put into a run and answered."""

from __future__ import annotations

import hashlib
import logging
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lbr.api.enqueue import put, run_spec
from lbr.api.task import change_warnings, check_servable, resolve_task
from lbr.core import config
from lbr.core.config import WorkOptions, load_environment
from lbr.core.pricing import read_price
from lbr.core.types import PauseCause, RunState, canonical_json
from lbr.io.samples import Sample
from lbr.io.sources import Source
from lbr.store import reads, redo, runs
from lbr.store.database import opened
from lbr.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lbr.api.arguments import Frame, Function, Inputs
    from lbr.api.task import ResolvedTask
    from lbr.core.types import Json, PathOrUrl, Run
    from lbr.store.database import Database

LOGGER = logging.getLogger("lbr")


class Options(TypedDict, total=False):
    """The options that `prompt_map` and `stream` have in common; `Call` has their defaults."""

    schema: dict[str, Json] | None
    instructions: str | None
    template: str | None
    prompt_column: str | None
    id_column: str | None
    limit: int | None
    pick: int | None
    seed: int | None
    samples: int
    lane: str | None
    settings: dict[str, Json] | None
    tier: str | None
    version: str | None
    concurrency: int
    max_attempts: int
    timeout: float | None
    lease: float
    rpm: int | None
    tpm: int | None
    max_cost: float | None
    price: str | None
    batch_factor: float | None
    keep: str | Sequence[str]
    warm_cache: bool
    db_url: PathOrUrl
    retry_failed: bool
    fresh: bool
    run: str | None


class MapOptions(Options, total=False):
    """The options of `prompt_map`, except those that decide the type of what it returns."""

    model: str | None
    function: Function
    output_shape: Literal["unique", "original"] | None
    unnest: bool
    progress_every: int | None
    results_db_url: PathOrUrl | None
    teardown: bool


class StreamOptions(Options, total=False):
    """The options of `stream`, except the type of its results."""

    model: str | None
    openrouter_api_key: str | None
    order: Literal["input", "finished"]


@dataclass(slots=True, repr=False)  # it may hold a key
class Call:
    """A call with its options, checked as far as that goes without reading all prompts. Raises UsageError."""

    prompts: Inputs | Frame
    model: str | None
    function: Function
    _: KW_ONLY
    openrouter_api_key: str | None = None
    result_type: Any = None
    schema: dict[str, Json] | None = None
    instructions: str | None = None
    template: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    limit: int | None = None
    pick: int | None = None
    seed: int | None = None
    samples: int = 1
    lane: str | None = None
    settings: dict[str, Json] | None = None
    tier: str | None = None
    version: str | None = None
    concurrency: int = config.CONCURRENCY
    max_attempts: int = config.MAX_ATTEMPTS
    timeout: float | None = None
    lease: float = config.LEASE
    rpm: int | None = None
    tpm: int | None = None
    max_cost: float | None = None
    price: str | None = None
    batch_factor: float | None = None
    keep: str | Sequence[str] = ()
    warm_cache: bool = False
    db_url: PathOrUrl = config.DB_URL_DEFAULT
    retry_failed: bool = True
    fresh: bool = False
    run: str | None = None
    source: Source = field(init=False)
    resolved: ResolvedTask = field(init=False)
    options: WorkOptions = field(init=False)

    def __post_init__(self) -> None:
        """Find out what is asked, and of which model or function."""
        of_worker = ("concurrency", "lease", "timeout", "rpm", "tpm", "max_cost")
        self.options = WorkOptions(**{name: getattr(self, name) for name in of_worker})
        columns: dict[str, Any] = {"prompt_column": self.prompt_column, "id_column": self.id_column}
        sample = Sample(self.limit, self.pick, self.seed)
        self.source = Source(self.prompts, template=self.template, sample=sample, **columns)
        of_task = ("model", "function", "version", "instructions", "template", "settings", "tier")
        asked = {
            name: getattr(self, name) for name in (*of_task, "schema", "result_type", "openrouter_api_key", "keep")
        }
        self.resolved = resolve_task(source=self.source, env=load_environment(Path.cwd()), **asked)

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[tuple[Database, Run, int]]:
        """Open the queue, put the prompts into their run, and let go on what failed or was paused.

        Yields the queue, the run, and how many of its inputs, the first ones, are these prompts. Raises UsageError or
        InputError, with nothing written, if that is not possible.
        """
        await self.source.check()
        await check_servable(self.resolved)
        name = (
            _run_name(self.resolved, self.source, self.samples) if self.run is None else self.source.run_name(self.run)
        )
        price, warm = read_price(self.price, self.batch_factor), self.warm_cache
        spec = run_spec(name, self.resolved, self.max_attempts, price, self.samples, lane=self.lane, warm_cache=warm)
        async with opened(self.db_url, create=True) as database:
            report = await put(database, spec, self.source, fresh=self.fresh)
            for notice in (*report.notices, *self.source.notices):
                warn(notice)
            found = await database.read(reads.find_run, name)
            if self.retry_failed:
                await redo.retry(database, found)
            if found.state is RunState.PAUSED:  # if its cause is still there, it is paused again
                await database.write(runs.resume, found, moved=False)
            yield database, found, report.counts.inputs

    async def work(self, database: Database, run: Run) -> None:
        """Answer the prompts of the run, and warn if it is paused. Cancelled, it gives its jobs back first."""
        try:
            worker = Worker(database, self.resolved.authority, self.options, run_names=[run.name], notify=warn)
            report = await worker.run()
        finally:
            for notice in change_warnings(self.resolved.authority):
                warn(notice)
        pause = report.paused.get(run.name)
        if pause is not None and pause.cause in {PauseCause.BUDGET, PauseCause.USER}:  # the worker reports the others
            higher = " with a higher max_cost" * (pause.cause is PauseCause.BUDGET)
            warn(f"run {run.name} is paused: {pause.message}; the same call{higher} goes on")


def warn(line: str) -> None:
    """Log a notice for the user: without a logging setup, Python prints it to stderr."""
    LOGGER.warning("%s", line)


def _run_name(resolved: ResolvedTask, source: Source, samples: int) -> str:
    """Return a name made of the task, the prompts and the samples, so that the same call finds its run again."""
    digest = hashlib.blake2b(resolved.task.canonical() + ",".join(resolved.keep).encode(), digest_size=8)
    for item in source:
        metadata = "None" if item.metadata is None else canonical_json(item.metadata).decode()
        own_id = "" if item.custom_id is None else str(item.custom_id)
        for part in (item.prompt.body(), own_id, metadata):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return f"map-{digest.hexdigest()}{f'-{samples}' * (samples > 1)}"
