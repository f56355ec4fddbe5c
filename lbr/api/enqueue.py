"""Put inputs into a run as deduplicated jobs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.task import ask, check_servable
from lbr.core.config import (
    DB_URL_DEFAULT,
    MAX_ATTEMPTS,
    at_least_one,
    load_environment,
)
from lbr.core.errors import UsageError
from lbr.core.pricing import read_price
from lbr.core.text import pluralize
from lbr.core.types import KeyMaker
from lbr.io.sources import Source, chunks
from lbr.models.identity import has_other_code
from lbr.store import enqueue as queueing
from lbr.store import runs
from lbr.store.database import file_of, opened
from lbr.store.runs import RunSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from os import PathLike

    from lbr.core.types import Item, Json, PathOrUrl, Run
    from lbr.store.database import Database
    from lbr.store.enqueue import EnqueueCounts


@dataclass(frozen=True, slots=True)
class EnqueueReport:
    """What an enqueue did: the run, its counts, and what its caller should hear."""

    run: str
    counts: EnqueueCounts
    notices: list[str] = field(default_factory=list)
    skipped_bad: int = 0
    skipped_empty: int = 0


@checked
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
    delimiter: str | None = None,
    encoding: str | None = None,
    skip_bad: PathLike[str] | str | None = None,
    skip_empty: bool = False,
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

    `delimiter` and `encoding` say how files are written if lbr cannot know it. `skip_bad` is a file for the rows that
    cannot be used, which are left out; `skip_empty` leaves out those whose prompt is empty.

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
    source = Source.of(
        inputs,
        input_format=input_format,
        template=template,
        prompt_column=prompt_column,
        delimiter=delimiter,
        encoding=encoding,
        skip_bad=skip_bad,
        skip_empty=skip_empty,
    )
    spec = RunSpec(
        source.run_name() if run is None else run,
        asked.task,
        at_least_one("max_attempts", max_attempts),
        asked.fingerprint,
        None if price is None else read_price(price),
        asked.refusal,
    )
    check_may_be_new(spec, db_url)
    if skip_bad is not None:
        _check_apart(skip_bad, file_of(db_url))
    await source.check()
    if servable:
        await check_servable(asked)
    async with opened(db_url, create=True, allow_network_fs=allow_network_fs) as database:
        report = await put(database, spec, source, append=append, fresh=fresh, on_kept=on_kept)
    return replace(report, skipped_bad=source.bad.count, skipped_empty=source.bad.empty)


def _check_apart(skip_bad: PathLike[str] | str, queue: Path | None) -> None:
    if queue is not None and Path(skip_bad).resolve() == queue.resolve():
        raise UsageError(f"expected another file for the bad rows than the queue, got: {queue}")


def check_may_be_new(spec: RunSpec, db_url: PathOrUrl) -> None:
    """Raise UsageError for a run that must not be new where there is no queue yet, so that none is made for it."""
    path = file_of(db_url)
    if spec.refusal is not None and path is not None and not path.exists():
        raise UsageError(spec.refusal)


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
            f"run {run.name} was made with {pluralize(run.max_attempts, 'attempt')} for a job; that stays so"
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
        notices += await _note_reuse(database, run, spec, counts)
    held = await queueing.next_idx(database, run)
    if held > place and not append:
        notices.append(
            f"run {run.name} holds {pluralize(held, 'input')}, this input has {place}; the others stay in it"
        )
    return EnqueueReport(run.name, counts, notices)


async def _note_change(database: Database, run: Run, spec: RunSpec) -> list[str]:
    """Return a notice if the run may have answers of other code than the function has now."""
    if spec.fingerprint is None or run.fingerprint == spec.fingerprint:
        return []
    changed = has_other_code(spec.fingerprint, run.fingerprint)
    if await runs.adopt_fingerprint(database, run, spec.fingerprint, changed=changed):
        return []
    notice = (
        f"the code of {run.task.function} has changed since run {run.name} was made; its answers are kept. To redo "
        f"them, give the function another `version` and the run another name"
    )
    return [notice]


async def _note_reuse(database: Database, run: Run, spec: RunSpec, counts: EnqueueCounts) -> list[str]:
    """Return a notice if the run reuses answers of other code, or cannot reuse those of an earlier lbr or Python."""
    if spec.fingerprint is None:
        return []
    if spec.task.fingerprint is not None:  # the code is part of the task
        return await _note_asked_again(database, run, spec.fingerprint) if counts.new > counts.reused else []
    lender = await queueing.lender_with_other_code(database, run, spec.fingerprint)
    if lender is None:
        return []
    notice = (
        f"the code of {run.task.function} has changed since run {lender} was made, whose answers run {run.name} reuses. "
        f"To redo them, use `--fresh` (fresh=True) or give the function another `version`, and the run another name"
    )
    return [notice]


async def _note_asked_again(database: Database, run: Run, fingerprint: str) -> list[str]:
    other = await queueing.run_of_other_scheme(database, run, fingerprint)
    if other is None:
        return []
    notice = (
        f"run {other} was made with {run.task.function} by an earlier version of lbr or another version of Python, whose "
        f"answers lbr cannot match with the function any more; the new prompts of run {run.name} are answered again"
    )
    return [notice]
