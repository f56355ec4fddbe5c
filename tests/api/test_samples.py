"""Several answers per prompt: each is a job of its own, with its place, its key and its seed, in every output."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pandas as pd
import polars as pl
import pytest

import lbr
from lbr import export_jsonl
from lbr.api import operate
from lbr.core.errors import RunChangedError, RunMismatchError, UsageError
from lbr.store import enqueue, reads, results_db, sql, transfer
from lbr.store.database import opened
from tests.support import assert_counted, meanwhile
from tests.support.http_server import Scripted, completion

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import Cli

MODEL = "openai-chat:gpt-4o-mini"


async def number(prompt: str) -> str:
    """Answer with a number that no other answer has."""
    CALLS.append(prompt)
    return f"{prompt} {len(CALLS)}"


CALLS: list[str] = []


async def put(db_url: str, prompts: list[Any], samples: int | None = None, **how: Any) -> tuple[int, ...]:
    """Enqueue into a run; return what was counted."""
    report = await lbr.enqueue(prompts, function=number, samples=samples, db_url=db_url, **{"run": "r", **how})
    counts = report.counts
    return counts.inputs, counts.known, counts.new, counts.duplicate, counts.reused


async def answer(db_url: str, run: str = "r") -> int:
    """Answer all jobs; return the number of calls."""
    before = len(CALLS)
    await lbr.work(run=run, functions=[number], db_url=db_url)
    return len(CALLS) - before


async def rows_of(db_url: str, run: str = "r", **how: Any) -> list[dict[str, Any]]:
    """Return a run's rows."""
    return (await lbr.collect(run, db_url=db_url, **how)).rows or []


async def places_of(db_url: str, run: str = "r", **how: Any) -> list[tuple[int, int]]:
    """Return the places of a run's rows."""
    return [(row["idx"], row["sample"]) for row in await rows_of(db_url, run, **how)]


def grid(inputs: int, samples: int) -> list[tuple[int, int]]:
    """Return all places."""
    return [(idx, sample) for idx in range(inputs) for sample in range(samples)]


async def test_each_sample_is_a_job_that_equal_prompts_share(db_url: str) -> None:
    """Rows say which sample they are; the first has the key and the answer of a run with one; others reuse them all."""
    assert await put(db_url, ["a", "b"], run="one") == (2, 0, 2, 0, 0)
    await answer(db_url, "one")
    assert await put(db_url, ["a", "b", "a"], 3) == (3, 0, 6, 3, 2)
    assert await answer(db_url) == 4
    rows = await rows_of(db_url)
    assert [(row["idx"], row["sample"]) for row in rows] == grid(3, 3)
    assert list(rows[0]) == ["idx", "sample", "key", "prompt", "status", "result", "error"]
    one = await rows_of(db_url, "one")
    assert (rows[0]["key"], rows[0]["result"]) == (one[0]["key"], one[0]["result"])
    assert len({row["key"] for row in rows}) == len({row["result"] for row in rows}) == 6
    assert [row["result"] for row in rows[6:]] == [row["result"] for row in rows[:3]]
    assert await places_of(db_url, shape="unique") == grid(2, 3)
    assert await put(db_url, ["b", "new"], 4, run="more") == (2, 0, 8, 0, 3)
    assert await answer(db_url, "more") == 5
    assert [row["result"] for row in (await rows_of(db_url, "more"))[:3]] == [row["result"] for row in rows[3:6]]
    with pytest.raises(UsageError, match="different numbers of samples cannot be compared: one 1, r 3"):
        await lbr.compare(["one", "r"], db_url=db_url)
    (status,) = (await lbr.status("r", db_url=db_url)).runs
    assert (status.inputs, status.samples, status.jobs, status.duplicates) == (3, 3, 6, 3)
    async with opened(db_url) as database:
        await assert_counted(database, await database.read(reads.find_run, "r"))


