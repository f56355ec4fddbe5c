"""The baseline of the queue: plain sqlite3 on the same tables, with nothing that can be left out.

It renews no leases, has no fence and survives no crash. It shows how fast one process that does nothing else can fill,
drain and read the tables.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

import orjson

from lbr.core.types import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BATCH = 128

_CLAIM = """
UPDATE jobs SET state = 'inflight', claim_seq = claim_seq + 1, worker_id = 1, lease_until = ?
WHERE id IN (
  SELECT id FROM jobs WHERE state = 'pending' AND run_id = ? AND available_at <= ? AND crashes < 2
  ORDER BY available_at, id LIMIT ?)
RETURNING id
"""
_SETTLE = """
UPDATE jobs SET state = 'done', attempts = attempts + 1, finished_at = ?, worker_id = NULL, lease_until = NULL
WHERE id = ?
"""
_ROWS = """
SELECT items.idx, prompts.key, jobs.state, prompts.body, results.text
FROM items JOIN jobs ON jobs.id = items.job_id JOIN prompts ON prompts.job_id = jobs.id
LEFT JOIN results ON results.job_id = jobs.id
WHERE items.run_id = ? ORDER BY items.idx
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open a queue's file as durable as lbr does."""
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("synchronous = FULL", "wal_autocheckpoint = 0", "cache_size = -32768"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def enqueue(path: Path, run_id: int, prompts: Sequence[str]) -> None:
    """Fill the tables in one transaction, each distinct prompt one job."""
    now = time.time_ns() // 1_000_000
    jobs_by_key: dict[bytes, int] = {}
    items, bodies = [], []
    for idx, prompt in enumerate(prompts):
        key = hashlib.blake2b(prompt.encode(), digest_size=KEY_BYTES).digest()
        job_id = jobs_by_key.get(key)
        if job_id is None:
            job_id = jobs_by_key[key] = len(jobs_by_key) + 1
            bodies.append((job_id, run_id, key, prompt))
            items.append((run_id, idx, job_id, 1))
        else:
            items.append((run_id, idx, job_id, 0))
    with closing(connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO jobs (id, run_id, state, available_at, claim_seq, attempts, crashes, retry_seq) "
            "VALUES (?, ?, 'pending', ?, 0, 0, 0, 0)",
            [(job_id, run_id, now) for job_id, *_ in bodies],
        )
        connection.executemany("INSERT INTO prompts (job_id, run_id, key, chat, body) VALUES (?, ?, ?, 0, ?)", bodies)
        connection.executemany("INSERT INTO items (run_id, idx, sample, job_id, first) VALUES (?, ?, 0, ?, ?)", items)
        connection.execute(
            "INSERT INTO counters (run_id, name, shard, value) VALUES (?, 'pending', 0, ?)",
            (run_id, len(bodies)),
        )
        connection.execute("COMMIT")


def drain(path: Path, run_id: int) -> int:
    """Claim a batch and settle a batch in turn until nothing is left; return how many were answered."""
    answered = 0
    with closing(connect(path)) as connection:
        while claimed := _claim(connection, run_id):
            bodies = connection.execute(
                f"SELECT job_id, body FROM prompts WHERE job_id IN ({', '.join('?' * len(claimed))})",  # noqa: S608
                claimed,
            ).fetchall()
            _settle(connection, run_id, bodies)
            answered += len(bodies)
    return answered


def _claim(connection: sqlite3.Connection, run_id: int) -> list[int]:
    now = time.time_ns() // 1_000_000
    connection.execute("BEGIN IMMEDIATE")
    ids = [row[0] for row in connection.execute(_CLAIM, (now + 60_000, run_id, now, BATCH))]
    _count(connection, run_id, "pending", -len(ids))
    _count(connection, run_id, "inflight", len(ids))
    connection.execute("COMMIT")
    return ids


def _settle(connection: sqlite3.Connection, run_id: int, bodies: list[tuple[int, str]]) -> None:
    now = time.time_ns() // 1_000_000
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(_SETTLE, [(now, job_id) for job_id, _ in bodies])
    connection.executemany("INSERT INTO results (job_id, text, latency_ms) VALUES (?, ?, 0)", bodies)
    _count(connection, run_id, "inflight", -len(bodies))
    _count(connection, run_id, "done", len(bodies))
    connection.execute("COMMIT")


def _count(connection: sqlite3.Connection, run_id: int, name: str, by: int) -> None:
    connection.execute(
        "INSERT INTO counters (run_id, name, shard, value) VALUES (?, ?, 0, ?) "
        "ON CONFLICT DO UPDATE SET value = value + excluded.value",
        (run_id, name, by),
    )


def collect(path: Path, run_id: int, out: Path) -> int:
    """Write the rows in the order of their inputs as JSON lines; return how many there were."""
    rows = 0
    with closing(connect(path)) as connection, out.open("wb") as file:
        for idx, key, state, prompt, text in connection.execute(_ROWS, (run_id,)):
            row = {
                "idx": idx,
                "key": key.hex(),
                "prompt": prompt,
                "status": state,
                "result": text,
                "error": None,
            }
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            rows += 1
    return rows
