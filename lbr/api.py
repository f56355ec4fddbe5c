"""What lbr does with prompts, as functions: put them in, have them answered, take the answers out."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr import outputs
from lbr.answers import Collected, Tally, write_pages
from lbr.arguments import NAMES, checked
from lbr.asking import ask, authorize, changed_by_use, check_servable
from lbr.config import (
    DB_URL_DEFAULT,
    MAX_ATTEMPTS,
    PATIENCE,
    WorkOptions,
    at_least_one,
    load_environment,
    one_of,
)
from lbr.errors import UsageError
from lbr.jobs import JobState, KeyMaker, Shape, Until
from lbr.plurals import counted
from lbr.prices import read_price
from lbr.processes import run_processes
from lbr.serving import check_room
from lbr.sources import Source, chunks
from lbr.store import enqueue as queueing
from lbr.store import reads, runs
from lbr.store.engines import opened, sole_worker
from lbr.store.runs import RunSpec
from lbr.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from os import PathLike

    from lbr.arguments import PathOrUrl
    from lbr.calls import WorkReport
    from lbr.jobs import Item, Json, Run
    from lbr.store.database import Database
    from lbr.store.enqueue import EnqueueCounts

__all__ = [
    "Collected",
    "EnqueueReport",
    "collect",
    "enqueue",
    "exclusive",
    "run_processes",
    "work",
]

WAIT_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class EnqueueReport:
    """What an enqueue did: the run, its counts, and what its caller should hear."""

    run: str
    counts: EnqueueCounts
    notices: list[str] = field(default_factory=list)


@checked()
async def enqueue(
    inputs: PathLike[str] | Iterable[PathLike[str] | str | dict[str, Json]],
    *,
    run: str | None = None,
    model: str | None = None,
    function: Callable[..., Any] | str | None = None,
    version: str | None = None,
    instructions: str | None = None,
    template: str | None = None,
    schema: dict[str, Json] | None = None,
    result_type: Any = None,
    settings: dict[str, Json] | None = None,
    prompt_column: str | None = None,
    input_format: str | None = None,
    max_attempts: int = MAX_ATTEMPTS,
    price: str | None = None,
    append: bool = False,
    fresh: bool = False,
    servable: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    on_kept: Callable[[int], None] = lambda _: None,
) -> EnqueueReport:
    """Put inputs into a run as deduplicated jobs; safe to repeat, and to be repeated after a crash.

    `inputs` are files (a `Path`, or several; `Path("-")` is stdin) or prompts: strings, or dicts like the
    lines of a JSONL file. `run` may be left out for files: the first one's stem. With `append` they go
    behind what the run holds, else they must begin with it. `fresh` refuses answers of other runs. With
    `servable`, nothing is written where this process could not serve the run, for want of a key say.
    `price`, like "in=0.15,out=0.60" in US dollars for a million tokens, is what calls cost from now on; None
    leaves it as it is. `on_kept` gets how many of the inputs are in the run whenever some more are; cancelled, those
    stay there.

    Raises UsageError, InputError (with file and line; files are checked whole before anything is written),
    RunMismatchError, RunChangedError or DatabaseError.
    """
    asked = ask(
        model=model,
        function=function,
        version=version,
        instructions=instructions,
        template=template,
        settings=settings,
        schema=schema,
        result_type=result_type,
        env=load_environment(Path.cwd()),
    )
    source = Source.of(inputs, input_format=input_format, template=template, prompt_column=prompt_column)
    spec = RunSpec(
        source.run_name() if run is None else run,
        asked.task,
        at_least_one("max_attempts", max_attempts),
        asked.fingerprint,
        None if price is None else read_price(price),
    )
    await source.check()
    if servable:
        await check_servable(asked)
    async with opened(db_url, create=True, allow_network_fs=allow_network_fs) as database:
        return await put(database, spec, source, append=append, fresh=fresh, on_kept=on_kept)


async def put(
    database: Database,
    spec: RunSpec,
    items: Iterable[Item],
    *,
    append: bool = False,
    fresh: bool = False,
    on_kept: Callable[[int], None] = lambda _: None,
) -> EnqueueReport:
    """Put items into a run of an open database; see `enqueue`."""
    run = await runs.open_run(database, spec)
    changed = await _note_change(database, run, spec)
    notices = [*changed]
    if spec.max_attempts not in {run.max_attempts, MAX_ATTEMPTS}:
        notices.append(
            f"run {run.name} was made with {counted(run.max_attempts, 'attempt')} for a job; that stays so"
        )
    maker = KeyMaker(spec.task)
    place = 0
    counts = queueing.EnqueueCounts()
    for chunk in chunks(iter(items), queueing.CHUNK, characters=queueing.CHUNK_CHARACTERS):
        keys = [maker.key(item.prompt) for item in chunk]
        where = None if append else place
        counts += await queueing.add_chunk(database, run, where, chunk, keys, reuse=not fresh)
        if place == 0 and counts.new:
            await database.filled()
        place += len(chunk)
        on_kept(place)
    await runs.seal(database, run)
    if counts.new:
        await database.filled()
    if not changed:
        notices += await _note_reuse(database, run, spec)
    held = await queueing.next_idx(database, run)
    if held > place and not append:
        notices.append(
            f"run {run.name} holds {counted(held, 'input')}, this input has {place}; the others stay in it"
        )
    return EnqueueReport(run.name, counts, notices)


async def _note_change(database: Database, run: Run, spec: RunSpec) -> list[str]:
    """Tell whether the run may have answers of other code than the function has now."""
    if spec.fingerprint is None or run.fingerprint == spec.fingerprint:
        return []
    if await runs.adopt_fingerprint(database, run, spec.fingerprint):
        return []
    notice = (
        f"the code of {run.task.function} has changed since run {run.name} was made; its answers are kept. To redo "
        f"them, give the function another `version` and the run another name"
    )
    return [notice]


async def _note_reuse(database: Database, run: Run, spec: RunSpec) -> list[str]:
    """Tell whether the run has answers of a run that was made with other code."""
    if spec.fingerprint is None or spec.task.fingerprint is not None:
        return []  # a model, or a function whose code is part of the task
    lender = await queueing.lender_with_other_code(database, run, spec.fingerprint)
    if lender is None:
        return []
    notice = (
        f"the code of {run.task.function} has changed since run {lender} was made, whose answers run {run.name} reuses. "
        f"To redo them, use `--fresh` (fresh=True) or give the function another `version`, and the run another name"
    )
    return [notice]


@checked(run=NAMES)
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
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    on_start: Callable[[Worker], None] = lambda _: None,
) -> WorkReport:
    """Be one worker of the queue, until `done`, `empty` or `forever`.

    `run` names the runs to serve, None all that this process can. `functions` and `result_types`, as objects
    or `pkg.mod:name`, are what it may use beside models. Times are in seconds. `rpm` and `tpm` set the
    requests and tokens a minute of all workers together, for whatever this one serves, `max_cost` what each run
    that it serves may cost, in US dollars. `notify` gets a line for
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
    )
    env = load_environment(Path.cwd())
    key = openrouter_api_key or env.get("OPENROUTER_API_KEY") or None
    names = [run] if isinstance(run, str) else run
    authority = authorize(functions, result_types, openrouter_api_key=key, runs_are_named=names is not None)
    check_room()
    async with opened(db_url, allow_network_fs=allow_network_fs, patience=patience) as database:
        worker = Worker(database, authority, options, run_names=names, notify=notify)
        on_start(worker)
        try:
            return await worker.run()
        finally:
            for notice in changed_by_use(authority):
                notify(notice)


