"""The PostgreSQL of the tests themselves: it starts anywhere, keeps its data, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest

from lbr.store import reads
from lbr.store.database import open_database
from tests.support import PATIENCE_SECONDS, ROOT, Cli, assert_counted, postgres, put

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow


def postmaster(folder: Path) -> int:
    """Return the process of a running server."""
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


@pytest.mark.parametrize("programs", postgres.found_programs(), ids=lambda path: path.parent.name)
def test_server_starts_from_any_programs(programs: Path) -> None:
    """Each PostgreSQL that is found here starts, as root too, and answers on both of its addresses."""
    with postgres.Server(programs) as server:
        pid = postmaster(server.folder)
        for local in (False, True):
            with postgres.connect(server.url(local=local)) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not server.folder.exists()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_address_and_data(own_server: postgres.Server, mode: str) -> None:
    """However a server is stopped, nobody answers until it is back at the same place with what was committed."""
    postgres.execute(own_server.url(), "CREATE TABLE kept AS SELECT 7 AS n")
    own_server.stop(mode)  # type: ignore[arg-type]
    for local in (False, True):
        with pytest.raises(psycopg.OperationalError):
            postgres.connect(own_server.url(local=local))
    own_server.start()
    with postgres.connect(own_server.url()) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(7,)]


def test_roles_show_their_password(own_server: postgres.Server) -> None:
    """A role gets in over TCP with its password only."""
    own_server.create_role("me", "it's 100% s:e/c@ret")
    with postgres.connect(own_server.url(user="me", password="it's 100% s:e/c@ret")) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("me",)
    for password in (None, "wrong"):
        with pytest.raises(psycopg.OperationalError, match="password"):
            postgres.connect(own_server.url(user="me", password=password))


def test_each_database_is_its_own(new_database: Callable[[], str]) -> None:
    """Two databases of the shared server know nothing of each other, and are dropped while they are in use."""
    first, second = new_database(), new_database()
    postgres.execute(first, "CREATE TABLE here (n int)")
    with pytest.raises(psycopg.errors.UndefinedTable):
        postgres.execute(second, "SELECT * FROM here")
    with postgres.connect(first) as used:
        postgres.drop_database(postgres.shared_server(), first)
        with pytest.raises(psycopg.OperationalError):
            used.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres.connect(first)


@pytest.mark.parametrize(
    "change", ["ALTER TABLE lbr.jobs ADD odd int", "CREATE TABLE odd (n int)", "DROP SCHEMA lbr CASCADE"]
)
async def test_a_queue_is_given_back_empty(migrated_postgresql: str, change: str) -> None:
    """The next test has it without rows, counts from 1 and is alone with it; one that is no longer as it was is dropped."""
    queues = postgres.Queues(migrated_postgresql)
    url = queues.take()
    database = await open_database(url)
    await put(database, ["a", "b"])
    with postgres.connect(url) as used:
        queues.give_back(url)
        with pytest.raises(psycopg.OperationalError):
            used.execute("SELECT 1")
    await database.close()
    assert queues.take() == url
    database = await open_database(url)
    assert await database.read(reads.all_runs) == []
    run = await put(database, ["c"])
    assert run.id == 1
    await assert_counted(database, run)
    await database.close()
    postgres.execute(url, change)
    queues.give_back(url)
    other = queues.take()
    assert other != url
    queues.give_back(other)
    queues.close()


def test_queries_come_back_after_an_outage(own_server: postgres.Server, tmp_path: Path) -> None:
    """An outsider's question fails while the server is away, counts as nothing seen, and works again after."""
    cli = Cli(tmp_path, db_url=own_server.url())
    try:
        assert cli._look("r", "done") == 0
        postgres.execute(own_server.url(), "CREATE SCHEMA lbr")
        postgres.execute(own_server.url(), "CREATE TABLE lbr.runs AS SELECT 1 AS id, 'r%' AS name")
        counters = "SELECT 1 AS run_id, 'done' AS name, shard, 2 AS value FROM generate_series(0, 3) AS shard"
        postgres.execute(own_server.url(), f"CREATE TABLE lbr.counters AS {counters}")
        assert cli._look("r%", "done") == 8
        assert cli.query("SELECT name FROM runs WHERE name LIKE '%' AND id = ?", 1) == [("r%",)]
        own_server.stop("immediate")
        assert cli._look("r%", "done") == 0
        own_server.start()
        assert cli._look("r%", "done") == 8
    finally:
        cli.stop_all()


def test_server_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    """A server whose owner is killed without a word stops soon after, and its folder is removed."""
    program = (
        "import sys\n"
        "from tests.support.postgres import Server\n"
        "server = Server().__enter__()\n"
        "print(server.folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        server = psutil.Process(postmaster(folder))
        os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while folder.exists() or postgres._alive(server):
        assert time.monotonic() < deadline, "the server never ended"
        time.sleep(0.05)