async def test_a_larger_number_adds_samples_to_all_inputs(db_url: str) -> None:
    """The same enqueue, a shorter one and an append do; None keeps the number; a smaller one and other inputs change nothing."""
    prompts = ["a", "b", "c"]
    await put(db_url, prompts, 2)
    assert await answer(db_url) == 6
    before = await rows_of(db_url)
    assert await put(db_url, prompts) == await put(db_url, prompts, 2) == (3, 6, 0, 0, 0)
    with pytest.raises(
        RunMismatchError, match=r"has 2 samples of each input.* repeat its samples=…, or use another name \(run=…\)"
    ):
        await put(db_url, prompts, 1)
    with pytest.raises(RunChangedError):
        await put(db_url, ["a", "b", "changed"], 5)
    assert await rows_of(db_url) == before
    assert await put(db_url, prompts, 3) == (3, 6, 3, 0, 0)
    assert await answer(db_url) == 3
    assert [row for row in await rows_of(db_url) if row["sample"] < 2] == before
    assert await put(db_url, prompts[:1], 4) == (1, 3, 3, 0, 0)
    assert await put(db_url, ["d", "a"], 5, append=True) == (2, 0, 4 + 3 + 1, 4 + 1, 0)
    assert await answer(db_url) == 11
    rows = await rows_of(db_url)
    assert [(row["idx"], row["sample"]) for row in rows] == grid(5, 5)
    assert {row["status"] for row in rows} == {"done"}
    assert rows[20:] == [row | {"idx": 4} for row in rows[:5]]
    for wrong in (0, 10_001, True):
        with pytest.raises(UsageError, match="expected samples to be a whole number"):
            await put(db_url, ["e"], wrong, run="other")


@pytest.mark.parametrize("again", [{}, {"append": True}, {"samples": 5}])
async def test_an_interrupted_raise_is_finished_by_the_next_enqueue(
    db_url: str, monkeypatch: pytest.MonkeyPatch, again: dict[str, Any]
) -> None:
    """It has all samples of all inputs then, the first of equal ones first, whatever else is enqueued."""
    monkeypatch.setattr(enqueue, "CHUNK", 10)
    prompts = [f"p{n % 7}" for n in range(9)]
    await put(db_url, prompts, 2)
    chunks = 0

    async def stop() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 2 + 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        meanwhile(patch, enqueue.add_chunk, stop)
        with pytest.raises(KeyboardInterrupt):
            await put(db_url, prompts, 5)
    (status,) = (await lbr.status("r", db_url=db_url)).runs
    assert (status.sealed, status.samples) == (False, 5)
    assert len(await rows_of(db_url)) == 18 + 3 * 4
    counts = await put(db_url, ["p6", "p0"] if again.get("append") else prompts[:1], **again)
    inputs = 11 if again.get("append") else 9
    assert (await places_of(db_url), counts[2]) == (grid(inputs, 5), 35 - 14 - 3 * 4)
    assert await places_of(db_url, shape="unique") == grid(7, 5)
    assert await answer(db_url) == 35


