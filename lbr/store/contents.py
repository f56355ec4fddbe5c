"""What a run holds, read in the order of its inputs and spelled the same in every database."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import bindparam, case, func, select

from lbr.core.errors import DatabaseError
from lbr.store.arrays import among
from lbr.store.enqueue import CHUNK_CHARACTERS
from lbr.store.paging import PAGE, byte_length
from lbr.store.schema import attempts, items, jobs, prompts, results

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from lbr.core.types import Run
    from lbr.store.connection import Connection
    from lbr.store.database import Database
    from lbr.store.schema import AnyRow

FIRST_LOOK = 64

ITEM = ("idx", "first", "custom_id", "metadata", "id_is_number")
JOB = ("state", "available_at", "claim_seq", "attempts", "crashes", "retry_seq", "finished_at")
PROMPT = ("chat", "body", "settings")
USAGE = ("input_tokens", "output_tokens", "cost_nanos")
RESULT = ("text", "model", "finish_reason", *USAGE, "latency_ms")
TRY = ("claim_seq", "what", "family", "error", "message", "text", "finish_reason", *USAGE, "latency_ms", "at")

_TRIED = select(func.sum(byte_length(attempts.c.text))).where(attempts.c.job_id == jobs.c.id)
_TEXTS = (byte_length(prompts.c.body), byte_length(results.c.text), _TRIED.scalar_subquery())
_BYTES = sum((func.coalesce(text, 0) for text in _TEXTS[1:]), func.coalesce(_TEXTS[0], 0))
_METADATA = func.coalesce(byte_length(items.c.metadata), 0)
_PLACES = (
    select(*(items.c[name] for name in ITEM), jobs.c.id, prompts.c.key, *(jobs.c[name] for name in JOB))
    .add_columns((case((items.c.first == 1, _BYTES), else_=0) + _METADATA).label("bytes"))
    .join_from(items, jobs, items.c.job_id == jobs.c.id, isouter=True)
    .outerjoin(prompts, prompts.c.job_id == jobs.c.id)
    .outerjoin(results, results.c.job_id == jobs.c.id)
    .where(items.c.run_id == bindparam("run"), items.c.idx >= bindparam("start"))
    .order_by(items.c.idx)
    .limit(bindparam("limit"))
)
_PROMPTS = select(prompts).where(among(prompts.c.job_id, "ids"))
_RESULTS = select(results).where(among(results.c.job_id, "ids"))
_TRIES = select(attempts).where(among(attempts.c.job_id, "ids")).order_by(attempts.c.id)


@dataclass(frozen=True, slots=True)
class Page:
    """A run's inputs from `start` on, with all that belongs to the jobs whose first input is among them."""

    start: int
    places: Sequence[AnyRow]
    prompts: dict[int, AnyRow]
    results: dict[int, AnyRow]
    tries: dict[int, list[AnyRow]]

    @property
    def end(self) -> int:
        """The place behind the last input."""
        return self.places[-1].idx + 1 if self.places else self.start

    @property
    def next_limit(self) -> int:
        """How many inputs to look at for the next page: more only while they are small, because each look reads texts."""
        return min(PAGE, 2 * len(self.places))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each input's place and all that the run holds of it, in one spelling for every database.

        A job's part is in the line of its first input. Ids of rows are left out: they are the database's own.
        """
        for row in self.places:
            facts: list[Any] = [row.key.hex(), _values(row, ITEM)]
            if row.first:
                answer = self.results.get(row.id)
                facts += [_values(row, JOB), _values(self.prompts[row.id], PROMPT)]
                facts.append(answer and [*_values(answer, RESULT), answer.reused_from is not None])
                facts.append([_values(one, TRY) for one in self.tries.get(row.id, ())])
            yield row.idx, orjson.dumps(facts, option=orjson.OPT_APPEND_NEWLINE)


@dataclass(slots=True)
class Contents:
    """What a run holds: how many inputs, jobs by state, and the hash over all of it."""

    inputs: int = 0
    states: Counter[str] = field(default_factory=Counter)
    hash: str = ""


def _values(row: AnyRow, names: Sequence[str]) -> list[Any]:
    return [getattr(row, name) for name in names]


async def read_page(database: Database, run: Run, start: int, limit: int = FIRST_LOOK) -> Page:
    """Return up to `limit` of a run's inputs from a place on, no more than a transaction should hold; none behind the last."""

    async def work(connection: Connection) -> Page:
        found = (await connection.execute(_PLACES, {"run": run.id, "start": start, "limit": limit})).all()
        sizes = accumulate(row.bytes for row in found)
        fitting = sum(size <= CHUNK_CHARACTERS for size in sizes)
        places = found[: max(1, fitting)]
        ids = {"ids": [row.id for row in places if row.first]}
        page = Page(
            start,
            places,
            {row.job_id: row for row in (await connection.execute(_PROMPTS, ids)).all()},
            {row.job_id: row for row in (await connection.execute(_RESULTS, ids)).all()},
            {},
        )
        for one in (await connection.execute(_TRIES, ids)).all():
            page.tries.setdefault(one.job_id, []).append(one)
        if lost := next((row for row in places if row.key is None), None):
            raise DatabaseError(
                f"expected a prompt for input {lost.idx} of run {run.name!r} in {database.name}, got: none; the "
                f"database was changed by hand"
            )
        return page

    return await database.read(work)


async def _lines(database: Database, run: Run, contents: Contents) -> AsyncGenerator[tuple[int, bytes]]:
    """Yield a run's lines in order, page by page; tell `contents` of them as they pass."""
    running = hashlib.blake2b(digest_size=16)
    page = await read_page(database, run, 0)
    while page.places:
        contents.inputs += len(page.places)
        contents.states.update(row.state for row in page.places if row.first)
        for idx, line in page.lines():
            running.update(line)
            yield idx, line
        page = await read_page(database, run, page.end, page.next_limit)
    contents.hash = running.hexdigest()


async def contents_of(database: Database, run: Run) -> Contents:
    """Read all that a run holds."""
    contents = Contents()
    async for _ in _lines(database, run, contents):
        pass
    return contents


async def first_difference(
    source: Database, run: Run, target: Database, copy: Run
) -> tuple[int | None, Contents]:
    """Read a run and its copy side by side; return the first place where they differ, None where nowhere."""
    ours, theirs = Contents(), Contents()
    async with (
        aclosing(_lines(source, run, ours)) as here,
        aclosing(_lines(target, copy, theirs)) as there,
    ):
        async for line in here:
            if await anext(there, None) != line:
                return line[0], ours
        if (more := await anext(there, None)) is not None:
            return more[0], ours
    same = (ours.inputs, ours.states, ours.hash) == (theirs.inputs, theirs.states, theirs.hash)
    return (None if same else ours.inputs), ours
