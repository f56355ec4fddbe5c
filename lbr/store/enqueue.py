"""Enqueue: inputs into a run, in chunks of one transaction each, safe to repeat."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from sqlalchemy import bindparam, func, insert, literal_column, select, update

from lbr.core.errors import RunChangedError, UsageError
from lbr.core.types import JobState, RunState, canonical_json, sample_key
from lbr.store import counters
from lbr.store.runs import check_not_moving, run_of
from lbr.store.schema import extras, jobs, prompts, results, runs
from lbr.store.schema import items as items_table
from lbr.store.sql import BulkStatement, Inserting, Rows, any_of, reserve_job_ids, take_turns, wake_workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from lbr.core.extras import Extra
    from lbr.core.types import Item, Millis, Part, Run
    from lbr.store.schema import AnyRow

CHUNK = 5_000
CHUNK_CHARACTERS = 8_000_000
"""About what a transaction holds at most, so that it fits into memory and gets through a slow line in time."""

_KNOWN = (
    select(items_table.c.idx, items_table.c.sample, prompts.c.key, items_table.c.custom_id, items_table.c.metadata)
    .join_from(items_table, prompts, items_table.c.job_id == prompts.c.job_id)
    .where(items_table.c.run_id == bindparam("run"))
    .where(items_table.c.idx >= bindparam("start"), items_table.c.idx < bindparam("end"))
    .order_by(items_table.c.idx, items_table.c.sample)
)
_LAST = items_table.alias("last")
_LACKING = (
    select(items_table.c.idx)
    .where(items_table.c.run_id == bindparam("run"), items_table.c.sample == 0)
    .where(
        ~select(literal_column("1"))
        .where(_LAST.c.run_id == bindparam("run"), _LAST.c.idx == items_table.c.idx)
        .where(_LAST.c.sample == bindparam("last"))
        .exists()
    )
    .order_by(items_table.c.idx)
    .limit(1)
)
BY_KEY = select(prompts.c.key, prompts.c.job_id).where(
    prompts.c.run_id == bindparam("run"), any_of(prompts.c.key, "keys")
)
# Two queries, because in a join a planner may begin with all jobs that are done. A job with its own settings does not
# answer what its key says.
_KEYS_OF_EQUALS = select(prompts.c.job_id, prompts.c.key).where(
    any_of(prompts.c.key, "keys"), prompts.c.settings.is_(None)
)
_DONE = select(jobs.c.id).where(literal_column("jobs.state = 'done'"), any_of(jobs.c.id, "ids"))
_HELD_ANSWERS = (
    select(results.c.job_id)
    .where(any_of(results.c.job_id, "ids"))
    .order_by(results.c.job_id)
    .with_for_update(read=True)
)
_COUNTED = ("input_tokens", "output_tokens", "cached_tokens", "cost_nanos", "latency_ms")
_COPIED = ("text", "model", "finish_reason", "lane", *_COUNTED)


def _copying(rows: Rows) -> Any:
    there = results.alias("there")
    copies = select(rows["job"], rows["source"], *(there.c[name] for name in _COPIED))
    copies = copies.where(there.c.job_id == rows["source"])
    return insert(results).from_select(["job_id", "reused_from", *_COPIED], copies)


_COPY_RESULTS = BulkStatement({"job": jobs.c.id.type, "source": jobs.c.id.type}, _copying)


@cache
def _copying_extras(keep: tuple[Extra, ...]) -> BulkStatement:
    """Return what copies these kinds of what is kept with an answer to another job."""

    def copying(rows: Rows) -> Any:
        there = extras.alias("there")
        copies = select(rows["job"], *(there.c[kind] for kind in keep)).where(there.c.job_id == rows["source"])
        return insert(extras).from_select(["job_id", *keep], copies)

    return BulkStatement({"job": jobs.c.id.type, "source": jobs.c.id.type}, copying)


_JOB = ("id", "run_id", "state", "available_at", "claim_seq", "attempts", "crashes", "retry_seq", "finished_at")
_ADD_JOBS = Inserting(jobs, *_JOB)
_ADD_PROMPTS = Inserting(prompts, "job_id", "run_id", "key", "chat", "body", "sample", "idx")
ADD_ITEMS = Inserting(
    items_table, "run_id", "idx", "sample", "job_id", "first", "custom_id", "metadata", "id_is_number"
)

_OTHER, _SOURCES = runs.alias("other"), jobs.alias("sources")
# From the few runs of the function with other code to the run's answers: without such a run, no answer is read.
_FROM_OTHER_CODE = (
    select(_OTHER.c.name)
    .where(
        _OTHER.c.answerer == bindparam("answerer"),
        _OTHER.c.fingerprint != bindparam("code"),
        _OTHER.c.fingerprint.like(bindparam("scheme")),
        select(literal_column("1"))
        .select_from(items_table)
        .join(results, results.c.job_id == items_table.c.job_id)
        .join(_SOURCES, _SOURCES.c.id == results.c.reused_from)
        .where(items_table.c.run_id == bindparam("run"), _SOURCES.c.run_id == _OTHER.c.id)
        .exists(),
    )
    .order_by(_OTHER.c.id)
    .limit(1)
)
_FROM_OTHER_SCHEME = (
    select(runs.c.name)
    .where(runs.c.answerer == bindparam("answerer"), runs.c.fingerprint.not_like(bindparam("scheme")))
    .order_by(runs.c.id)
    .limit(1)
)


@dataclass(frozen=True, slots=True)
class EnqueueCounts:
    """What an enqueue did with its inputs.

    `known` were there already, `new` became jobs, `duplicate` share the job of an equal input, and `reused` of the new
    ones were answered at once from another run. These four count each sample of an input.
    """

    inputs: int = 0
    known: int = 0
    new: int = 0
    duplicate: int = 0
    reused: int = 0

    def __add__(self, other: EnqueueCounts) -> EnqueueCounts:
        """Return the sum, field by field."""
        return EnqueueCounts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


class _Entry(NamedTuple):
    """A sample of an input that the run does not hold yet, with its job."""

    idx: int
    sample: int
    item: Item
    key: bytes
    job_id: int
    first: bool


def next_idx(connection: Connection, _now: Millis, run: Run) -> int:
    """Return the index after the run's last input."""
    last = connection.scalar(select(func.max(items_table.c.idx)).where(items_table.c.run_id == run.id))
    return 0 if last is None else int(last) + 1