async def test_two_enqueues_with_different_numbers(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that opened the run before the other raised the number adds nothing with the old one."""
    await put(db_url, ["a"])

    async def rise() -> None:
        if not raised:
            raised.append(True)
            await put(db_url, ["a"], 2)

    raised: list[bool] = []
    with monkeypatch.context() as patch:
        meanwhile(patch, enqueue.add_chunk, rise)
        with pytest.raises(
            UsageError, match="another enqueue has changed the samples of run 'r'; run the same command"
        ):
            await put(db_url, ["b"], append=True)
    await put(db_url, ["b"], append=True)
    assert await places_of(db_url) == grid(2, 2)


async def test_pages_end_anywhere_among_samples(db_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns, a results database, a followed file and a moved run are whole, whatever the size of a page."""
    monkeypatch.setattr(sql, "FIRST_PAGE", 2)
    monkeypatch.setattr(sql, "PAGE", 4)
    inputs = [{"prompt": f"p{n % 5}", "id": n, "m": n} for n in range(7)]
    await put(db_url, inputs, 3)
    await answer(db_url)
    rows = await rows_of(db_url)
    assert [(row["idx"], row["sample"]) for row in rows] == grid(7, 3)
    assert all(row["id"] == row["metadata"]["m"] == row["idx"] for row in rows)
    await lbr.collect("r", out="r.db", db_url=db_url)
    found = [one.to_dict() async for page in results_db.read_run("r.db", "r") for one in page]
    assert found == rows
    await lbr.collect("r", out="f.jsonl", follow=True, db_url=db_url)
    lines = (tmp_path / "f.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    (tmp_path / "f.jsonl").write_text("".join(f"{line}\n" for n, line in enumerate(lines) if n not in {1, 5, 20}))
    await lbr.collect("r", out="f.jsonl", follow=True, db_url=db_url)
    again = (tmp_path / "f.jsonl").read_text().splitlines()
    assert [*again[:18], *(lines[n] for n in (1, 5, 20))] == again
    target = f"sqlite:///{tmp_path / 'there.db'}"
    real = transfer.add_page

    def once(*args: Any) -> None:
        real(*args)
        pages.append(args)
        if len(pages) == 3:
            raise RuntimeError

    pages: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "add_page", once)
        with pytest.raises(RuntimeError):
            await lbr.move("r", db_url=db_url, to_url=target)
    moved = await lbr.move("r", db_url=db_url, to_url=target)
    assert (moved.inputs, moved.jobs, moved.answers) == (7, 15, 15)
    assert await rows_of(target) == rows
    assert await put(target, inputs, 4) == (7, 21, 5, 2, 0)


async def test_outputs_have_a_column_of_samples(db_url: str, tmp_path: Path) -> None:
    """Only if there are several; ids of OpenAI's lines stay; an input's own column of that name keeps it."""
    await put(db_url, [{"prompt": "a", "custom_id": "x", "sample": "mine"}, {"prompt": "b", "custom_id": "y"}], 2)
    await put(db_url, [{"prompt": "a", "custom_id": "x"}], run="one")
    await answer(db_url)
    for out in ("o.csv", "o.parquet", "o.sqlite", "all.csv", "one.csv", "o.jsonl"):
        run, columns = "one" if out == "one.csv" else "r", "all" if out == "all.csv" else "default"
        how: dict[str, Any] = {"format": "openai"} if out == "o.jsonl" else {"columns": columns}
        await lbr.collect(run, out=out, db_url=db_url, **how)
    with (tmp_path / "o.csv").open() as file:
        table = list(csv.reader(file))
    own = ["answer.sample", "result", "status", "error"]
    assert table[0] == ["prompt", "custom_id", "sample", *own]
    assert [row[2:4] for row in table[1:]] == [["mine", "0"], ["mine", "1"], ["", "0"], ["", "1"]]
    typed = pl.read_parquet(tmp_path / "o.parquet")
    assert (typed.columns, str(typed.schema["answer.sample"])) == (table[0], "Int64")
    with closing(sqlite3.connect(tmp_path / "o.sqlite")) as connection:
        assert connection.execute('SELECT "answer.sample" FROM answers').fetchall() == [(0,), (1,), (0,), (1,)]
    heads = [(tmp_path / name).read_text().partition("\n")[0] for name in ("all.csv", "one.csv")]
    assert heads == [
        "prompt,custom_id,sample,idx,answer.sample,key,status,result,error",
        "prompt,custom_id,result,status,error",
    ]
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["x", "x", "y", "y"]
    assert len({line["id"] for line in lines}) == 4


async def test_show_takes_the_sample(db_url: str, cli: Cli) -> None:
    """It is the first if none is named; another than there are is refused."""
    await put(db_url, ["a"], 2)
    await answer(db_url)
    rows = await rows_of(db_url)
    assert [(await operate.show("r", 0, sample=n, db_url=db_url)).row.to_dict() for n in (0, 1)] == rows
    shown_row = cli("show", "r", "0", "--sample", "1").stdout
    assert shown_row.startswith(f"run r, input 0, sample 1: done\nkey {rows[1]['key']}\n")
    done = cli("show", "r", "0", "--sample", "2", check=False)
    assert (done.returncode, done.stderr) == (2, "lbr: expected a sample of run 'r', got: 2; there are 0 to 1\n")


async def test_a_results_database_of_before_gets_the_column(db_url: str, tmp_path: Path) -> None:
    """Its rows stay, in their order, and can be exported before; those of runs with one sample have none."""
    await put(db_url, ["a", "b"], run="one")
    await put(db_url, ["a", "b"], 2)
    await answer(db_url, "one")
    await answer(db_url)
    path = tmp_path / "r.db"
    await lbr.collect("one", out=path, db_url=db_url)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(
            "CREATE TABLE o (run TEXT NOT NULL, idx INTEGER NOT NULL, id BLOB, key TEXT NOT NULL, prompt TEXT NOT NULL, "
            "status TEXT NOT NULL, result TEXT, error TEXT, metadata TEXT, PRIMARY KEY (run, idx)); INSERT INTO o "
            "SELECT run, idx, id, key, prompt, status, result, error, metadata FROM results; DROP TABLE results; "
            "ALTER TABLE o RENAME TO results"
        )
    for run in ("one", "r"):
        assert await export_jsonl(path, out="e.jsonl", run="one") == 2
        exported = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
        assert exported == await rows_of(db_url, "one")
        await lbr.collect(run, out=path, db_url=db_url)
    assert await export_jsonl(path, out="e.jsonl") == 4
    assert [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()] == await rows_of(db_url)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'").fetchall() == [
            ("results",)
        ]


