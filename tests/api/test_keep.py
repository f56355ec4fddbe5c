"""Reasoning, log probabilities and raw answers: kept if a run asks for them, and with every answer of that run."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from sqlalchemy import select

import lbr
from lbr.api import operate
from lbr.core.errors import RunMismatchError, UsageError
from lbr.core.extras import Extra, Extras
from lbr.core.types import Outcome, Reply, Shape
from lbr.store import reads
from lbr.store.database import opened
from lbr.store.schema import extras
from lbr.store.settle import settle
from tests.support import Queue, answered, put
from tests.support.http_server import Scripted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbr.store.database import Database
    from tests.support import Cli

MODEL = "openai-chat:gpt-4o-mini"
LOGPROBS: dict[str, Any] = {
    "content": [{"token": "42", "logprob": -0.25, "bytes": None, "top_logprobs": []}],
    "refusal": None,
}
BODY = json.dumps(
    {
        "model": "gpt-4o-mini",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "42", "reasoning_content": "6 times 7"},
                "logprobs": LOGPROBS,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }
)
KEPT = {"reasoning": "6 times 7", "logprobs": LOGPROBS, "raw": BODY}
ALL = tuple(KEPT)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """Return a server that thinks, and gives the probabilities of its words."""
    with Scripted(body=BODY) as served:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("OPENAI_BASE_URL", served.url)
        yield served


async def stored(db_url: str) -> list[tuple[bool, ...]]:
    """Return which kinds each row of the table has."""
    async with opened(db_url) as database:
        rows = (await database.read(lambda c, _: c.execute(select(extras).order_by(extras.c.job_id)))).all()
    return [tuple(getattr(row, kind) is not None for kind in ALL) for row in rows]


async def ask(db_url: str, run: str, *, prompts: tuple[str, ...] = ("a",), **how: Any) -> int:
    """Enqueue and work; return how many of the answers another run had."""
    report = await lbr.enqueue(prompts, run=run, model=MODEL, db_url=db_url, **how)
    await lbr.work(run=run, db_url=db_url)
    return report.counts.reused


async def collected(db_url: str, run: str, *include: str) -> list[dict[str, Any]]:
    """Return a run's rows."""
    return (await lbr.collect(run, include=include, db_url=db_url)).rows or []


async def test_what_comes_with_an_answer_is_kept_and_shown_on_request(db_url: str, server: Scripted) -> None:
    """The fields stand at the end of each row, only if they are asked for; the probabilities are asked for."""
    await ask(db_url, "r", prompts=("a", "b", "a"), keep="raw, reasoning,logprobs", settings={"temperature": 0})
    assert [one["logprobs"] for one in server.asked] == [True, True]
    plain, whole = await collected(db_url, "r"), await collected(db_url, "r", *ALL)
    assert whole == [row | KEPT for row in plain]
    assert [list(row)[-3:] for row in whole] == [list(ALL)] * 3
    assert [row["raw"] for row in await collected(db_url, "r", "raw")] == [BODY] * 3
    unique = await lbr.collect("r", shape="unique", include="reasoning", db_url=db_url)
    assert [row["reasoning"] for row in unique.rows or []] == ["6 times 7"] * 2
    assert (await operate.show("r", 2, db_url=db_url)).row.kept == KEPT


@pytest.mark.parametrize("ending", ["csv", "parquet", "sqlite"])
async def test_tables_have_columns_of_it(db_url: str, server: Scripted, tmp_path: Path, ending: str) -> None:
    """They come last, as text, probabilities as JSON; a row without an answer has empty cells."""
    await ask(db_url, "r", keep=ALL)
    await lbr.enqueue(["b"], run="r", model=MODEL, keep=ALL, append=True, db_url=db_url)
    out = tmp_path / f"a.{ending}"
    await lbr.collect("r", out=out, include=["usage", *ALL], db_url=db_url)
    readers: dict[str, Any] = {"csv": pl.read_csv, "parquet": pl.read_parquet, "sqlite": read_sqlite}
    table = readers[ending](out)
    assert table.columns[-len(ALL) :] == list(ALL)
    first, second = table.to_dicts()
    assert {name: first[name] for name in ALL} == KEPT | {"logprobs": json.dumps(LOGPROBS, separators=(",", ":"))}
    assert {second[name] for name in ALL} == {None}


