"""Several answers per prompt under kills: every sample is asked for once and answered once, and a raise asks for the rest."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.support import is_postgresql, postgres
from tests.support.http_server import Script, Server, completion, reply

if TYPE_CHECKING:
    from tests.support import Cli
    from tests.support.http_server import Request

PROMPTS, SAMPLES, SLOTS = 200, 5, 16
INPUTS = 6_000
ITEMS = 1_000_000
LIMIT_MEGABYTES = 300
FILLING = "INSERT INTO items (run_id, idx, job_id, first, metadata) SELECT 1, n, n, 1,"
NUMBERS = f"WITH RECURSIVE n(n) AS (VALUES (0) UNION ALL SELECT n + 1 FROM n WHERE n < {ITEMS - 1}) "


class Numbering(Server):
    """A provider that numbers its answers, and keeps the prompt of each that a client got whole."""

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.asked: Counter[str] = Counter()

    def _respond(self, request: Request) -> Script:
        prompt = request.json()["messages"][-1]["content"]
        self.asked[prompt] += 1
        return reply(200, completion(f"answer {self.asked.total()}"), seconds=0.02)


def answers_of(cli: Cli, samples: int) -> set[str]:
    """Return the answers of the run, each of which must be there once, at its place."""
    rows = cli.collect("in")
    places = [(row["idx"], row["sample"]) for row in rows]
    assert places == [(idx, sample) for idx in range(PROMPTS) for sample in range(samples)]
    assert {row["status"] for row in rows} == {"done"}
    answers = {row["result"] for row in rows}
    assert len(answers) == len({row["key"] for row in rows}) == PROMPTS * samples
    return answers


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_five_samples_of_two_hundred_prompts(cli: Cli) -> None:
    """1,000 distinct calls and answers; a killed command makes again what it had in flight, and nothing else."""
    (cli.folder / "in.txt").write_text("".join(f"prompt {n}\n" for n in range(PROMPTS)))
    command = ("--model", "openai-chat:m", "--set", "seed=1")
    work = ("--concurrency", str(SLOTS), "--lease", "1")
    with Numbering() as server:
        cli.environment |= {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-test"}
        first = cli.start("run", "in.txt", "-o", "out.jsonl", *command, *work, "--samples", "2")
        cli.wait_for("in", "done", 100)
        first.kill()
        first.wait()
        cli("run", "in.txt", "-o", "out.jsonl", *command, *work, "--samples", "2")
        two = answers_of(cli, 2)
        assert 0 <= server.asked.total() - 2 * PROMPTS <= SLOTS
        before = server.asked.total()
        raised = cli.start("run", "in.txt", "-o", "out.jsonl", *command, *work, "--samples", str(SAMPLES))
        cli.wait_for("in", "done", 2 * PROMPTS + 200)
        raised.kill()
        raised.wait()
        cli("run", "in.txt", "-o", "out.jsonl", *command, *work)
        five = answers_of(cli, SAMPLES)
        assert 0 <= server.asked.total() - before - (SAMPLES - 2) * PROMPTS <= SLOTS
        calls = server.asked.total()
        cli("run", "in.txt", "-o", "out.jsonl", *command, *work, "--samples", str(SAMPLES))
        assert server.asked.total() == calls
    assert two < five
    assert len((cli.folder / "out.jsonl").read_text().splitlines()) == PROMPTS * SAMPLES


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_killed_raise_is_finished(cli: Cli) -> None:
    """An enqueue that is killed while it adds samples leaves a run that the same command completes."""
    (cli.folder / "in.txt").write_text("".join(f"prompt {n % 5_000}\n" for n in range(INPUTS)))
    cli("enqueue", "in.txt", "--model", "offline:echo", "--samples", "2")
    raised = cli.start("enqueue", "in.txt", "--model", "offline:echo", "--samples", str(SAMPLES))
    cli.wait_for("in", "pending", 12_000)
    raised.kill()
    raised.wait()
    status = json.loads(cli("status", "in", "--json").stdout)["runs"][0]
    assert (status["sealed"], status["samples"]) == (False, SAMPLES)
    assert status["jobs"] < 25_000
    done = cli("enqueue", "in.txt", "--model", "offline:echo", "--samples", str(SAMPLES))
    assert f"{25_000 - status['jobs']} new" in done.stdout
    found = cli.query("SELECT sample, count(*), sum(first) FROM items GROUP BY sample ORDER BY sample")
    assert [tuple(map(int, row)) for row in found] == [(n, INPUTS, 5_000) for n in range(SAMPLES)]


MIGRATION = """
import asyncio, sys
from pathlib import Path
from lbr.store.database import open_database
async def main():
    await (await open_database(sys.argv[1])).close()
asyncio.run(main())
# Not ru_maxrss, which begins with the peak of the process that forked this one.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.timeout(300)
def test_a_million_items_get_their_samples_in_little_memory(cli: Cli, db_url: str) -> None:
    """The new key of the items is built in bounded memory, and every row stays."""
    (cli.folder / "in.txt").write_text("a\n")
    cli("enqueue", "in.txt", "--model", "offline:echo")
    server = is_postgresql(db_url)
    where = "lbr." if server else ""
    statements = [f"DELETE FROM {where}items", f"DELETE FROM {where}schema_version WHERE version > 13"]
    if server:
        statements += [
            "ALTER TABLE lbr.items DROP CONSTRAINT items_pkey, DROP COLUMN sample, ADD PRIMARY KEY (run_id, idx)",
            f"{FILLING} repeat('m', 50) FROM generate_series(0, {ITEMS - 1}) AS n".replace("items", "lbr.items"),
        ]
        for statement in statements:
            postgres.execute(db_url, statement)
    else:
        columns = "run_id INTEGER, idx INTEGER, job_id INTEGER NOT NULL, first SMALLINT NOT NULL"
        columns += ", custom_id TEXT, metadata TEXT, id_is_number SMALLINT"
        statements += [
            "DROP TABLE items",
            f"CREATE TABLE items ({columns}, PRIMARY KEY (run_id, idx)) WITHOUT ROWID",
            NUMBERS + f"{FILLING} printf('%.50c', 'm') FROM n",
        ]
        with closing(sqlite3.connect(cli.folder / "queue.db")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
    script = [sys.executable, "-c", MIGRATION, db_url]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200, check=True)
    assert int(done.stdout) < LIMIT_MEGABYTES
    found = cli.query("SELECT count(*), max(idx), sum(sample), sum(job_id - idx), max(length(metadata)) FROM items")
    assert tuple(map(int, found[0])) == (ITEMS, ITEMS - 1, 0, 0, 50)
    assert json.loads(cli("status", "in", "--json").stdout)["runs"][0]["inputs"] == ITEMS
