"""What `collect` reads beside the answers, which rows, and how they are written, on both databases."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import polars as pl
import pytest
from openai.types.chat import ChatCompletion

import lbr
from lbr.core.errors import Family, Usage
from lbr.core.extras import RowUsage
from lbr.core.types import AnswerRow, Failure, JobState, Outcome, Prompt, Reply, Settlement, Shape
from lbr.store import reads
from lbr.store.database import opened
from lbr.store.settle import settle
from tests.support import Queue, failed, put

if TYPE_CHECKING:
    from pathlib import Path

USAGE = Usage(10, 5, 700_000_000, 4)
USED = {
    "model": "m-1",
    "finish_reason": "stop",
    "input_tokens": 10,
    "output_tokens": 5,
    "cached_tokens": 4,
    "cost_usd": 0.7,
    "latency_ms": 5,
    "attempts": 1,
    "lane": "online",
}
CUT = Failure(Family.CUT_OFF, "BadAnswer", "cut", text="half", usage=USAGE, finish_reason="length")


async def half_done(db_url: str) -> None:
    """Make a run of four inputs: an answer, its duplicate, a failure and a job that waits."""
    async with opened(db_url, create=True) as database:
        run = await put(database, ["a", "a", "b", "c"])
        queue = Queue(database)
        worker = await queue.register(host="a", pid=1, concurrency=2)
        first, second = await queue.claim(worker, [run.id], 2, lease=60)
        done = Settlement(first, JobState.DONE, Outcome(Reply("A", USAGE, "m-1", "stop"), None, 5), charge=1)
        await database.write(settle, [done, replace(failed(second, CUT), state=JobState.FAILED)])


async def test_usage_of_each_row(db_url: str) -> None:
    """A done row has the usage of its answer, a failed one that of its last try, another one none."""
    await half_done(db_url)
    rows = (await lbr.collect("r", db_url=db_url, include="usage")).rows or []
    assert [{name: row[name] for name in USED} for row in rows] == [
        USED,
        USED,
        USED | {"model": None, "finish_reason": "length", "lane": None},
        dict.fromkeys(USED) | {"attempts": 0},
    ]
    plain = (await lbr.collect("r", db_url=db_url)).rows or []
    assert [{name: value for name, value in row.items() if name not in USED} for row in rows] == plain


async def test_cached_tokens_come_along(db_url: str) -> None:
    """A reused answer has them, and the history of one that is redone."""
    await half_done(db_url)
    async with opened(db_url) as database:
        again = await put(database, ["a"], name="again")
        (row,) = [row async for page in reads.rows(database, again, Shape.ORIGINAL, (), {"usage"}) for row in page]
        assert row.usage is not None
        assert (row.usage.cached_tokens, row.usage.attempts) == (4, 0)
    assert await lbr.retry("r", where="status=done", db_url=db_url) == 1
    tries = (await lbr.show("r", 0, db_url=db_url)).tries
    assert [(one.error, one.cached_tokens) for one in tries] == [("Redone", 4)]


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ({}, ["a", "a", "b", "c"]),
        ({"failed": True}, ["b"]),
        ({"status": "done"}, ["a", "a"]),
        ({"status": ["pending", "failed"]}, ["b", "c"]),
        ({"status": "inflight,pending", "failed": True}, ["b", "c"]),
        ({"status": "done", "shape": "unique"}, ["a"]),
        ({"status": "cancelled"}, []),
    ],
)
async def test_rows_of_some_states(db_url: str, how: dict[str, Any], texts: list[str]) -> None:
    """Rows in other states are left out, and are not counted."""
    await half_done(db_url)
    collected = await lbr.collect("r", db_url=db_url, **how)
    assert [row["prompt"] for row in collected.rows or []] == texts
    assert collected.total == len(texts)


async def test_lines_of_openai(db_url: str, tmp_path: Path) -> None:
    """Each line is a chat completion that OpenAI's own client reads, or an error."""
    await half_done(db_url)
    await lbr.collect("r", out=tmp_path / "o.jsonl", format="openai", db_url=db_url)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 4
    assert [line["custom_id"] for line in lines] == ["0", "1", "2", "3"]
    assert [line["error"] for line in lines[1:]] == [
        None,
        {"code": "failed", "message": "cut"},
        {"code": "pending", "message": "the job is pending"},
    ]
    assert [line["response"] is None for line in lines] == [False, False, True, True]
    body = ChatCompletion.model_validate(lines[0]["response"]["body"], strict=True)
    assert (body.model, body.choices[0].message.content, body.choices[0].finish_reason) == ("m-1", "A", "stop")
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (10, 5, 15)


