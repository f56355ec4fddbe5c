"""The queue of a storm, as an outsider sees it: SQL on either database, and the commands that work on it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storm_calls import answer_to

if TYPE_CHECKING:
    from collections.abc import Sequence

HELD = (
    "SELECT workers.pid, COUNT(*) FROM jobs JOIN workers ON workers.id = jobs.worker_id "
    "WHERE jobs.state = 'inflight' GROUP BY workers.pid"
)
ON_LAST_TRIES = (
    "SELECT workers.pid FROM jobs JOIN workers ON workers.id = jobs.worker_id "
    "WHERE jobs.state = 'inflight' AND jobs.crashes >= 2"
)
COUNTED = (
    "SELECT run_id, name, SUM(value) FROM counters "
    "WHERE name IN ('pending', 'inflight', 'done', 'failed', 'cancelled') "
    "GROUP BY run_id, name HAVING SUM(value) <> 0"
)
RECOUNTED = "SELECT run_id, state, COUNT(*) FROM jobs GROUP BY run_id, state"


class Queue:
    """Asks one queue; `url` is a path to a file or a URL of PostgreSQL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_file = not urlsplit(url).scheme.startswith("postgres")

    @property
    def kind(self) -> str:
        """Name the kind of database."""
        return "SQLite" if self.is_file else "PostgreSQL"

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return all rows; values stand for `?`."""
        if self.is_file:
            with closing(sqlite3.connect(f"{Path(self.url).resolve().as_uri()}?mode=ro", uri=True)) as one:
                return one.execute(sql, values).fetchall()
        import psycopg  # noqa: PLC0415 - only where the queue is on a server

        with psycopg.connect(self.url, options="-c search_path=lbr", autocommit=True) as connection:
            return connection.execute(sql.replace("?", "%s").encode(), values).fetchall()

    def held(self) -> dict[int, int]:
        """Return how many claims each process holds, or held when it died."""
        return {int(pid): int(count) for pid, count in self.query(HELD)}

    def on_last_tries(self) -> set[int]:
        """Return which processes hold a job that was twice in a crash: a third one would fail it, as it should."""
        return {int(pid) for (pid,) in self.query(ON_LAST_TRIES)}

    def has_jobs(self) -> bool:
        """Tell whether anything was enqueued yet."""
        if self.is_file and not Path(self.url).exists():
            return False
        try:
            return bool(self.query("SELECT 1 FROM jobs LIMIT 1"))
        except Exception as error:
            if "no such table" in str(error) or "does not exist" in str(error):
                return False
            raise

    async def start(self, *arguments: str, keep_output: bool = False) -> asyncio.subprocess.Process:
        """Start an lbr command on it; its words are kept for whoever communicates, its output only if asked for."""
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "lbr",
            "--db",
            self.url,
            *arguments,
            stdout=asyncio.subprocess.PIPE if keep_output else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )

    async def rows(self, run: str) -> list[dict[str, Any]]:
        """Return what collect tells of a run; of one that is not there yet nothing."""
        process = await self.start("collect", run, keep_output=True)
        out, _ = await process.communicate()
        return [json.loads(line) for line in out.splitlines()]

    async def differences(self, run: str, prompts: Sequence[str]) -> list[str]:
        """Return in what the rows of a finished run are not the answers to these prompts, in this order."""
        told = [(row["idx"], row["status"], row["result"]) for row in await self.rows(run)]
        expected = [(idx, "done", answer_to(prompt)) for idx, prompt in enumerate(prompts)]
        if told == expected:
            return []
        wrong = [pair for pair in zip(told, expected, strict=False) if pair[0] != pair[1]]
        return [f"{run}: {len(told)} of {len(expected)} rows, wrong: {wrong[:3]}"]

    def problems(self) -> list[str]:
        """Return what is wrong with the whole: damage, or counters that a recount does not bear out."""
        found = []
        if self.is_file and (said := self.query("PRAGMA integrity_check")) != [("ok",)]:
            found.append(f"integrity_check: {said[:3]}")
        counted, recounted = sorted(self.query(COUNTED)), sorted(self.query(RECOUNTED))
        if [tuple(map(str, row)) for row in counted] != [tuple(map(str, row)) for row in recounted]:
            found.append(f"counters say {counted}, a recount {recounted}")
        return found

    def bytes_of_wal(self) -> int:
        """Return how large the log beside the file is, 0 for a server or where there is none."""
        wal = Path(f"{self.url}-wal")
        return wal.stat().st_size if self.is_file and wal.exists() else 0