@checked()
async def collect(
    run: str,
    *,
    out: PathOrUrl | None = None,
    shape: str = Shape.ORIGINAL,
    format: str | None = None,  # noqa: A002 - the word of the command line
    wait: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> Collected:
    """Write a run's answers in input order, or return them as `rows` where `out` is None; "-" is stdout.

    A file appears whole or not at all; a results database keeps the rows of other runs. With `wait`, only once every job has come to its end; else whatever
    there is now. Raises RunNotFoundError, UsageError, OutputError or DatabaseError.
    """
    target = None if out is None or fspath(out) == "-" else fspath(out)
    if out is not None:
        outputs.check_output(target)
    kind = (
        outputs.OutputFormat(one_of("format", format, tuple(outputs.OutputFormat)))
        if format is not None
        else None
    )
    kind = kind or outputs.format_of(target)
    chosen = Shape(one_of("shape", shape, tuple(Shape)))
    if kind is outputs.OutputFormat.DB and target is None:
        raise UsageError("expected -o FILE for a results database, got: stdout")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = await reads.find_run(database, run)
        if wait:
            await until_finished(database, found)
        pages = Tally(reads.rows(database, found, chosen))
        rows = None
        if out is None:
            rows = [row.to_dict() async for page in pages for row in page]
        else:
            await write_pages(database, found, pages, target, kind)
        found = await reads.find_run(database, run)
        return Collected(run, dict(pages.by_status), found.sealed_at is not None, rows, pages.cut_off)


async def until_finished(database: Database, run: Run) -> None:
    """Wait until every job of a run has come to its end and all its inputs are in.

    Returns as well where the run is paused or cancelled: nothing more would come.
    """
    while True:
        (counts,) = await reads.counts(database, [run.id])
        if counts.finished or (counts.run.state != "active" and not counts.of(JobState.INFLIGHT)):
            return
        await asyncio.sleep(WAIT_SECONDS)


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
