"""The benchmark in its short form: it checks its answers, and counts what does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson
import pytest

import lbr
from lbr.api.bench import measures
from lbr.api.bench.measures import BenchError, Sizes, check_lines, measure
from tests.support import ROOT
from tests.support.hearing import Hearing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Cli

JOBS = 1_000
PARTS_OF_A_STATEMENT = ("SELECT", "INSERT", "UPDATE", "WITH", "DELETE")


@pytest.fixture
def counted() -> Iterator[Counter[str]]:
    """Count statements, rows given to them, and commits, on every connection."""
    counts: Counter[str] = Counter()

    def statement(sql: str, _values: Any) -> None:
        if sql.lstrip().startswith(PARTS_OF_A_STATEMENT):
            counts["statements"] += 1

    def commit() -> None:
        counts["commits"] += 1

    hearing = Hearing(statement, commit)
    hearing.begin()
    yield counts
    hearing.end()


async def test_a_thousand_jobs_take_few_statements(counted: Counter[str], db_url: str) -> None:
    """What a thousand jobs cost a database is counted in tens, for many go in one transaction."""
    prompts = [f"prompt {n}" for n in range(JOBS)]
    # PostgreSQL is asked about its schema, about turns, and for ids. A slow disk may make a batch or two more of the calls.
    server = db_url.startswith("postgresql")
    bounds = {
        "enqueue": {"statements": 53 if server else 28, "commits": 8},
        "work": {"statements": 80 if server else 57, "commits": 22},
        "collect": {"statements": 8, "commits": 6},
    }
    found = {}
    for step in bounds:
        counted.clear()
        if step == "enqueue":
            await lbr.enqueue(prompts, run="bench", function=measures.ECHO, db_url=db_url)
        elif step == "work":
            report = await lbr.work(functions=[measures.ECHO], concurrency=250, db_url=db_url)
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


@pytest.mark.processes
def test_bench_measures_and_checks(cli: Cli) -> None:
    """`lbr bench` prints a row for each measurement, with a ratio, and leaves nothing behind."""
    found = cli("bench", "--jobs", "400", "--json")
    printed = orjson.loads(found.stdout)
    rows = {row["name"]: row for row in printed["measured"]}
    assert set(rows) == {"enqueue", "claim and settle", "collect", "jobs of 5 ms", "chat calls of 50 ms"}
    assert all(row["ratio"] > 0 and row["lbr"]["seconds"] > 0 for row in rows.values())
    assert "Python" in printed["about"]
    assert [path.name for path in cli.folder.iterdir()] == []


def test_wrong_answers_are_no_measurement(tmp_path: Path) -> None:
    """A missing row, and an answer that is not the prompt, end the benchmark."""
    out = tmp_path / "out.jsonl"
    good = {"idx": 0, "prompt": "a", "status": "done", "result": "a"}
    for rows in ([], [good | {"result": "b"}], [good | {"status": "failed"}], [good, good]):
        out.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        with pytest.raises(BenchError, match="the measurement means nothing"):
            check_lines(out, ["a"])
    out.write_bytes(orjson.dumps(good))
    check_lines(out, ["a"])


def test_a_benchmark_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no job was answered, there is no figure."""
    monkeypatch.setattr(measures, "_work", lambda *_: 0)
    with pytest.raises(BenchError, match="expected the answers to be"):
        measure(tmp_path, Sizes(20, 20, 20), ["naps"], tell=lambda _: None)


@pytest.mark.processes
def test_client_cpu_is_measured_for_each_way(tmp_path: Path) -> None:
    """`scripts/bench_calls.py` prints what a call takes by hand, by lbr and by an agent, and keeps lbr to its target."""
    script = ROOT / "scripts" / "bench_calls.py"
    done = subprocess.run(
        [sys.executable, script, "--calls", "250"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line in lines[1:4]:
        assert all(float(figure) > 0 for figure in line.split()[-2:])
    assert list(tmp_path.iterdir()) == []
