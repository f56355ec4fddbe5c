"""`prompt_map`: enqueue, work and collect in one awaitable call; and `export_jsonl`."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from contextlib import suppress
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.enqueue import put, run_spec
from lbr.api.status import one_line, status_of
from lbr.api.task import change_warnings, check_servable, resolve_task
from lbr.core.config import CALL_TIMEOUT, DB_URL_DEFAULT, MAX_ATTEMPTS, WorkOptions, load_environment, one_of
from lbr.core.errors import DatabaseBusyError, LbrError, UsageError
from lbr.core.types import JobState, Part, Run, RunState, Shape, canonical_json
from lbr.io import frames, writers
from lbr.io.samples import Sample
from lbr.io.sources import Source
from lbr.io.table import Kinds, make_table
from lbr.store import reads, redo, results_db, runs
from lbr.store.database import file_of, opened, remove_queue, shown
from lbr.store.sql import PAGE
from lbr.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from lbr.api.status import RunStatus
    from lbr.api.task import ResolvedTask
    from lbr.core.types import AnswerRow, Json, PathOrUrl
    from lbr.store.database import Database

RETURN_DTYPES = ("list[dict]", "list[str]", "list[tuple[str,str]]", "polars")
RESULTS_BESIDE = "runs.db"  # if the queue is on a server
REPORT_SECONDS = 0.2


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
    prompt_column: str | None = None,
    id_column: str | None = None,
    limit: int | None = None,
    pick: int | None = None,
    seed: int | None = None,
    settings: dict[str, Json] | None = None,
    version: str | None = None,
    concurrency: int = 32,
    max_attempts: int = MAX_ATTEMPTS,
    timeout: float = CALL_TIMEOUT,
    lease: float = 60.0,
    price: str | None = None,
    keep: str | Sequence[str] = (),
    db_url: PathOrUrl = DB_URL_DEFAULT,
    results_db_url: PathOrUrl | None = None,
    output_shape: str = Shape.UNIQUE,
    return_dtype: str = "list[dict]",
    unnest: bool = True,
    progress_every: int | None = 200,
    retry_failed: bool = True,
    fresh: bool = False,
    teardown: bool = False,
    run: str | None = None,
) -> Any:
    """Answer every prompt, keep every answer, and return them. The same call again resumes.

    `prompts`: strings, or dicts with `prompt` or `messages` and other fields, as lines of JSONL, or files as for
    `enqueue`. None of them: no rows.
    `worker`: an async or plain function from str to str, dict or BaseModel that answers. Without it, `model_name` does,
    for example "openai-chat:gpt-4o-mini" ("openai/gpt-4o-mini" with `openrouter_api_key`); without both, MODEL and
    OPENROUTER_API_KEY from the environment or `.env`.
    `result_type`: a pydantic class; each result is JSON that matches it.
    `instructions`: the system prompt. `template`: a Jinja template of the prompt. `prompt_column`,
    `id_column`: the columns of the prompt and of the id in a file. `settings`: of the model, for example
    {"temperature": 0}. `version`: distinguishes a function from earlier ones.
    `limit`: take only the first prompts. `pick`: take this number at random, always the same ones for a `seed`. A call
    with all of them reuses the answers.
    `concurrency`: calls at a time. `max_attempts`: calls per job. `timeout`: seconds that a call may take. `lease`:
    seconds before the jobs of a silent process are taken over.
    `price`: for example "in=0.15,out=0.60", in US dollars per million tokens, from now on; None leaves it as it is.
    `keep`: what to keep besides the answers, and to return in the rows: "reasoning", "logprobs", "raw".
    `db_url`: the queue, a path or URL. `results_db_url`: the database of results, None for `runs-results.db` beside
    `runs.db`.
    `output_shape`: "unique", a row per distinct prompt in order of first occurrence, or "original", a row per prompt.
    Rows are idx, key, prompt, status ("done" or "missing"), result (None unless done), error, and id and metadata if the
    prompt had them.
    `return_dtype`: "list[dict]"; "list[str]", the results, "" if missing; "list[tuple[str,str]]", prompt and result; or
    "polars", a DataFrame: the prompts' columns, then the answer (with `unnest`, a column for each field of
    `result_type`), status and error.
    `progress_every`: print a line to stderr after this number of finished jobs, None for never.
    `retry_failed`: try again what failed in an earlier call. `fresh`: do not reuse answers of other runs.
    `teardown`: remove the queue and the results when everything is done, unless other runs or processes use them.
    `run`: its name; None for a name from the task and the prompts. If it holds more prompts, they are answered as well,
    but only the rows of `prompts` are returned.

    Raises UsageError, InputError, OutputError or DatabaseError; before any call if an argument is wrong. If you cancel or
    interrupt it, every answer is kept.
    """
    shape = Shape(one_of("output_shape", output_shape, tuple(Shape)))
    if (every := progress_every or 0) < 0:
        raise UsageError(f"expected progress_every to be a whole number of at least 0, or None, got: {every}")
    if one_of("return_dtype", return_dtype, RETURN_DTYPES) == "polars":
        frames.polars()  # before any call is paid for
    options = WorkOptions(concurrency=concurrency, lease=lease, timeout=timeout)
    sample = Sample(limit, pick, seed)
    source = Source(prompts, template=template, prompt_column=prompt_column, id_column=id_column, sample=sample)
    resolved = resolve_task(
        source=source,
        model=model_name,
        function=worker,
        version=version,
        instructions=instructions,
        template=template,
        settings=settings,
        result_type=result_type,
        openrouter_api_key=openrouter_api_key,
        keep=keep,
        env=load_environment(Path.cwd()),
    )
    if source.is_empty:
        return _shaped([], return_dtype, resolved, [(Part.PROMPT, "prompt")], unnest=unnest)
    beside = file_of(db_url) or Path(RESULTS_BESIDE)
    results_url = results_db_url or beside.with_name(f"{beside.stem}-results{beside.suffix}")
    await source.check()
    with suppress(DatabaseBusyError):  # it may be free when the answers are there
        await results_db.check(results_url, name="results_db_url", queue=file_of(db_url))
    await check_servable(resolved)
    name = _run_name(resolved, source) if run is None else source.run_name(run)
    spec = run_spec(name, resolved, max_attempts, price)
    async with opened(db_url, create=True) as database:
        report = await put(database, spec, source, fresh=fresh)
        for notice in (*report.notices, *source.notices):
            _log(notice)
        found = await database.read(reads.find_run, name)
        if retry_failed:
            await redo.retry(database, found)
        if found.state is RunState.PAUSED:  # if its cause is still there, it is paused again
            await database.write(runs.resume, found, moved=False)
        await _work(database, resolved, options, found, every)
        rows = [row async for page in _answers(database, found, shape, found.keep) for row in page]
        inputs = await reads.columns(database, found) if return_dtype == "polars" else []
    mirrored = await _mirror(results_url, name, rows)
    # The run may hold more, from a longer list; it begins with these, so the first of equal ones are among them.
    asked = [row for row in rows if row.idx < report.counts.inputs]
    answer = _shaped(asked, return_dtype, resolved, inputs, unnest=unnest)
    if teardown and mirrored and all(row.status == JobState.DONE for row in rows):
        await _tear_down(db_url, results_url, name)
    return answer


def _run_name(resolved: ResolvedTask, source: Source) -> str:
    """Return a name made of the task and the prompts, so that the same call finds its run again."""
    digest = hashlib.blake2b(resolved.task.canonical() + ",".join(resolved.keep).encode(), digest_size=8)
    for item in source:
        metadata = "None" if item.metadata is None else canonical_json(item.metadata).decode()
        own_id = "" if item.custom_id is None else str(item.custom_id)
        for part in (item.prompt.body(), own_id, metadata):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return f"map-{digest.hexdigest()}"


async def _work(database: Database, resolved: ResolvedTask, options: WorkOptions, run: Run, every: int) -> None:
    worker = Worker(database, resolved.authority, options, run_names=[run.name], notify=_log)
    reporting = asyncio.create_task(_report(database, run, every))
    try:
        await worker.run()
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        for notice in change_warnings(resolved.authority):
            _log(notice)


async def _report(database: Database, run: Run, every: int) -> None:
    """Print a line whenever another `every` jobs have finished; never if that is 0."""
    clock = asyncio.get_running_loop().time
    started, last = clock(), 0
    first: RunStatus | None = None
    while every:
        (now,) = status_of(await database.read(reads.overview, run.name)).runs
        ended = now.done + now.failed
        if first is None:
            first, last = now, ended
        if ended // every > last // every:
            new = ended - first.done - first.failed
            _log(one_line(now, rate=new / (clock() - started) if now.done > first.done else 0.0))
        last = ended
        await asyncio.sleep(REPORT_SECONDS)


async def _answers(
    database: Database, run: Run, shape: Shape, keep: Sequence[str] = ()
) -> AsyncIterator[list[AnswerRow]]:
    """Yield a run's rows with one of two statuses: done or missing."""
    async for page in reads.rows(database, run, shape, include=keep):
        yield [row if row.status == JobState.DONE else row.missing() for row in page]


