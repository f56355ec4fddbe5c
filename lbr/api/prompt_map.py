"""`prompt_map`: enqueue, work and collect in one call, awaited or not; and `export_jsonl`."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack, overload

from lbr.api import progress
from lbr.api.arguments import Frame, Function, Inputs, checked, either
from lbr.api.call import Call, MapOptions, warn
from lbr.api.rows import RETURN_DTYPES, Form, settled
from lbr.core.config import DB_URL_DEFAULT, one_of
from lbr.core.errors import DatabaseBusyError, LbrError, UsageError
from lbr.core.text import pluralize
from lbr.core.types import JobState, Part, RunState, Shape
from lbr.io import frames, writers
from lbr.store import reads, results_db
from lbr.store.database import file_of, opened, remove_queue, shown
from lbr.store.sql import PAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    import pandas as pd
    import polars as pl

    from lbr.api.rows import Row
    from lbr.core.types import AnswerRow, PathOrUrl, Run
    from lbr.store.database import Database

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Frame)

RESULTS_BESIDE = "runs.db"  # if the queue is on a server


@overload
async def prompt_map(  # type: ignore[overload-overlap] # a frame that is given back is the first of the two
    prompts: F,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    return_dtype: None = None,
    **options: Unpack[MapOptions],
) -> F: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: type[T],
    return_dtype: Literal["list[dict]"] | None = None,
    **options: Unpack[MapOptions],
) -> list[Row[T]]: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: str | None = None,
    return_dtype: Literal["list[dict]"] | None = None,
    **options: Unpack[MapOptions],
) -> list[Row[Any]]: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    return_dtype: Literal["list[str]"],
    **options: Unpack[MapOptions],
) -> list[str]: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    return_dtype: Literal["list[tuple[str,str]]"],
    **options: Unpack[MapOptions],
) -> list[tuple[str, str]]: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    return_dtype: Literal["polars"],
    **options: Unpack[MapOptions],
) -> pl.DataFrame: ...


@overload
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    result_type: Any = None,
    return_dtype: Literal["pandas"],
    **options: Unpack[MapOptions],
) -> pd.DataFrame: ...


@partial(checked, options=Call)
async def prompt_map(
    prompts: Inputs | Frame,
    worker: Function = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    *,
    model: str | None = None,
    function: Function = None,
    result_type: Any = None,
    output_shape: str | None = None,
    return_dtype: str | None = None,
    unnest: bool = True,
    progress_every: int | None = 200,
    results_db_url: PathOrUrl | None = None,
    teardown: bool = False,
    **options: Any,
) -> Any:
    """Answer every prompt, keep every answer, and return them. The same call again resumes.

    `prompts`: strings, or dicts with `prompt` or `messages` and other fields, as lines of JSONL; a DataFrame of pandas or
    polars; or files as for `enqueue`. None of them: no rows.
    `function` (or `worker`): an async or plain function from str to str, dict, BaseModel or `Answer`. Without it,
    `model` (or `model_name`) does, for example "openai-chat:gpt-4o-mini" ("openai/gpt-4o-mini" with
    `openrouter_api_key`); without both, MODEL and OPENROUTER_API_KEY from the environment or `.env`.
    `result_type`: a pydantic class; each result is JSON that matches it, and `row.parsed` an instance. Or `schema`, a JSON
    schema.
    `instructions`: the system prompt. `template`: a Jinja template of the prompt. `prompt_column`, `id_column`: the
    columns, or the fields of dicts, with the prompt and the id. `settings`: of the model, for example
    {"temperature": 0}. `version`: distinguishes a function from earlier ones.
    `tier`: "flex" for slower answers at half the price, "standard"; None leaves it as it is.
    `limit`: take only the first prompts. `pick`: take this number at random, always the same ones for a `seed`. A call
    with all of them reuses the answers. `samples`: answers per prompt, each in a row with its number, `sample`.
    `concurrency`: calls at a time. `max_attempts`: calls per job. `timeout`: seconds that a call may take; None is 120,
    or 900 at flex. `lease`: seconds before the jobs of a silent process are taken over.
    `rpm`, `tpm`: requests and tokens a minute of all workers together; they stay set for the model. `max_cost`: the most
    that the run may cost, in US dollars; then it is paused. None leaves the limits as they are.
    `price`: for example "in=0.15,out=0.60", in US dollars per million tokens, from now on; None leaves it as it is.
    `lane`: "batch" to send the prompts to the provider in batches, which cost half and take up to a day; "auto" does so
    while many are left.
    `batch_factor`: what flex and batch cost of `price`; None is 0.5.
    `keep`: what to keep besides the answers, and to return in the rows: "reasoning", "logprobs", "raw".
    `warm_cache`: let the first call go alone, so that the others find long instructions in the provider's cache.
    `db_url`: the queue, a path or URL. `results_db_url`: the database of results, None for `runs-results.db` beside
    `runs.db`.
    `output_shape`: "unique", a row per distinct prompt in order of first occurrence, or "original", a row per prompt.
    None is "original" for a frame, else "unique".
    `return_dtype`: "list[dict]", each a `Row` of idx, key, prompt, status ("done" or "missing"), result (None unless
    done), error, and id and metadata if the prompt had them; "list[str]", the results, "" if missing;
    "list[tuple[str,str]]", prompt and result; "polars" or "pandas", a DataFrame: the prompts' columns, then the answer
    (with `unnest`, a column for each field of the schema), status and error. None is "list[dict]", for a frame the frame
    itself with these columns behind its own; a name that it has already becomes `answer.NAME`.
    `progress_every`: print a line to stderr after this number of finished jobs, in a terminal or a notebook show a bar;
    None for nothing.
    `retry_failed`: try again what failed in an earlier call. `fresh`: do not reuse answers of other runs.
    `teardown`: remove the queue and the results when everything is done, unless other runs or processes use them.
    `run`: its name; None for a name from the task and the prompts. If it holds more prompts, they are answered as well,
    but only the rows of `prompts` are returned.

    Raises UsageError, InputError, OutputError or DatabaseError; before any call if an argument is wrong. If you cancel or
    interrupt it, every answer is kept.
    """
    library = frames.library_of(prompts)
    usual = Shape.UNIQUE if library is None else Shape.ORIGINAL
    shape = Shape(one_of("output_shape", usual if output_shape is None else output_shape, tuple(Shape)))
    dtype = one_of("return_dtype", (library or "list[dict]") if return_dtype is None else return_dtype, RETURN_DTYPES)
    if (every := progress_every or 0) < 0:
        raise UsageError(f"expected progress_every to be a whole number of at least 0, or None, got: {every}")
    call = Call(
        prompts,
        either("model", model, "model_name", model_name),
        either("function", function, "worker", worker),
        openrouter_api_key=openrouter_api_key,
        result_type=result_type,
        **options,
    )
    frame = prompts if library == dtype else None
    form = Form(dtype, call.resolved, result_type, unnest, call.samples, frame)
    if call.source.is_empty:
        return form.of([], [(Part.PROMPT, "prompt")])
    beside = file_of(call.db_url) or Path(RESULTS_BESIDE)
    results_url = results_db_url or beside.with_name(f"{beside.stem}-results{beside.suffix}")
    with suppress(DatabaseBusyError):  # it may be free when the answers are there
        await results_db.check(results_url, name="results_db_url", queue=file_of(call.db_url))
    async with call.begun() as (database, run, inputs):
        async with progress.shown(database, run.name, every):
            await call.work(database, run)
            rows = [row async for page in answers(database, run, shape, run.keep) for row in page]
            # The run may hold more, from a longer list; it begins with these, so the first of equal ones are among them.
            asked = [row for row in rows if row.idx < inputs]
            _note_duplicates(len({row.idx for row in asked}), inputs)
        columns = await reads.columns(database, run) if dtype in frames.LIBRARIES else []
    mirrored = await _mirror(results_url, run.name, rows)
    answer = form.of(asked, columns, call.source.places())
    if teardown and mirrored and all(row.status == JobState.DONE for row in rows):
        await _tear_down(call.db_url, results_url, run.name)
    return answer


def _note_duplicates(rows: int, prompts: int) -> None:
    if rows < prompts:
        some = f"{pluralize(prompts, 'prompt')}, {rows} of them distinct: {pluralize(rows, 'row')}"
        warn(f"{some}; output_shape='original' returns a row for each prompt")


def in_thread(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """Return a plain function that runs a coroutine function in a thread, and so also beside a running event loop.

    Ctrl-C cancels the coroutine, and waits for that.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        stopped = False
        cancel: Callable[[], object] = object  # until there is something to cancel

        async def run() -> R:
            nonlocal cancel
            task = asyncio.ensure_future(function(*args, **kwargs))
            cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
            if stopped:
                task.cancel()
            return await task

        context = contextvars.copy_context()  # by which a kernel knows the cell that prints
        with ThreadPoolExecutor(1, "lbr") as pool:
            try:
                return pool.submit(context.run, asyncio.run, run()).result()
            except KeyboardInterrupt:
                stopped = True
                with suppress(RuntimeError):  # it has ended meanwhile
                    cancel()
                raise

    return call


