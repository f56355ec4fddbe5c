"""What a job takes on PostgreSQL: bytes of each table with its indexes, write-ahead log and transactions.

Prompts of 180 characters, answered with as many by `offline:echo`, one worker, a temporary server in its default
settings. Times include the start of Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from bench_server import postgres

if TYPE_CHECKING:
    from collections.abc import Sequence

CHARACTERS = 180
TABLES = ("jobs", "prompts", "results", "items")
SIZE = "SELECT pg_total_relation_size(%s::text::regclass)"
WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
HOT = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'"


class Meter:
    """Reads the server's own numbers about one database."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)

    def number(self, query: bytes | str, *values: str) -> int:
        """Return the one number of a query."""
        row = self._connection.execute(query.encode() if isinstance(query, str) else query, values).fetchone()
        return int(row[0]) if row else 0

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each table."""
        return {table: self.number(SIZE, f"lbr.{table}") for table in TABLES}


def lbr(url: str, *arguments: str, folder: Path) -> float:
    """Run a command to its end and return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lbr", "--db", url, *arguments], cwd=folder, check=True)
    return time.perf_counter() - started


def report(url: str, jobs: int, folder: Path) -> None:
    """Enqueue, answer and print."""
    file = folder / "p.txt"
    file.write_text("".join(f"{n:0{CHARACTERS}d}\n" for n in range(jobs)))
    enqueue = lbr(url, "enqueue", str(file), "--model", "offline:echo", folder=folder)
    meter = Meter(url)
    empty, wal, transactions = meter.sizes(), meter.number(WAL), meter.number(TRANSACTIONS)
    worker = lbr(url, "worker", "--concurrency", "500", folder=folder)
    wal = meter.number(WAL) - wal
    full, transactions = meter.sizes(), meter.number(TRANSACTIONS) - transactions
    print(f"enqueue {enqueue:.1f} s, worker {worker:.1f} s: {jobs / worker:,.0f} jobs a second")
    print(f"worker: {transactions} transactions, {wal / jobs:,.0f} bytes of WAL a job, {meter.number(HOT)} HOT updates")
    for table in TABLES:
        print(f"{table:8} {empty[table] / jobs:6.0f} enqueued {full[table] / jobs:6.0f} answered, bytes a job")
    print(f"all      {sum(empty.values()) / jobs:6.0f} enqueued {sum(full.values()) / jobs:6.0f} answered")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on a server of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    options = parser.parse_args(arguments)
    with postgres() as server, server.database() as url, tempfile.TemporaryDirectory() as folder:
        report(url, options.jobs, Path(folder))


if __name__ == "__main__":
    main()
