"""How many statements and commits commands send: a promise about speed that does not depend on the machine."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.store.database import open_database
from tests.support.hearing import Hearing

if TYPE_CHECKING:
    from collections.abc import Iterator

ECHO = "tests.store.test_sql:echo"
JOBS = 1_000
VERBS = ("SELECT", "INSERT", "UPDATE", "WITH", "DELETE")


async def echo(prompt: str) -> str:
    """Answer at once."""
    return prompt


@pytest.fixture
def counted() -> Iterator[Counter[str]]:
    """Count statements and commits, on every connection."""
    counts: Counter[str] = Counter()

    def statement(sql: str, _values: Any) -> None:
        if sql.lstrip().startswith(VERBS):
            counts["statements"] += 1

    def commit() -> None:
        counts["commits"] += 1

    hearing = Hearing(statement, commit)
    hearing.begin()
    yield counts
    hearing.end()


async def test_a_thousand_jobs_take_few_statements(counted: Counter[str], db_url: str) -> None:
    """A thousand jobs take tens of statements, because many jobs share a transaction."""
    prompts = [f"prompt {n}" for n in range(JOBS)]
    # PostgreSQL needs statements for turns and ids, and one for the time in each transaction that writes. A
    # slow disk may add a batch or two.
    server = db_url.startswith("postgresql")
    bounds = {
        "enqueue": {"statements": 28 if server else 19, "commits": 8},
        "work": {"statements": 80 if server else 57, "commits": 22},
        "collect": {"statements": 8, "commits": 6},
    }
    found = {}
    await (await open_database(db_url, create=True)).close()
    for step in bounds:
        counted.clear()
        if step == "enqueue":
            await lbr.enqueue(prompts, run="bench", function=ECHO, db_url=db_url)
        elif step == "work":
            report = await lbr.work(functions=[ECHO], concurrency=250, db_url=db_url)
            assert report.done == JOBS
        else:
            rows = (await lbr.collect("bench", db_url=db_url)).rows
            assert rows is not None
            assert [row["result"] for row in rows] == prompts
        found[step] = dict(counted)
    for step, most in bounds.items():
        for what, bound in most.items():
            assert found[step].get(what, 0) <= bound, found
        assert found[step]["statements"] >= 1, found