def read_sqlite(path: Path) -> pl.DataFrame:
    """Return the table of a file that a collect wrote."""
    with closing(sqlite3.connect(path)) as connection:
        return pl.read_database("SELECT * FROM answers", connection)


async def test_only_what_a_run_keeps_is_stored(db_url: str, server: Scripted) -> None:
    """Nothing is stored of a run that keeps nothing, and its calls are as before."""
    await ask(db_url, "plain")
    assert await stored(db_url) == []
    assert "logprobs" not in server.asked[0]
    await ask(db_url, "r", keep=["reasoning"])
    assert await stored(db_url) == [(True, False, False)]
    assert "logprobs" not in server.asked[1]


async def test_an_answer_that_lacks_what_is_kept_is_not_reused(db_url: str, server: Scripted) -> None:
    """One that has it is, with that alone."""
    assert await ask(db_url, "plain") == 0
    assert await ask(db_url, "thoughts", keep="reasoning") == 0
    assert await ask(db_url, "everything", keep=ALL) == 0
    assert await ask(db_url, "again", keep="reasoning") == 1
    assert await ask(db_url, "raw", keep="raw") == 1
    assert await ask(db_url, "plain too") == 1
    assert len(server.asked) == 3
    kinds = [(True, False, False), (True, True, True), (True, False, False), (False, False, True)]
    assert await stored(db_url) == kinds
    assert [row["raw"] for row in await collected(db_url, "raw", "raw")] == [BODY]


async def test_an_answer_that_is_redone_or_removed_takes_everything_with_it(db_url: str, server: Scripted) -> None:
    """A job without an answer has nulls until its next one."""
    await ask(db_url, "r", keep="reasoning")
    assert await lbr.retry("r", where="status=done", db_url=db_url) == 1
    assert await stored(db_url) == []
    (row,) = await collected(db_url, "r", "reasoning")
    assert (row["status"], row["reasoning"]) == ("pending", None)
    assert (await operate.show("r", 0, db_url=db_url)).row.kept == {"reasoning": None}
    await lbr.work(db_url=db_url)
    assert [row["reasoning"] for row in await collected(db_url, "r", "reasoning")] == ["6 times 7"]
    await operate.remove("r", db_url=db_url)
    assert await stored(db_url) == []
    assert len(server.asked) == 2


async def test_what_a_run_keeps_does_not_change(db_url: str, server: Scripted) -> None:
    """The same enqueue adds nothing; one that keeps something else is refused, and says what to do."""
    await ask(db_url, "r", keep="reasoning,raw")
    report = await lbr.enqueue(["a"], run="r", model=MODEL, keep=["raw", "reasoning"], db_url=db_url)
    assert report.counts.known == 1
    for keep in ("raw", ""):
        with pytest.raises(RunMismatchError, match="run 'r' keeps reasoning,raw, not .* repeat its keep=…, or use"):
            await lbr.enqueue(["a", "b"], run="r", model=MODEL, keep=keep, db_url=db_url)
    assert len(await collected(db_url, "r")) == 1
    assert len(server.asked) == 1


async def test_what_cannot_be_kept_is_refused(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function, a model without probabilities, an unknown word: with the way out, and nothing is written."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"function": "json:dumps", "keep": "raw"}, "keep=… is for models, and a function returns only its answer"),
        ({"model": MODEL, "keep": "thoughts"}, "expected keep to be one of reasoning, logprobs, raw, got: 'thoughts'"),
        ({"model": "anthropic:claude-haiku-4-5", "keep": "logprobs"}, "cannot be asked for log probabilities"),
        ({"model": "openai-chat:gpt-5", "keep": "logprobs"}, "cannot be asked for log probabilities"),
        ({"model": MODEL, "settings": {"openai_logprobs": True}, "keep": "raw"}, "unless you add logprobs to keep=…"),
    ]
    for how, words in refused:
        with pytest.raises(UsageError, match=words):
            await lbr.enqueue(["a"], run="r", db_url=db_url, **how)
    await lbr.enqueue(["a"], run="r", model="offline:echo", keep="raw", db_url=db_url)
    with pytest.raises(UsageError, match="the run does not keep reasoning; enqueue it under another name"):
        await collected(db_url, "r", "raw", "reasoning")
    with pytest.raises(UsageError, match="expected include to be one of"):
        await collected(db_url, "r", "everything")