prompt_map_sync = in_thread(prompt_map)


async def answers(
    database: Database, run: Run, shape: Shape, keep: Sequence[str] = ()
) -> AsyncIterator[list[AnswerRow]]:
    """Yield a run's rows with one of two statuses: done or missing, with the pause as the error if it is paused."""
    now = await database.read(reads.find_run, run.name)
    words = f"the run is paused: {now.pause.message}" if now.state is RunState.PAUSED and now.pause else None
    async for page in reads.rows(database, run, shape, include=keep):
        yield [settled(row, words) for row in page]


async def _mirror(results_url: PathOrUrl, run: str, rows: list[AnswerRow]) -> bool:
    """Write the rows to the results database; an error must not cost the caller the answers."""

    async def pages() -> AsyncIterator[list[AnswerRow]]:
        for start in range(0, len(rows), PAGE):
            yield rows[start : start + PAGE]

    try:
        await results_db.write_run(results_url, run, pages())
    except LbrError as error:
        warn(f"the results database was not written: {error}")
        return False
    return True


async def _tear_down(db_url: PathOrUrl, results_url: PathOrUrl, run: str) -> None:
    for name, removing in (
        (shown(db_url), remove_queue(db_url, run=run)),
        (shown(results_url), results_db.remove(results_url, run=run)),
    ):
        try:
            if not await removing:
                warn(f"teardown: {name} stays: it holds other runs, or another process uses it")
        except LbrError as error:
            warn(f"teardown: {error}")


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
        return await _export(answers(database, exported, shape), fspath(out))


async def _export(pages: AsyncIterator[list[AnswerRow]], out: str) -> int:
    count = 0
    async with writers.output_lock(out):
        with writers.open_writer(out, writers.OutputFormat.JSONL) as writer:
            async for page in pages:
                writer.write(page)
                count += len(page)
    return count
