"""Put inputs into a run as deduplicated jobs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import Frame, Inputs, checked
from lbr.api.task import check_servable, resolve_task
from lbr.core.config import DB_URL_DEFAULT, MAX_ATTEMPTS, at_least_one, load_environment
from lbr.core.errors import RunChangedError, UsageError
from lbr.core.pricing import read_price
from lbr.core.text import pluralize
from lbr.core.types import MAX_SAMPLES, Item, KeyMaker, Shape
from lbr.io.samples import Sample
from lbr.io.sources import Source, chunks
from lbr.models.batches import check_lane
from lbr.models.identity import has_other_code
from lbr.store import enqueue as queueing
from lbr.store import reads, runs
from lbr.store.database import file_of, opened
from lbr.store.runs import RunSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from os import PathLike

    from lbr.api.task import ResolvedTask
    from lbr.core.pricing import Price
    from lbr.core.types import Json, PathOrUrl, Run
    from lbr.store.database import Database
    from lbr.store.enqueue import EnqueueCounts


MAX_INPUTS = 2**62
"""More than any run has."""


@dataclass(frozen=True, slots=True)
class EnqueueReport:
    """What an enqueue did: the run, its counts, warnings for the user, and the numbers of rows left out.

    `samples` is the number of answers per input.
    """

    run: str
    counts: EnqueueCounts
    notices: list[str] = field(default_factory=list)
    skipped_bad: int = 0
    skipped_empty: int = 0
    samples: int = 1


@checked
async def enqueue(
    inputs: Inputs | Frame,
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
    tier: str | None = None,
    prompt_column: str | None = None,
    id_column: str | None = None,
    input_format: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    skip_bad: PathLike[str] | str | None = None,
    skip_empty: bool = False,
    limit: int | None = None,
    pick: int | None = None,
    seed: int | None = None,
    samples: int | None = None,
    lane: str | None = None,
    max_attempts: int = MAX_ATTEMPTS,
    price: str | None = None,
    batch_factor: float | None = None,
    keep: str | Sequence[str] = (),
    warm_cache: bool = False,
    append: bool = False,
    fresh: bool = False,
    servable: bool = False,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
    on_kept: Callable[[int], None] = lambda _: None,
) -> EnqueueReport:
    """Put inputs into a run as deduplicated jobs. The same call again adds only what is missing, also after a crash.

    `inputs`: files (a `Path`, a pattern such as `Path("data/*.jsonl")`, or several; `Path("-")` is stdin), or prompts:
    strings, or dicts like lines of JSONL, or the rows of a DataFrame of pandas or polars.
    `run`: the run's name; None is the first file's stem. With `pick`, `-pick` is added.
    `model`: for example "openai-chat:gpt-4o-mini"; None is MODEL in the environment or `.env`, or else the model that
    lines of OpenAI's batch input name.
    `function`: answers instead of a model, as an object or "pkg.mod:name"; `version` distinguishes it from earlier ones.
    `instructions`: the system prompt. `template`: a Jinja template of the prompt, filled from the fields of each input.
    `schema`, or `result_type`, a pydantic class: what answers must match. `settings`: for example {"temperature": 0}.
    `tier`: "flex" for slower answers at half the price, "standard"; None leaves it as it is.
    `prompt_column`, `id_column`: the columns of the prompt and of the id. `input_format`: text, jsonl, csv, tsv or
    parquet; None goes by the file's name.
    `delimiter`, `encoding`: of the files; None finds them.
    `skip_bad`: a file for the rows that cannot be used, which are left out. `skip_empty`: leave out empty prompts.
    `limit`: take only the first inputs; the same call without it adds the rest. `pick`: take this number of inputs at
    random, always the same ones for a `seed` (None is 0), into a run of their own whose answers other runs reuse.
    `samples`: the number of answers per prompt; None is 1 for a new run, and leaves that of another as it is. A larger
    number adds answers to all prompts of the run.
    `lane`: "batch" to send the jobs to the provider in batches, which cost half and take up to a day; "auto" does so while
    many are left; "online", or None for a new run, calls. None leaves the lane of another run as it is.
    `max_attempts`: calls per job. `price`: for example "in=0.15,out=0.60", in US dollars per million tokens, from now on;
    None leaves it as it is. `batch_factor`: what flex and batch cost of it; None is 0.5.
    `keep`: what to keep besides the answers: "reasoning", "logprobs", "raw", or several of them.
    `warm_cache`: let the run's first call go alone, so that the others find long instructions in the provider's cache.
    `append`: put the inputs behind those of the run, which they otherwise must begin with.
    `fresh`: do not reuse answers of other runs.
    `servable`: write nothing if this process could not serve the run, for example because a key is missing.
    `on_kept`: called with the number of inputs in the run whenever it grows; if you cancel, they stay there.

    Raises UsageError, InputError (with file and line; files are checked completely before anything is written),
    RunMismatchError, RunChangedError or DatabaseError.
    """
    source = Source(
        inputs,
        input_format=input_format,
        template=template,
        prompt_column=prompt_column,
        id_column=id_column,
        delimiter=delimiter,
        encoding=encoding,
        skip_bad=skip_bad,
        skip_empty=skip_empty,
        sample=Sample(limit, pick, seed),
    )
    resolved = resolve_task(
        source=source,
        model=model,
        function=function,
        version=version,
        instructions=instructions,
        template=template,
        settings=settings,
        tier=tier,
        schema=schema,
        result_type=result_type,
        keep=keep,
        env=load_environment(Path.cwd()),
    )
    known_price = read_price(price, batch_factor)
    spec = run_spec(
        source.run_name(run), resolved, max_attempts, known_price, samples, lane=lane, warm_cache=warm_cache
    )
    _check_apart(skip_bad, file_of(db_url))
    await source.check()
    if servable:
        await check_servable(resolved)
    async with opened(db_url, create=True, allow_network_fs=allow_network_fs) as database:
        try:
            report = await put(database, spec, source, append=append, fresh=fresh, on_kept=on_kept)
        except RunChangedError as error:
            if pick is None:
                raise
            way_out = f"use another run with --run, or remove it first: `lbr rm {spec.name}`"
            raise RunChangedError(f"run {spec.name!r} holds a different sample; {way_out}") from error
    notices = [*report.notices, *source.notices]
    return replace(report, notices=notices, skipped_bad=source.bad.count, skipped_empty=source.bad.empty)


def _check_apart(skip_bad: PathLike[str] | str | None, queue: Path | None) -> None:
    if queue is not None and skip_bad is not None and Path(skip_bad).resolve() == queue.resolve():
        raise UsageError(f"expected another file for the bad rows than the queue, got: {queue}")


def run_spec(
    name: str,
    resolved: ResolvedTask,
    max_attempts: int,
    price: Price | None,
    samples: int | None = None,
    *,
    lane: str | None = None,
    warm_cache: bool = False,
) -> RunSpec:
    """Check the arguments of a run; UsageError for one out of range."""
    attempts = at_least_one("max_attempts", max_attempts)
    if samples is not None:
        at_least_one("samples", samples, most=MAX_SAMPLES)
    check_lane(lane, resolved.task, os.environ.get("OPENAI_BASE_URL"))
    return RunSpec(
        name,
        resolved.task,
        attempts,
        resolved.fingerprint,
        price,
        resolved.keep,
        samples,
        lane=lane,
        warm_cache=warm_cache,
    )


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
    run = await database.write(runs.open_run, spec)
    changed = await _note_change(database, run, spec)
    notices = list(changed)
    if spec.max_attempts not in {run.max_attempts, MAX_ATTEMPTS}:
        notices.append(
            f"run {run.name} was created with {pluralize(run.max_attempts, 'attempt')} per job, and keeps them"
        )
    maker = KeyMaker(spec.task)
    counts = await _add_samples(database, run, maker, reuse=not fresh)
    more, added = await _put_all(database, run, maker, items, append=append, reuse=not fresh, on_kept=on_kept)
    counts += more
    if spec.samples is not None and spec.samples > run.samples:
        run = await database.write(runs.raise_samples, run, spec.samples)
        counts += await _add_samples(database, run, maker, reuse=not fresh)
    await database.write(runs.seal, run)
    if counts.new:
        await database.filled()
    if not changed:
        notices += await _note_reuse(database, run, spec, counts)
    notices += _note_shared(run, counts)
    held = await database.quick_read(queueing.next_idx, run)
    if held > added and not append:
        notices.append(
            f"run {run.name} holds {pluralize(held, 'input')}, this input has {added}; the others stay in it"
        )
    return EnqueueReport(run.name, counts, notices, samples=run.samples)


async def _put_all(
    database: Database,
    run: Run,
    maker: KeyMaker,
    items: Iterable[Item],
    *,
    append: bool,
    reuse: bool,
    on_kept: Callable[[int], None],
) -> tuple[EnqueueCounts, int]:
    """Put items into a run with all their samples; return what was done, and the number of items."""
    added, counts = 0, queueing.EnqueueCounts()
    start = await database.quick_read(queueing.next_idx, run) if append else 0
    for chunk in _chunks(items, run):
        keys = [maker.key(item.prompt) for item in chunk]
        while True:
            try:
                counts += await database.write(queueing.add_chunk, run, start, chunk, keys, reuse=reuse)
                break
            except RunChangedError:
                if not append:
                    raise
                start = await database.quick_read(queueing.next_idx, run)  # another process has appended meanwhile
        if added == 0 and counts.new:
            await database.filled()
        start, added = start + len(chunk), added + len(chunk)
        on_kept(added)
    return counts, added


def _chunks(items: Iterable[Item], run: Run) -> Iterator[list[Item]]:
    """Yield items in lists that one transaction holds with all their samples."""
    size, characters = (max(1, most // run.samples) for most in (queueing.CHUNK, queueing.CHUNK_CHARACTERS))
    return chunks(iter(items), size, characters=characters)


async def _add_samples(database: Database, run: Run, maker: KeyMaker, *, reuse: bool) -> EnqueueCounts:
    """Add the samples that inputs lack after the run got more of them, or after that was interrupted."""
    counts = queueing.EnqueueCounts()
    if run.samples == 1 or run.sealed_at is not None:
        return counts
    start = await database.read(queueing.first_lacking, run)
    if start is None:
        return counts
    async for page in reads.rows(database, run, Shape.ORIGINAL, between=(start - 1, MAX_INPUTS)):
        items = [Item(row.prompt, row.custom_id, row.metadata) for row in page if row.sample == 0]
        for chunk in _chunks(items, run):
            keys = [maker.key(item.prompt) for item in chunk]
            counts += await database.write(queueing.add_chunk, run, start, chunk, keys, reuse=reuse)
            start += len(chunk)
    return replace(counts, inputs=0, known=0)


def _note_shared(run: Run, counts: EnqueueCounts) -> list[str]:
    """Return a notice if equal prompts share an answer although answers differ from call to call."""
    temperature = run.task.settings.get("temperature")
    if run.samples > 1 or not counts.duplicate or not isinstance(temperature, int | float) or temperature <= 0:
        return []
    shared = f"equal prompts share an answer ({pluralize(counts.duplicate, 'duplicate')})"
    return [f"temperature is {temperature:g}, but {shared}; --samples (samples=) gives each prompt several"]


async def _note_change(database: Database, run: Run, spec: RunSpec) -> list[str]:
    """Return a notice if the run may have answers of older code of its function."""
    if spec.fingerprint is None or run.fingerprint == spec.fingerprint:
        return []
    changed = has_other_code(spec.fingerprint, run.fingerprint)
    if await database.write(runs.adopt_fingerprint, run, spec.fingerprint, changed=changed):
        return []
    since = f"the code of {run.task.function} has changed since run {run.name} was created; its answers are kept"
    return [f"{since}. To redo them, give the function another `version` and the run another name"]


async def _note_reuse(database: Database, run: Run, spec: RunSpec, counts: EnqueueCounts) -> list[str]:
    """Return a notice if the run reuses answers of older code, or cannot match those of another lbr or Python."""
    if spec.fingerprint is None:
        return []
    if spec.task.fingerprint is None:  # the code is not part of the task
        lender = await database.quick_read(queueing.lender_with_other_code, run, spec.fingerprint)
        since = f"the code of {run.task.function} has changed since run {lender} was created, whose answers run"
        redo = (
            "To redo them, use `--fresh` (fresh=True) or give the function another `version`, and the run another name"
        )
        return [] if lender is None else [f"{since} {run.name} reuses. {redo}"]
    other = await database.quick_read(queueing.run_of_other_scheme, run, spec.fingerprint)
    if other is None or counts.new <= counts.reused:
        return []
    notice = (
        f"run {other} was created with {run.task.function} by an earlier version of lbr or another version of Python, whose "
        f"answers lbr cannot match with the function any more; the new prompts of run {run.name} are answered again"
    )
    return [notice]
