"""Pages of rows of any size: nothing is left out, and no page is larger than it may be."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.core.types import (
    Part,
    Shape,
)
from lbr.store import reads, results_db, sql
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MEGABYTES, POLARS_MEGABYTES = 200, 60
MEASURE = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
)


@pytest.mark.slow
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
