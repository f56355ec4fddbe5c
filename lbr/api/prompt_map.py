"""`prompt_map`: enqueue, work and collect as one awaitable call, and the export of what it left behind."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from contextlib import suppress
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lbr.api import status
from lbr.api.arguments import checked
from lbr.api.enqueue import check_may_be_new, put
from lbr.api.task import ask, changed_by_use, check_servable
from lbr.core.config import (
    CALL_TIMEOUT,
    DB_URL_DEFAULT,
    MAX_ATTEMPTS,
    WorkOptions,
    at_least_one,
    load_environment,
    one_of,
)
from lbr.core.errors import DatabaseBusyError, LbrError, UsageError
from lbr.core.pricing import read_price
from lbr.core.types import JobState, Run, RunState, Shape, canonical_json
from lbr.io import writers
from lbr.io.sources import Source
from lbr.store import reads, redo, results_db, runs
from lbr.store.database import file_of, opened, remove_queue, shown
from lbr.store.runs import RunSpec
from lbr.store.sql import PAGE
from lbr.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from lbr.api.task import ResolvedTask
    from lbr.core.types import Json, PathOrUrl, Row
    from lbr.store.database import Database

RETURN_DTYPES = ("list[dict]", "list[str]", "list[tuple[str,str]]", "polars")
RESULTS_BESIDE = "runs.db"
COLUMNS = ("idx", "id", "key", "prompt", "status", "result", "error", "metadata")


@checked
async def prompt_map(
    prompts: Iterable[str | dict[str, Json]],
    worker: Callable[[str], Awaitable[str]] | Callable[..., Any] | None = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    instructions: str | None = None,
    template: str | None = None,
    settings: dict[str, Json] | None = None,
    version: str | None = None,
    concurrency: int = 32,
    max_attempts: int = MAX_ATTEMPTS,
    timeout: float = CALL_TIMEOUT,
    lease: float = 60.0,
    price: str | None = None,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    results_db_url: PathOrUrl | None = None,
    output_shape: str = Shape.UNIQUE,
    return_dtype: str = "list[dict]",
    progress_every: int | None = 200,
    retry_failed: bool = True,
    fresh: bool = False,
    teardown: bool = False,
    run: str | None = None,
) -> Any:
    """Answer every prompt, keep every answer, and return them; the same call again resumes.

    Who answers: `worker`, an async (or plain) function from str to str, dict or BaseModel; else `model_name`
    (with `openrouter_api_key` where it is OpenRouter's); else MODEL and OPENROUTER_API_KEY from the
    environment or `.env`. `result_type` is a pydantic class: results are JSON strings that fit it.

    `output_shape`: "unique", a row per distinct prompt in order of first occurrence, or "original", a row per
    prompt. Rows are idx, key, prompt, status ("done" or "missing"), result (None unless done), error, and id and
    metadata where the prompt had them. `return_dtype`: "list[dict]"; "list[str]", the results, "" where missing;
    "list[tuple[str,str]]", prompt and result; "polars", a DataFrame of the rows, always with id and metadata, which
    is JSON.

    The answers are mirrored to `results_db_url`, `runs-results.db` beside `runs.db` if unset. `run` names the
    run; unset, equal tasks and prompts are one run. No prompts are no rows, and nothing is written. Where that run holds more inputs, they are answered and
    mirrored too, and the rows of `prompts` alone are returned. `retry_failed` tries again what failed in an earlier call,
    `fresh` refuses answers of other runs. `progress_every` prints a line to stderr for so many ended jobs,
    None never. `price`, like "in=0.15,out=0.60" in US dollars for a million tokens, is what calls cost from now
    on; None leaves it as it is. `teardown` removes queue and results files when everything is done, and only then: never while
    another process uses them, nor when they hold other runs.

    Raises UsageError, InputError, OutputError or DatabaseError; for what is wrong with the arguments, before any call.
    Cancelled or interrupted, everything answered stays.
    """
    shape, every = Shape(one_of("output_shape", output_shape, tuple(Shape))), progress_every or 0
    if every < 0:
        raise UsageError(f"expected progress_every to be a whole number of at least 0, or None, got: {every}")
    if one_of("return_dtype", return_dtype, RETURN_DTYPES) == "polars":
        _polars()  # before any call is paid for
    options = WorkOptions(concurrency=concurrency, lease=lease, timeout=timeout)
    said = None if price is None else read_price(price)
    asked = ask(
        model=model_name,
        function=worker,
        version=version,
        instructions=instructions,
        template=template,
        settings=settings,
        result_type=result_type,
        openrouter_api_key=openrouter_api_key,
        env=load_environment(Path.cwd()),
    )
    source = Source.of(prompts, template=template)
    if source.is_empty:
        return _shaped([], return_dtype)
    results_url = results_db_url or results_url_of(db_url)
    await source.check()
    await _check_results(results_url, db_url)
    await check_servable(asked)
    name = _run_name(asked, source) if run is None else run
    tries = at_least_one("max_attempts", max_attempts)
    spec = RunSpec(name, asked.task, tries, asked.fingerprint, said, asked.refusal)
    check_may_be_new(spec, db_url)
    async with opened(db_url, create=True) as database:
        report = await put(database, spec, source, fresh=fresh)
        for notice in report.notices:
            _say(notice)
        found = await reads.find_run(database, name)
        if retry_failed:
            await redo.retry(database, found)
        if found.state is RunState.PAUSED:
            # Whoever calls again has mended what paused it, or will be told once more.
            await runs.resume(database, found, moved=False)
        await _work(database, asked, options, found, every)
        rows = [row async for page in _answers(database, found, shape) for row in page]
    mirrored = await _mirror(results_url, name, rows)
    # The run may hold more, from a longer list; it begins with these, so the first of equal ones are among them.
    answer = _shaped([row for row in rows if row.idx < report.counts.inputs], return_dtype)
    if teardown and mirrored and all(row.status == JobState.DONE for row in rows):
        await _tear_down(db_url, results_url, name)
    return answer


async def _check_results(results_url: PathOrUrl, db_url: PathOrUrl) -> None:
    """Raise what `store.mirror.check` does, before any call is paid for."""
    # Whoever has it locked now may have let go of it when the answers are there.
    with suppress(DatabaseBusyError):
        await results_db.check(results_url, name="results_db_url", queue=file_of(db_url))


async def _mirror(results_url: PathOrUrl, run: str, rows: list[Row]) -> bool:
    """Write the rows to the results database; one that cannot be written must not cost the caller the answers."""
    try:
        await results_db.write_run(results_url, run, _pages(rows))
    except LbrError as error:
        _say(f"the results database was not written: {error}")
        return False
    return True


@checked
async def export_jsonl(
    db_url: PathOrUrl = DB_URL_DEFAULT,
    *,
    out: PathOrUrl,
    run: str | None = None,
    output_shape: str = Shape.ORIGINAL,
) -> int:
    """Write a run's rows as JSONL and return how many; where `run` is None, those of the run created last.

    `db_url` is a queue, or a results database, whose rows have the shape they were written with. The file
    appears whole or not at all.
    """
    shape = Shape(one_of("output_shape", output_shape, tuple(Shape)))
    writers.check_output(fspath(out))
    names = await results_db.runs_in(db_url) if file_of(db_url) is not None else []
    if names:
        return await _export_results(db_url, run or names[-1], fspath(out))
    async with opened(db_url) as database:
        found = await reads.find_run(database, run) if run else await _newest(database)
        count = 0
        async with writers.output_lock(fspath(out)):
            with writers.open_writer(fspath(out), writers.OutputFormat.JSONL) as writer:
                async for page in _answers(database, found, shape):
                    writer.write(page)
                    count += len(page)
        return count


async def _export_results(db_url: PathOrUrl, run: str, out: str) -> int:
    count = 0
    async with writers.output_lock(out):
        with writers.atomic_path(out) as temporary:
            with temporary.open("wb") as handle:
                async for page in results_db.read_run(db_url, run):
                    handle.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in page)
                    count += len(page)
            if not count:
                raise UsageError(f"expected a run of the results database, got: {run!r}")
    return count


async def _newest(database: Database) -> Run:
    found = await reads.all_runs(database)
    if not found:
        raise UsageError(f"expected a run in {database.name}, got: none")
    return found[-1]


def results_url_of(db_url: PathOrUrl) -> str:
    """Return where the results of a queue go: `runs-results.db` beside `runs.db`, or here if that is on a server."""
    path = file_of(db_url) or Path(RESULTS_BESIDE)
    return f"sqlite+aiosqlite:///{path.with_name(f'{path.stem}-results{path.suffix}')}"


def _run_name(asked: ResolvedTask, source: Source) -> str:
    """Name a run by what it asks and of what, so that the same call finds it again."""
    digest = hashlib.blake2b(asked.task.canonical(), digest_size=8)
    for item in source:
        metadata = "None" if item.metadata is None else canonical_json(item.metadata).decode()
        own_id = "" if item.custom_id is None else str(item.custom_id)
        for part in (item.prompt.body(), own_id, metadata):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return f"map-{digest.hexdigest()}"


async def _work(database: Database, asked: ResolvedTask, options: WorkOptions, run: Run, every: int) -> None:
    worker = Worker(database, asked.authority, options, run_names=[run.name], notify=_say)
    working = asyncio.create_task(worker.run())
    watching = asyncio.create_task(_report(database, run, every)) if every else None
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        raise
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        for notice in changed_by_use(asked.authority):
            _say(notice)


async def _report(database: Database, run: Run, every: int) -> None:
    """Print a line whenever another `every` jobs have come to their end."""
    told, started = 0, asyncio.get_running_loop().time()
    (first,) = status.status_of(await reads.overview(database, run.name)).runs
    before = first.done + first.failed
    told = before // every
    while True:
        await asyncio.sleep(0.2)
        (now,) = status.status_of(await reads.overview(database, run.name)).runs
        ended = now.done + now.failed
        if ended // every > told:
            told = ended // every
            elapsed = asyncio.get_running_loop().time() - started
            rate = (ended - before) / elapsed if now.done > first.done else 0.0
            _say(status.one_line(now, rate=rate))


async def _answers(database: Database, run: Run, shape: Shape) -> AsyncIterator[list[Row]]:
    """Yield a run's rows with two words for their status: done or missing."""
    async for page in reads.rows(database, run, shape):
        yield [row if row.status == JobState.DONE else row.missing() for row in page]


async def _pages(rows: list[Row]) -> AsyncIterator[list[Row]]:
    for start in range(0, len(rows), PAGE):
        yield rows[start : start + PAGE]


def _shaped(rows: list[Row], return_dtype: str) -> Any:
    match return_dtype:
        case "list[str]":
            return [row.result or "" for row in rows]
        case "list[tuple[str,str]]":
            return [(row.prompt.body(), row.result or "") for row in rows]
        case "polars":
            return _frame(rows)
    return [row.to_dict() for row in rows]


def _polars() -> Any:
    try:
        import polars as pl  # noqa: PLC0415 - heavy, and only for those who ask for it
    except ImportError:
        raise UsageError(
            "expected polars to be installed, got: no such package; `pip install polars`"
        ) from None
    return pl


def _frame(rows: list[Row]) -> Any:
    """Return the rows with the same columns for every call, id and metadata too, as the results database has them.

    Ids are text, unless all of them are numbers.
    """
    pl = _polars()
    types = dict.fromkeys(COLUMNS, pl.String) | {"idx": pl.Int64}
    texts = [row.to_dict() | {"prompt": row.prompt.body(), "metadata": _json_or_none(row)} for row in rows]
    with_id = [row for row in texts if "id" in row]
    if with_id and all(isinstance(row["id"], int) for row in with_id):
        types["id"] = pl.Series([row["id"] for row in with_id]).dtype
    else:
        for row in with_id:
            row["id"] = str(row["id"])
    return pl.DataFrame([{name: row.get(name) for name in COLUMNS} for row in texts], schema=types)


def _json_or_none(row: Row) -> str | None:
    return None if row.metadata is None else orjson.dumps(row.metadata).decode()


async def _tear_down(db_url: PathOrUrl, results_url: PathOrUrl, run: str) -> None:
    for name, removing in (
        (shown(db_url), remove_queue(db_url, run=run)),
        (shown(results_url), results_db.remove(results_url, run=run)),
    ):
        try:
            removed = await removing
        except LbrError as error:
            _say(f"teardown: {error}")
            continue
        if not removed:
            _say(f"teardown: {name} stays: it holds other runs, or another process uses it")


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        print(f"lbr: {line}", file=sys.stderr)