async def _mirror(results_url: PathOrUrl, run: str, rows: list[AnswerRow]) -> bool:
    """Write the rows to the results database; an error must not cost the caller the answers."""

    async def pages() -> AsyncIterator[list[AnswerRow]]:
        for start in range(0, len(rows), PAGE):
            yield rows[start : start + PAGE]

    try:
        await results_db.write_run(results_url, run, pages())
    except LbrError as error:
        _log(f"the results database was not written: {error}")
        return False
    return True


def _shaped(
    rows: list[AnswerRow],
    return_dtype: str,
    resolved: ResolvedTask,
    inputs: Sequence[tuple[Part, str]],
    *,
    unnest: bool,
) -> Any:
    match return_dtype:
        case "list[str]":
            return [row.result or "" for row in rows]
        case "list[tuple[str,str]]":
            return [(row.prompt.body(), row.result or "") for row in rows]
        case "polars":
            kinds, ids = Kinds(), Kinds()
            for row in rows:
                kinds.note(row.metadata or {})
                ids.note({"id": row.custom_id})
            table = make_table(
                resolved.task, inputs, kind_of=kinds.of, id_kind=ids.of("id"), unnest=unnest, include=resolved.keep
            )
            return frames.frame(table, rows)
    return [row.to_dict() for row in rows]