@pytest.mark.parametrize("settings", [{"openai_top_logprobs": 2}, {"extra_body": {"top_logprobs": 2}}])
async def test_settings_of_probabilities_are_taken_with_them(
    db_url: str, server: Scripted, settings: dict[str, Any]
) -> None:
    """Whichever adapter sends them, the number of alternatives goes with what asks for them, and the result is kept."""
    await ask(db_url, "r", settings=settings, keep="logprobs")
    assert [(one["logprobs"], one["top_logprobs"]) for one in server.asked] == [(True, 2)]
    assert [row["logprobs"] for row in await collected(db_url, "r", "logprobs")] == [LOGPROBS]


async def test_prompt_map_returns_what_it_keeps(db_url: str, server: Scripted, tmp_path: Any) -> None:
    """In its rows and in the frame, where probabilities are JSON; the same call without it is another run."""
    how: dict[str, Any] = {"model_name": MODEL, "db_url": db_url, "results_db_url": tmp_path / "results.db"}
    (row,) = await lbr.prompt_map(["a"], keep=ALL, **how)
    assert {name: row[name] for name in ALL} == KEPT
    (frame,) = (await lbr.prompt_map(["a"], keep=ALL, return_dtype="polars", **how)).to_dicts()
    assert {name: frame[name] for name in ALL} == KEPT | {"logprobs": json.dumps(LOGPROBS, separators=(",", ":"))}
    (plain,) = await lbr.prompt_map(["a"], **how)
    assert list(plain) == ["idx", "key", "prompt", "status", "result", "error"]
    assert len(server.asked) == 1


async def test_large_raw_answers_are_written_and_collected_in_pages(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page holds some megabytes, whatever was kept; a row that is larger comes alone."""
    run, queue = await put(database, [str(n) for n in range(40)], keep=(Extra.RAW,)), Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=40)
    claims = await queue.claim(worker, [run.id], 40, lease=60)
    sizes = [9_000_000 if n == 20 else 400_000 if n % 2 else 10 for n in range(40)]
    replies = [Reply("x", extras=Extras(raw="r" * sizes[int(one.prompt.text or 0)])) for one in claims]
    batch = [
        replace(answered(one), outcome=Outcome(reply, None, 5)) for one, reply in zip(claims, replies, strict=True)
    ]
    monkeypatch.setattr("lbr.store.settle.EXTRAS_CHARACTERS", 3_000_000)
    await database.write(settle, batch)
    pages = [page async for page in reads.rows(database, run, Shape.ORIGINAL, include=(Extra.RAW,))]
    assert [len(row.kept["raw"]) for page in pages for row in page if row.kept] == sizes
    totals = [sum(len(row.kept["raw"]) for row in page if row.kept) for page in pages]
    assert max(total for total in totals if total < 9_000_000) < 8_500_000
    assert len(pages) > 3


def test_the_command_line_keeps_and_writes(cli: Cli, server: Scripted) -> None:
    """`run` takes both flags, refuses one without the other before any call, and `show` prints what was kept."""
    cli.environment |= {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": server.url}
    (cli.folder / "p.txt").write_text("How much is 6*7?\n")
    run = ("run", "p.txt", "--model", MODEL, "-o")
    refused = cli(*run, "a.jsonl", "--with", "reasoning", "--keep", "raw", check=False)
    assert (refused.returncode, "the run does not keep reasoning" in refused.stderr) == (2, True)
    assert cli(*run, "a.db", "--keep", "raw", "--with", "raw", check=False).returncode == 2
    assert server.asked == []
    cli(*run, "a.jsonl", "--keep", "reasoning,raw", "--keep", "logprobs", "--with", "reasoning,logprobs")
    row = json.loads((cli.folder / "a.jsonl").read_text())
    assert (row["reasoning"], row["logprobs"], "raw" in row) == (KEPT["reasoning"], LOGPROBS, False)
    shown = cli("show", "p", "0").stdout
    assert "\n\nreasoning\n  6 times 7\n" in shown
    assert f"\n\nraw\n  {BODY}" in shown
    assert json.loads(cli("show", "p", "0", "--json").stdout)["logprobs"] == LOGPROBS
