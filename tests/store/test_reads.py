"""Pages of rows of any size: nothing is left out, and no page is larger than it may be."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.api import status
from lbr.api.view import Watch
from lbr.core.types import (
    Part,
    Shape,
    WorkerId,
)
from lbr.store import reads, results_db, runs, schema, sql
from lbr.store.database import opened
from lbr.store.settle import settle
from tests.support import ECHO, Queue, answered, put

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lbr.store.database import Database

MEGABYTES, POLARS_MEGABYTES = 200, 60
MEASURE = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
)


@pytest.mark.parametrize("shape", Shape)
async def test_rows_of_every_size_come_in_order(
    db_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    """Prompts, answers and metadata of any size, at any place, are all there, in pages of a bounded size."""
    monkeypatch.setattr(sql, "PAGE_BYTES", 20_000)
    sizes = [1] * 300 + [900] * 100 + [50_000] * 3 + [1, 19_999, 1, 20_000, 20_001] + [1] * 200 + [50_000, 1]

    async def answer(prompt: str) -> str:
        return "é" * (int(prompt.split("/")[1]) // 2)

    inputs: list[Any] = [
        {
            "prompt": f"{n}/{size if n % 3 else 1}/{'p' * (size if n % 3 == 1 else 1)}",
            "m": "m" * (0 if n % 3 else size),
        }
        for n, size in enumerate(sizes)
    ]
    await lbr.enqueue(inputs, run="r", function=answer, db_url=db_url)
    await lbr.work(functions=[answer], db_url=db_url)
    async with opened(db_url) as database:
        run = await database.read(reads.find_run, "r")
        pages = [page async for page in reads.rows(database, run, shape)]
        assert await reads.columns(database, run) == [(Part.PROMPT, "prompt"), (Part.METADATA, "m")]
    rows = [row for page in pages for row in page]
    assert [(row.idx, row.prompt.text, row.metadata) for row in rows] == [
        (n, one["prompt"], {"m": one["m"]}) for n, one in enumerate(inputs)
    ]
    assert [row.result for row in rows] == [await answer(one["prompt"]) for one in inputs]
    for page in pages:
        size = sum(
            len(row.prompt.text or "") + len((row.result or "").encode()) + len(str(row.metadata)) for row in page
        )
        assert len(page) == 1 or size < 2 * 20_000

    async def again() -> Any:
        for page in pages:
            yield page

    assert await results_db.write_run(tmp_path / "results.db", "r", again()) == len(sizes)
    mirrored = [row.to_dict() async for page in results_db.read_run(tmp_path / "results.db", "r") for row in page]
    assert mirrored == [row.to_dict() for row in rows]


@pytest.mark.slow
def test_large_answers_take_little_memory(db_url: str, tmp_path: Path, new_database: Callable[[], str]) -> None:
    """200 MB of answers, 2 MB each, are collected in each format and moved within a fraction of that."""
    (tmp_path / "large.py").write_text("async def answer(prompt: str) -> str:\n    return prompt + 'x' * 2_000_000\n")
    (tmp_path / "in.txt").write_text("".join(f"p{n}\n" for n in range(100)))

    def run(*command: str) -> int:
        lbr_command = [sys.executable, "-m", "lbr", *command]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *lbr_command],
            cwd=tmp_path,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return int(done.stdout)

    run("--db", db_url, "enqueue", "in.txt", "--run", "r", "--function", "large:answer")
    run("--db", db_url, "worker", "--function", "large:answer")
    peaks = {name: run("--db", db_url, "collect", "r", "-o", name) for name in ("o.jsonl", "o.csv", "o.db", "o.sqlite")}
    peaks["parquet"] = run("--db", db_url, "collect", "r", "-o", "o.parquet") - POLARS_MEGABYTES
    target = new_database() if db_url.startswith("sqlite") else f"sqlite:///{tmp_path / 'there.db'}"
    peaks["move"] = run("move", db_url, target, "r")
    assert (tmp_path / "o.jsonl").stat().st_size > 200_000_000
    assert {name: peak for name, peak in peaks.items() if peak >= MEGABYTES} == {}


async def two_workers(database: Database) -> tuple[Queue, WorkerId, WorkerId]:
    """Return a queue and two registered workers."""
    queue = Queue(database)
    first = await queue.register(host="a", pid=1, concurrency=4)
    return queue, first, await queue.register(host="b", pid=2, concurrency=4)


async def test_only_a_run_at_work_has_an_end_in_sight(database: Database) -> None:
    """A run has a rate once it has an answer, while a worker holds jobs of it, and its model is not waited for."""
    names = ("working", "unanswered", "unserved", "paused", "cancelled")
    runs_of = {name: await put(database, ["a", "b", "c"], name=name, reuse=False) for name in names}
    queue, worker, other = await two_workers(database)
    held = []
    for name, run in runs_of.items():
        first, second = await queue.claim(worker, [run.id], 2, lease=60)
        held.append(second)
        if name != "unanswered":
            await database.write(settle, [answered(first)])
    await queue.release(worker, [held[2]])
    await queue.renew(worker, held, lease=60, settled=10, rate=2.0)
    await queue.renew(other, [], lease=60, settled=10, rate=500.0)
    await database.write(runs.pause, runs_of["paused"], "no credit")
    await runs.cancel(database, runs_of["cancelled"])
    found = status.status_of(await database.read(reads.overview))
    nothing = dict.fromkeys(names, (None, None))
    assert {one.run: (one.rate, one.eta_seconds) for one in found.runs} == nothing | {"working": (2.0, 1.0)}
    views = Watch().views(found)
    assert [one.rest for one in views] == ["1 s left", "", "", "", ""]
    none = dict.fromkeys(("probe_at", "wait_ms", "waited_ms", "patience_ms", "done"), 0)
    away = schema.outages.insert().values(answerer=ECHO.answerer, since=1, reason="refused", **none)
    await database.write(lambda c, _: c.execute(away))
    found = status.status_of(await database.read(reads.overview))
    assert {one.run: (one.rate, one.eta_seconds) for one in found.runs} == nothing