def last_place(connection: Connection, _now: Millis, run: Run) -> tuple[int, int]:
    """Return the index and the sample of the run's last item, -1 and 0 if it has none."""
    query = select(items_table.c.idx, items_table.c.sample).where(items_table.c.run_id == run.id)
    query = query.order_by(items_table.c.idx.desc(), items_table.c.sample.desc()).limit(1)
    found = connection.execute(query).one_or_none()
    return (-1, 0) if found is None else (found.idx, found.sample)


def first_lacking(connection: Connection, _now: Millis, run: Run) -> int | None:
    """Return the index of the first input that does not have all of the run's samples; None without one."""
    idx: int | None = connection.scalar(_LACKING, {"run": run.id, "last": run.samples - 1})
    return idx


def lender_with_other_code(connection: Connection, _now: Millis, run: Run, fingerprint: str) -> str | None:
    """Return the name of a run from which this one reuses an answer of other code; None without one."""
    bound = {"answerer": run.task.answerer, "code": fingerprint, "run": run.id, "scheme": _scheme(fingerprint)}
    name: str | None = connection.scalar(_FROM_OTHER_CODE, bound)
    return name


def run_of_other_scheme(connection: Connection, _now: Millis, run: Run, fingerprint: str) -> str | None:
    """Return the name of a run of the same function whose fingerprint cannot be compared with this one, or None."""
    bound = {"answerer": run.task.answerer, "scheme": _scheme(fingerprint)}
    name: str | None = connection.scalar(_FROM_OTHER_SCHEME, bound)
    return name


def _scheme(fingerprint: str) -> str:
    """Return a pattern for comparable fingerprints, which are alike up to their first colon."""
    return f"{fingerprint.partition(':')[0]}:%"


def add_chunk(
    connection: Connection,
    now: Millis,
    run: Run,
    start: int,
    items: Sequence[Item],
    keys: Sequence[bytes],
    *,
    reuse: bool,
) -> EnqueueCounts:
    """Make sure that the run holds all samples of these inputs from index `start` on; what is there stays as it is.

    `keys` are the items' content keys. Raises RunChangedError,
    and changes nothing, if the run holds a different input at one of these indexes.
    """
    take_turns(connection, run.id)
    span = {"run": run.id, "start": start, "end": start + len(items)}
    known = {(row.idx, row.sample): row for row in connection.execute(_KNOWN, span).all()}
    for (idx, sample), held in known.items():
        _check_unchanged(run, held, items[idx - start], sample_key(keys[idx - start], sample))
    fresh = [
        (start + n, sample, item, sample_key(keys[n], sample))
        for n, item in enumerate(items)
        for sample in range(run.samples)
        if (start + n, sample) not in known
    ]
    if not fresh:
        return EnqueueCounts(inputs=len(items), known=len(known))
    entries, new = _assign_jobs(connection, run, fresh)
    answered = _find_answers(connection, new, run.keep) if reuse else {}
    _insert_jobs(connection, run, entries, new, answered, now)
    _insert_items(connection, run, entries)
    _touch_run(connection, run, now, items[0].columns if start == 0 else None)
    if start == 0:
        wake_workers(connection)
    counts = Counter({(run.id, str(JobState.PENDING)): len(new) - len(answered)})
    counts[run.id, str(JobState.DONE)] = counts[run.id, counters.REUSED] = len(answered)
    counts[run.id, counters.OPENED] = 1
    counters.add(connection, counts)
    duplicates = len(entries) - len(new)
    return EnqueueCounts(len(items), len(known), len(new), duplicates, len(answered))


def _check_unchanged(run: Run, held: AnyRow, item: Item, key: bytes) -> None:
    ours = _metadata_json(item)
    if (held.key, held.custom_id) == (key, _id_text(item)) and (
        held.metadata == ours or _canonical(held.metadata) == _canonical(ours)
    ):
        return
    raise RunChangedError(
        f"run {run.name!r} holds a different input {held.idx}; use another run with --run, or add the changed inputs "
        f"after those that it holds with --append",
        source=item.source,
        line=item.line,
    )