async def test_messages_for_fine_tuning(tmp_path: Path) -> None:
    """A line has the instructions, the prompt and the answer of what is done; nothing else is written."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    how: dict[str, Any] = {"run": "r", "model": "offline:echo", "instructions": "Be short."}
    await lbr.enqueue(["a", {"messages": chat}], **how)
    await lbr.work()
    await lbr.enqueue(["b"], **how, append=True)
    collected = await lbr.collect("r", out=tmp_path / "o.jsonl", format="messages")
    assert (collected.by_status["done"], collected.unfinished) == (2, 1)
    lines = [json.loads(line)["messages"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    own = {"role": "system", "content": "Be short."}
    assert lines[0] == [own, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    assert lines[1][:3] == [chat[0], own, chat[1]]


async def test_every_table_has_the_same_cells(db_url: str, tmp_path: Path) -> None:
    """CSV, Parquet and SQLite have the columns of the input, of the answer and of lbr, with equal cells."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}, "tags": {"type": "array"}},
        "required": ["n", "ok", "tags"],
    }
    inputs: list[Any] = [
        {"id": n, "prompt": f"p\n{n}", "N": n, "x": [0.5, 1, None][n % 3], "b": n % 2 == 0, "deep": [n, "ü"]}
        for n in range(7)
    ]
    await lbr.enqueue(inputs, run="r", model="offline:echo", schema=schema, db_url=db_url)
    await lbr.work(db_url=db_url)
    for ending in ("csv", "parquet", "sqlite"):
        await lbr.collect("r", out=tmp_path / f"o.{ending}", db_url=db_url)
    frame = pl.read_parquet(tmp_path / "o.parquet")
    assert dict(frame.schema) == {
        "id": pl.Int64,
        "prompt": pl.String,
        "N": pl.Int64,
        "x": pl.Float64,
        "b": pl.Boolean,
        "deep": pl.String,
        "n": pl.Int64,
        "ok": pl.Boolean,
        "tags": pl.String,
        "status": pl.String,
        "error": pl.String,
    }
    rows = (await lbr.collect("r", db_url=db_url)).rows or []
    answers = [json.loads(row["result"]) for row in rows]
    assert frame.rows() == [
        (
            *(one["id"], one["prompt"], one["N"], one["x"], one["b"], orjson.dumps(one["deep"]).decode()),
            *(answer["n"], answer["ok"], orjson.dumps(answer["tags"]).decode(), "done", None),
        )
        for one, answer in zip(inputs, answers, strict=True)
    ]
    with closing(sqlite3.connect(tmp_path / "o.sqlite")) as connection:
        assert [one[1] for one in connection.execute("PRAGMA table_info(answers)")] == [
            name if name != "n" else "answer.n" for name in frame.columns
        ]
        assert connection.execute("SELECT * FROM answers").fetchall() == frame.rows()
    text = pl.read_csv(tmp_path / "o.csv", infer_schema=False)
    assert text.columns == frame.columns
    numbers = ("id", "N", "x", "n")
    casts = [pl.col(name).cast(frame.schema[name]) for name in numbers]
    assert text.with_columns(*casts, *((pl.col(name) == "true") for name in ("b", "ok"))).equals(frame)


async def test_a_table_is_not_written_over_another_database(tmp_path: Path) -> None:
    """A `.sqlite` file of answers is replaced; one that a results database became with another version is not."""
    await lbr.enqueue(["a"], run="r", model="offline:echo")
    for _ in range(2):
        await lbr.collect("r", out=tmp_path / "o.sqlite")
    await lbr.collect("r", out=tmp_path / "old.sqlite", format="db")
    with pytest.raises(lbr.UsageError, match=r"with other tables than answers \(results\); name another"):
        await lbr.collect("r", out=tmp_path / "old.sqlite")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"columns": "some"}, "expected columns to be one of default, all, got: 'some'"),
        ({"include": "cost"}, "expected include to be one of usage"),
        ({"status": "ok"}, "expected status to be one of pending, inflight, done, failed, cancelled, got: 'ok'"),
        ({"unnest": False}, "unnest=False is for tables, got: jsonl"),
        ({"columns": "all"}, "columns is for tables, got: jsonl; omit it, or write a .csv, .parquet or .sqlite"),
        ({"out": "o.db", "include": ["usage"]}, "include is for tables, got: db"),
        ({"out": "-", "format": "sqlite"}, "the format sqlite cannot be written to stdout"),
    ],
)
async def test_what_a_format_cannot_have_is_refused(how: dict[str, Any], words: str) -> None:
    """Wrong words, and flags of tables for other formats, are refused before the queue is opened."""
    with pytest.raises(lbr.UsageError, match=words):
        await lbr.collect("r", **how)


def test_rows_are_flat() -> None:
    """What was kept comes after the usage, in one object."""
    row = AnswerRow(0, "k", Prompt("a"), "done", "A", usage=RowUsage("m"), kept={"reasoning": "why"})
    assert list(row.to_dict())[6:] == [*USED, "reasoning"]