async def _tear_down(db_url: PathOrUrl, results_url: PathOrUrl, run: str) -> None:
    for name, removing in (
        (shown(db_url), remove_queue(db_url, run=run)),
        (shown(results_url), results_db.remove(results_url, run=run)),
    ):
        try:
            if not await removing:
                _log(f"teardown: {name} stays: it holds other runs, or another process uses it")
        except LbrError as error:
            _log(f"teardown: {error}")


def _log(line: str) -> None:
    with suppress(OSError):  # stderr may be closed
        print(f"lbr: {line}", file=sys.stderr)


@checked
async def export_jsonl(
    db_url: PathOrUrl = DB_URL_DEFAULT,
    *,
    out: PathOrUrl,
    run: str | None = None,
    output_shape: str = Shape.ORIGINAL,
) -> int:
    """Write a run's rows as JSONL to the file `out` and return their number.

    `db_url` is a queue, or a results database, whose rows keep the shape they were written with. `run` None is the
    newest. The file is written completely or not at all.
    """
    shape = Shape(one_of("output_shape", output_shape, tuple(Shape)))
    writers.check_output(fspath(out))
    names = await results_db.runs_in(db_url) if file_of(db_url) is not None else []
    if run is not None and names and run not in names:
        raise UsageError(f"no run named {run!r} in the results database {shown(db_url)}")
    if names:
        return await _export(results_db.read_run(db_url, run or names[-1]), fspath(out))
    async with opened(db_url) as database:
        if run is None and not (found := await database.read(reads.all_runs)):
            raise UsageError(f"there are no runs in {database.name}")
        exported = found[-1] if run is None else await database.read(reads.find_run, run)
        return await _export(_answers(database, exported, shape), fspath(out))


async def _export(pages: AsyncIterator[list[AnswerRow]], out: str) -> int:
    count = 0
    async with writers.output_lock(out):
        with writers.open_writer(out, writers.OutputFormat.JSONL) as writer:
            async for page in pages:
                writer.write(page)
                count += len(page)
    return count