def _metadata_json(item: Item) -> str | None:
    return None if item.metadata is None else orjson.dumps(item.metadata).decode()


def _canonical(metadata: str | None) -> bytes | str | None:
    """Return stored metadata without their order, which is not part of an input and which older versions sorted."""
    try:
        return None if metadata is None else canonical_json(orjson.loads(metadata))
    except (orjson.JSONDecodeError, TypeError):  # another program wrote it
        return metadata


def _id_text(item: Item) -> str | None:
    return None if item.custom_id is None else str(item.custom_id)


def _touch_run(connection: Connection, run: Run, now: Millis, columns: dict[str, Part] | None) -> None:
    """Note that inputs are arriving, so that no worker takes the run for complete, and the first one's columns.

    Done last, because it locks the run's row. Raises UsageError if the run was cancelled, is being moved, or has
    another number of samples now.
    """
    values: dict[str, Any] = {"enqueued_at": now, "sealed_at": None}
    if columns is not None:
        values["input_columns"] = orjson.dumps(columns).decode()
    query = update(runs).where(runs.c.id == run.id, runs.c.state != RunState.CANCELLED).values(**values)
    touched = connection.execute(query.returning(runs)).one_or_none()
    if touched is None:
        raise UsageError(f"run {run.name!r} was cancelled; `lbr retry {run.name}` takes it up again")
    current = run_of(touched)
    check_not_moving(current)
    if current.samples != run.samples:
        raise UsageError(f"another enqueue has changed the samples of run {run.name!r}; run the same command again")


def _assign_jobs(
    connection: Connection, run: Run, fresh: list[tuple[int, int, Item, bytes]]
) -> tuple[list[_Entry], dict[bytes, int]]:
    """Give every new sample its job; return them with the keys that are new to the run."""
    wanted = list(dict.fromkeys(key for *_, key in fresh))
    found = connection.execute(BY_KEY, {"run": run.id, "keys": wanted}).all()
    jobs_by_key: dict[bytes, int] = {row.key: row.job_id for row in found}
    missing = [key for key in wanted if key not in jobs_by_key]
    ids = reserve_job_ids(connection, len(missing))
    new = dict(zip(missing, ids, strict=True))
    jobs_by_key |= new
    unseen = set(new)
    entries = []
    for idx, sample, item, key in fresh:
        entries.append(_Entry(idx, sample, item, key, jobs_by_key[key], key in unseen))
        unseen.discard(key)
    return entries, new


def _find_answers(connection: Connection, new: dict[bytes, int], keep: tuple[Extra, ...]) -> dict[int, int]:
    """Map new jobs to done jobs of other runs with the same key, whose answers stay until they are copied.

    Only answers that have all that the run keeps.
    """
    if not new:
        return {}
    equals = dict(connection.execute(_KEYS_OF_EQUALS, {"keys": list(new)}).all())
    if not equals:
        return {}
    done = connection.execute(_DONE, {"ids": list(equals)}).scalars().all()
    if keep:
        whole = select(extras.c.job_id).where(any_of(extras.c.job_id, "ids"))
        whole = whole.where(*(extras.c[kind].is_not(None) for kind in keep))
        done = connection.execute(whole, {"ids": list(done)}).scalars().all()
    # The oldest of several.
    sources = {equals[job_id]: job_id for job_id in sorted(done, reverse=True)}
    held = connection.execute(_HELD_ANSWERS, {"ids": sorted(sources.values())}).scalars()
    return {new[equals[source]]: source for source in held}


def _insert_jobs(
    connection: Connection,
    run: Run,
    entries: list[_Entry],
    new: dict[bytes, int],
    answered: dict[int, int],
    now: Millis,
) -> None:
    if not new:
        return
    fixed = (0, 0, 0, 0)  # claim_seq, attempts, crashes, retry_seq
    rows = [
        (job_id, run.id, JobState.DONE, now, *fixed, now)
        if job_id in answered
        else (job_id, run.id, JobState.PENDING, now, *fixed, None)
        for job_id in new.values()
    ]
    _ADD_JOBS.run_plain(connection, rows)
    first = [(e, e.item.prompt) for e in entries if e.first]
    bodies = [(e.job_id, run.id, e.key, asked.form, asked.body(), e.sample or None, e.idx) for e, asked in first]
    _ADD_PROMPTS.run_plain(connection, bodies)
    copies = list(answered.items())
    _COPY_RESULTS.run_plain(connection, copies)
    if run.keep:
        _copying_extras(run.keep).run_plain(connection, copies)


def _insert_items(connection: Connection, run: Run, entries: list[_Entry]) -> None:
    run_id = run.id
    rows = []
    for idx, sample, item, _, job_id, first in entries:
        is_number = 1 if isinstance(item.custom_id, int) else None
        rows.append((run_id, idx, sample, job_id, int(first), _id_text(item), _metadata_json(item), is_number))
    ADD_ITEMS.run_plain(connection, rows)