async def test_each_sample_is_sent_a_seed_of_its_own(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the task's, the prompt's own or a retry's, and the number of the sample is added; without one, none is."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    lines = [{"messages": [{"role": "user", "content": "own"}], "seed": 40, "model": "gpt-4o-mini"}]
    batch = [{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": line} for line in lines]
    with Scripted(body=completion("fine")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)

        async def seeds(run: str, prompts: list[Any], **settings: Any) -> list[int | None]:
            server.asked.clear()
            await lbr.enqueue(prompts, run=run, model=MODEL, settings=settings, samples=3, db_url=db_url)
            await lbr.work(run=run, db_url=db_url)
            return sorted(one.get("seed") for one in server.asked)

        assert await seeds("task", ["a"], seed=7) == [7, 8, 9]
        assert await seeds("own", batch, seed=7) == [40, 41, 42]
        await lbr.retry("own", where=["status=done"], settings={"seed": 100}, db_url=db_url)
        server.asked.clear()
        await lbr.work(run="own", db_url=db_url)
        assert sorted(one["seed"] for one in server.asked) == [100, 101, 102]
        server.asked.clear()
        await lbr.enqueue(["none"], run="none", model=MODEL, samples=2, db_url=db_url)
        await lbr.work(run="none", db_url=db_url)
        assert [one.get("seed") for one in server.asked] == [None, None]


@pytest.mark.parametrize(
    ("temperature", "prompts", "samples", "is_told"),
    [
        (0.7, ["a", "a"], None, True),
        (0, ["a", "a"], None, False),
        (1, ["a", "b"], None, False),
        (1, ["a", "a"], 2, False),
    ],
)
async def test_duplicates_at_a_temperature_are_told(
    temperature: float,
    prompts: list[str],
    samples: int | None,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One line says that equal prompts share an answer, and what gives several."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    how: dict[str, Any] = {"settings": {"temperature": temperature}, "samples": samples, "db_url": tmp_path / "q.db"}
    report = await lbr.enqueue(prompts, run="r", model=MODEL, **how)
    words = "temperature is 0.7, but equal prompts share an answer (1 duplicate); --samples (samples=) gives each prompt several"
    assert report.notices == [words] * is_told


async def test_an_estimate_counts_each_call(tmp_path: Path) -> None:
    """Tokens, cost and time are of all samples."""
    how: dict[str, Any] = {"model": MODEL, "price": "in=1,out=1", "output_tokens": 10, "concurrency": 1}
    one, three = [await lbr.estimate(["aaaa", "bbbb"], samples=n, **how) for n in (None, 3)]
    assert (one.samples, three.samples, three.prompts) == (1, 3, 2)
    for name in ("input_tokens", "output_tokens", "cost_usd", "seconds"):
        assert getattr(three, name) == pytest.approx(3 * getattr(one, name))


async def test_a_call_from_python_returns_all_samples(tmp_path: Path) -> None:
    """In rows, frames and a stream; calls with more or fewer reuse each other's answers."""
    how: dict[str, Any] = {"db_url": tmp_path / "q.db", "progress_every": None}
    one = await lbr.prompt_map(["a", "b", "a"], number, **how)
    before = len(CALLS)
    rows = await lbr.prompt_map(["a", "b", "a"], number, samples=3, **how)
    assert [(row["idx"], row["sample"]) for row in rows] == grid(2, 3)
    assert [row["result"] for row in rows[::3]] == [row["result"] for row in one]
    assert len(CALLS) == before + 4
    assert await lbr.prompt_map(["a", "b", "a"], number, samples=2, **how) == [row for row in rows if row["sample"] < 2]
    texts = await lbr.prompt_map(["b"], number, samples=3, return_dtype="list[str]", **how)
    assert texts == [row["result"] for row in rows[3:]]
    for frame in (pl.DataFrame({"t": ["b", "a"]}), pd.DataFrame({"t": ["b", "a"]}, index=[7, 8])):
        made = await lbr.prompt_map(frame, number, prompt_column="t", samples=3, **how)
        assert made["t"].to_list() == ["b"] * 3 + ["a"] * 3
        assert made["sample"].to_list() == [0, 1, 2] * 2
        assert made["result"].to_list() == [row["result"] for row in (*rows[3:], *rows[:3])]
        assert not isinstance(made, pd.DataFrame) or list(made.index) == [7, 7, 7, 8, 8, 8]
    streamed = [row async for row in lbr.stream(["a", "b", "a"], number, samples=3, db_url=how["db_url"])]
    assert streamed == [*rows, *(row | {"idx": 2} for row in rows[:3])]
    assert len(CALLS) == before + 4
    with pytest.raises(UsageError, match="expected samples to be a whole number from 1"):
        await lbr.prompt_map(["a"], number, samples=0, **how)
