"""What is SQLite's own: the file and its mode, plans, locks, checkpoints, and databases that are not ours."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import column, select, table, text

import lbr
from lbr.core.errors import DatabaseBusyError, DatabaseError, MisfitError, UsageError
from lbr.core.types import Item, KeyMaker, Prompt, Shape
from lbr.store import enqueue, files, migrations, pages, pulses, reads, runs, schema, sqlite, transfer
from lbr.store.addresses import sqlite_path
from lbr.store.claim import CLAIM, CLAIM_CHOSEN, DUE, DUE_FRESH, DUE_SIZED, DUE_SUSPECT, DUE_TRIED, PROMPTS
from lbr.store.database import open_database
from lbr.store.leases import CLAIMED_BY, EXPIRED, RENEW
from lbr.store.settle import SETTLE, STATUS, settle
from lbr.store.sql import PreparedQuery
from lbr.store.sqlite import SQLiteDatabase
from tests.support import ECHO, Cli, Queue, answered, assert_counted, locked_by_another, put
from tests.support.hearing import Hearing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from lbr.core.types import Millis
    from lbr.store.database import Database

RUNS = "SELECT name FROM runs"


@pytest.fixture
def db_url(tmp_path: Path) -> str:
    """Return the URL of a file that does not exist yet: nothing here concerns another kind of database."""
    return f"sqlite+aiosqlite:///{tmp_path / 'queue.db'}"


async def test_a_database_that_is_closed_leaves_nothing_open(tmp_path: Path) -> None:
    """No thread and no file handle stays, even of a connection that was in a transaction just then."""
    path = tmp_path / "q.db"
    before = set(threading.enumerate())
    database = await open_database(str(path), create=True)
    begun = threading.Event()

    def slowly(_connection: Connection, _now: Millis) -> None:
        begun.set()
        time.sleep(0.1)

    for verb in (database.read, database.write):
        begun.clear()
        running = asyncio.create_task(verb(slowly))
        await asyncio.to_thread(begun.wait)
    await database.close()
    await running
    opened = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    assert not [name for name in opened if name.startswith(str(path))]
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("asyncio"):
            thread.join(10)
            assert not thread.is_alive(), thread


def test_a_program_that_ends_without_closing_does_not_hang(tmp_path: Path) -> None:
    """Whatever it has read and written with, its threads do not keep it."""
    program = (
        "import asyncio, sys\n"
        "from lbr.store import reads\n"
        "from lbr.store.database import open_database\n"
        "async def main():\n"
        "    database = await open_database(sys.argv[1], create=True)\n"
        "    for ask in (database.read, database.quick_read, database.write):\n"
        "        await ask(reads.all_runs)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "q.db")], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_file_is_private(tmp_path: Path) -> None:
    """Prompts are private: the database and what SQLite puts beside it can be read by their owner only."""
    database = await open_database(str(tmp_path / "q.db"), create=True)
    await put(database, ["secret"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("q.db*")}
    await database.close()
    assert {"q.db", "q.db-wal", "q.db-shm"} <= set(modes)
    assert set(modes.values()) == {0o600}


async def test_a_transaction_is_one_trip_to_its_thread(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its beginning to its commit the file is locked, so two threads must not take turns meanwhile."""
    trips: list[Any] = []
    submit = ThreadPoolExecutor.submit

    def trip(thread: ThreadPoolExecutor, function: Any, *args: Any) -> Any:
        trips.append(function)
        return submit(thread, function, *args)

    def names(connection: Connection, _now: Millis) -> list[str]:
        connection.execute(text("SELECT 1"))
        return list(connection.execute(text(RUNS)).scalars())

    monkeypatch.setattr(ThreadPoolExecutor, "submit", trip)
    for verb in (database.write, database.quick_read):
        trips.clear()
        assert await verb(names) == []
        assert len(trips) == 1


async def test_rows_that_are_left_unread_keep_no_snapshot(database: Database, tmp_path: Path) -> None:
    """A checkpoint has no reader to wait for when the transaction that asked for them has ended."""
    await put(database, [f"p{n}" for n in range(500)])
    for verb in (database.read, database.quick_read, database.write):
        assert await verb(lambda connection, _: connection.execute(select(schema.jobs)).first()) is not None
    with closing(sqlite3.connect(tmp_path / "queue.db", isolation_level=None, timeout=0)) as other:
        other.execute("DELETE FROM jobs")
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)


async def test_a_cancelled_transaction_leaves_no_lock_behind(tmp_path: Path) -> None:
    """Whenever a read or a write is cancelled, even by the end of its loop, its connection is as before."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    for n in range(300):
        verb = (database.read, database.write, database.quick_read)[n % 3]
        asking = asyncio.create_task(verb(reads.all_runs))
        for _ in range(n // 3 % 12):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await verb(reads.all_runs) == []
    await database.close()

    def in_a_loop_that_ends() -> Database:
        async def main() -> Database:
            database: Database = SQLiteDatabase(path)
            asyncio.create_task(database.write(reads.all_runs))  # noqa: RUF006
            await asyncio.sleep(0.1)
            return database

        return asyncio.run(main())

    other = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ending = asyncio.create_task(asyncio.to_thread(in_a_loop_that_ends))
    await asyncio.sleep(0.6)
    # The transaction waits for the lock that is ours: nobody may leave it behind, to take the lock later.
    assert not ending.done()
    other.execute("COMMIT")
    left = await ending
    other.execute("BEGIN IMMEDIATE")
    assert other.in_transaction
    other.execute("ROLLBACK")
    other.close()
    assert left.name == str(path)
    await left.close()


async def test_a_cancelled_caller_hears_of_it_when_all_has_ended(database: Database) -> None:
    """However often it is cancelled, its transaction is committed before it knows, and the next finds none open."""
    await put(database, ["a"])
    begun, go_on = threading.Event(), threading.Event()

    def rename(connection: Connection, _now: Millis) -> None:
        begun.set()
        go_on.wait(30)
        connection.execute(text("UPDATE runs SET name = 'other'"))

    writing = asyncio.create_task(database.write(rename))
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        writing.cancel()
        await asyncio.sleep(0)
        assert not writing.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert [run.name for run in await database.read(reads.all_runs)] == ["other"]
    await put(database, ["b"], name="next")


async def test_a_cancelled_write_is_not_tried_again(tmp_path: Path) -> None:
    """Where the file is locked, whoever is interrupted waits for the try that is under way, not for patience to end."""
    url = f"sqlite:///{tmp_path / 'q.db'}"
    database = await open_database(url, create=True, patience=600)
    async with locked_by_another(url):
        writing = asyncio.create_task(database.write(reads.all_runs))
        await asyncio.sleep(0.1)
        writing.cancel()
        async with asyncio.timeout(30):
            with pytest.raises(asyncio.CancelledError):
                await writing
    await database.close()


@pytest.mark.parametrize("failing", [["commit"], ["commit", "rollback"]])
async def test_a_commit_that_fails_leaves_no_transaction_open(
    failing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is free for others, and the next transaction does not have the work of the one that failed."""
    path = tmp_path / "q.db"
    broken: list[str] = []

    class Breaking(sqlite3.Connection):
        def commit(self) -> None:
            self._do("commit", super().commit)

        def rollback(self) -> None:
            self._do("rollback", super().rollback)

        def _do(self, name: str, function: Callable[[], None]) -> None:
            if name in broken:
                raise sqlite3.OperationalError("no room")
            function()

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Breaking))
        database = await open_database(str(path), create=True)
        await put(database, ["a"])
    broken += failing
    with pytest.raises(DatabaseError, match="no room"):
        await database.write(lambda c, _: c.execute(text("UPDATE runs SET name = 'never'")))
    broken.clear()
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT name FROM runs").fetchall() == [("r",)]
        other.execute("ROLLBACK")
    await database.write(lambda c, _: c.execute(text("UPDATE runs SET pause_message = 'next'")))
    found = await database.read(lambda c, _: c.execute(text("SELECT name, pause_message FROM runs")))
    assert [tuple(row) for row in found] == [("r", "next")]
    await database.close()


async def test_a_commit_that_sqlite_refuses_is_undone(tmp_path: Path) -> None:
    """The file is free, and the connection is fit for the next transaction."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    owner = "REFERENCES runs (id) DEFERRABLE INITIALLY DEFERRED"
    await database.write(lambda c, _: c.execute(text(f"CREATE TABLE notes (run_id INTEGER {owner})")))

    def orphan(connection: Connection, _now: Millis) -> None:
        connection.execute(text("INSERT INTO notes VALUES (7)"))

    assert isinstance(database, SQLiteDatabase)
    await database._in_thread(database._pragma, "foreign_keys = ON")
    with pytest.raises(DatabaseError, match="FOREIGN KEY"):
        await database.write(orphan)
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM notes").fetchall() == [(0,)]
        other.execute("ROLLBACK")
    run = await put(database, ["a"])
    await assert_counted(database, run)
    await database.close()


async def test_a_query_says_what_is_wrong_as_any_statement(database: Database) -> None:
    """It takes no statement whose text depends on its values, and its errors are those of the others."""
    growing = PreparedQuery(select(schema.jobs.c.id).where(schema.jobs.c.id.in_([1, 2])))
    with pytest.raises(TypeError, match="whose text never changes"):
        await database.quick_read(lambda connection, _: growing.all(connection, {}))
    gone = PreparedQuery(select(column("secret")).select_from(table("nowhere")))
    for verb in (database.read, database.quick_read, database.write):
        with pytest.raises(MisfitError, match="a value of another type than lbr writes"):
            await verb(lambda connection, _: PROMPTS.all(connection, {"ids": [b"x"]}))
        with pytest.raises(DatabaseError, match="its tables are not those that lbr makes") as told:
            await verb(lambda connection, _: gone.all(connection, {}))
        assert "secret" not in str(told.value)


class Undo(Exception):  # noqa: N818
    """Rolls a transaction back."""


async def plan(database: Database, statement: Any) -> str:
    """Run a statement, undo it, and return SQLite's plan of what was sent, one line per step."""
    bound = {"ids": [1, 2], "keys": [b"k"], "worker": 1, "until": 1, "now": 1, "run": 1, "most": 5, "before": 1}
    bound |= {"job": 1, "seq": 1, "to": "done", "available": 1, "charge": 1, "finished": 1}
    bound |= {"after": 3, "after_sample": 0, "limit": 5, "cap": 1_000, "runs": [1], "first": 1, "seen": 1}
    bound |= {"look": 50}
    sent: list[tuple[str, Any]] = []
    steps: list[str] = []
    hearing = Hearing(lambda sql, values: sent.append((sql, values)))

    def work(connection: Connection, _now: Millis) -> None:
        hearing.begin()
        try:
            if isinstance(statement, PreparedQuery):
                statement.all(connection, bound)
            else:
                names = statement.compile().params
                connection.execute(statement, {name: bound[name] for name in names if name in bound})
        finally:
            hearing.end()
        [(sql, values)] = sent
        found = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", tuple(values))
        steps.extend(row.detail for row in found)
        raise Undo

    with pytest.raises(Undo):
        await database.write(work)
    return "\n".join(steps)


async def test_plans_use_the_partial_indexes(database: Database) -> None:
    """No statement of the hot path scans the jobs table."""
    await put(database, [f"p{n}" for n in range(10)])
    for statement, index in (
        (DUE, "INDEX jobs_pending (run_id=? AND available_at<?)"),
        (DUE_SUSPECT, "INDEX jobs_suspects (run_id=? AND available_at<?)"),
        (CLAIM, "INDEX jobs_pending (run_id=? AND available_at<?)"),
        (DUE_FRESH, "INDEX jobs_pending (run_id=? AND available_at<?)"),
        (DUE_TRIED, "INDEX jobs_tried (run_id=? AND available_at<?)"),
        (DUE_SIZED, "INDEX jobs_pending (run_id=? AND available_at<?)"),
        (CLAIM_CHOSEN, "INTEGER PRIMARY KEY"),
        (EXPIRED, "INDEX jobs_lease (lease_until<?)"),
        (CLAIMED_BY, "INDEX jobs_lease (lease_until<?)"),
        (RENEW, "INTEGER PRIMARY KEY"),
        (SETTLE.each, "INTEGER PRIMARY KEY"),
        (STATUS, "INTEGER PRIMARY KEY"),
        (pulses._RETRYING, "INDEX jobs_tried (run_id=? AND available_at>? AND available_at<?)"),
        (pulses._ANSWERED, "SEARCH pulses USING PRIMARY KEY (run_id=? AND minute>?)"),
        (pulses._STRETCHES, "SEARCH pulses USING PRIMARY KEY (run_id=? AND minute>?)"),
        (pulses._STRETCHES, "SEARCH pulses_1 USING PRIMARY KEY (run_id=?)"),
        (pulses._OLD, "INDEX pulses_unfolded (minute<?)"),
        (PROMPTS, "INTEGER PRIMARY KEY"),
        (enqueue.BY_KEY, "INDEX prompts_key (key=? AND run_id=?)"),
        (enqueue._KEYS_OF_EQUALS, "INDEX prompts_key (key=?)"),
        (enqueue._DONE, "INTEGER PRIMARY KEY"),
        (reads._rows_of(Shape.ORIGINAL, ()), "items USING PRIMARY KEY (run_id=? AND (idx,sample)>(?,?))"),
        (reads._PLACES, "items USING PRIMARY KEY (run_id=? AND (idx,sample)>(?,?))"),
        (transfer._ITEMS, "items USING PRIMARY KEY (run_id=? AND (idx,sample)>(?,?))"),
        (pages.LOOKS["failed"], "INDEX jobs_failed (run_id=? AND id>?)"),
        (pages.LOOKS["pending"], "INDEX jobs_pending (run_id=? AND available_at>?)"),
        (pages.LOOKS[""], "INTEGER PRIMARY KEY (rowid>?)"),
        (pages.SHORT, "INTEGER PRIMARY KEY"),
        (pages.FAILURES, "INDEX jobs_failed (run_id=?)"),
        (pages.SPARKS, "SEARCH pulses USING PRIMARY KEY (run_id=? AND minute>?)"),
    ):
        steps = await plan(database, statement)
        assert index in steps, steps
        assert "SCAN jobs" not in steps, steps
        assert "SCAN prompts" not in steps, steps
        assert "TEMP B-TREE FOR ORDER" not in steps, steps


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / /data rw - nfs4 server:/x rw", "nfs4"),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / /other rw - nfs4 server:/x rw", "ext4"),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / /da rw - nfs4 server:/x rw", "ext4"),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / /data rw shared:1 - cifs //s/x rw", "cifs"),
        ("30 22 0:40 / /data rw - nfs4 server:/x rw\n31 30 8:2 / /data rw - ext4 /dev/sdb rw", "ext4"),
        ("nonsense\n", None),
    ],
)
def test_file_system_is_read_from_the_mounts(mounts: str, kind: str | None) -> None:
    """The longest mount point above a path names its file system; of two at one place the later."""
    assert files.file_system_of(Path("/data/runs.db"), mounts) == kind


def test_mount_points_are_read_with_what_is_escaped_in_them() -> None:
    """A folder with a space, a tab or a backslash in its name is found among the mounts."""
    mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / /a\\040b\\011c\\134d rw - nfs4 server:/x rw\n"
    assert files.file_system_of(Path("/a b\tc\\d/runs.db"), mounts) == "nfs4"


def test_a_mount_that_hides_another_is_what_counts() -> None:
    """A network mount under a later mount of a folder above it is out of sight: the device tells."""
    mounts = "30 22 0:40 / /data/x rw - nfs4 server:/x rw\n31 22 8:2 / /data rw - ext4 /dev/sdb rw\n"
    assert files.file_system_of(Path("/data/x/runs.db"), mounts, "8:2") == "ext4"
    assert files.file_system_of(Path("/data/x/runs.db"), mounts, "0:40") == "nfs4"


NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "ceph",
    "lustre",
    "glusterfs",
    "beegfs",
    "gpfs",
    "davfs",
)
NETWORK_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse")
LOCAL = (
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "tmpfs",
    "overlay",
    "fuseblk",
    "fuse.mergerfs",
    "fuse.gocryptfs",
    "fuse",
)


@pytest.mark.parametrize("kind", [*NETWORK, *NETWORK_FUSE, *LOCAL, "what-nobody-knows"])
def test_what_is_not_known_to_be_a_network_is_not_refused(kind: str) -> None:
    """File systems on other machines are known by their names; whatever else there is may be local."""
    assert files.is_network(kind) == (kind in NETWORK + NETWORK_FUSE)


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that the system calls a mount of NFS."""
    share = tmp_path / "the share"
    share.mkdir()
    mounts = tmp_path / "mounts"
    escaped = str(share).replace(" ", "\\040")
    mounts.write_text(f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 22 0:1 / {escaped} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr(files, "MOUNTS", mounts)
    # What is really there is another device, whose number must not count here.
    monkeypatch.setattr(files, "device_of", lambda _: "")
    return share


async def test_network_file_system_is_refused(tmp_path: Path, mounted: Path) -> None:
    """A queue on NFS is refused with the ways out, and allowed to those who insist."""
    url = str(mounted / "q.db")
    words = r"network file system \(nfs4\).*local disk.*PostgreSQL.*--allow-network-fs"
    with pytest.raises(UsageError, match=words):
        await open_database(url, create=True)
    assert list(mounted.iterdir()) == []
    await (await open_database(url, create=True, allow_network_fs=True)).close()
    with pytest.raises(UsageError, match=words):
        await open_database(url)
    await (await open_database(str(tmp_path / "q.db"), create=True)).close()


@pytest.mark.parametrize("link", ["file", "folder", "dangling"])
async def test_links_to_a_network_file_system_are_followed(tmp_path: Path, mounted: Path, link: str) -> None:
    """A link to a file or folder on a network file system does not hide it, nor one to a file that is to come."""
    if link == "folder":
        (tmp_path / "here").symlink_to(mounted)
        url = tmp_path / "here" / "q.db"
    else:
        url = tmp_path / "q.db"
        url.symlink_to(mounted / "real.db")
    if link == "file":
        (mounted / "real.db").touch(mode=0o600)
    with pytest.raises(UsageError, match="network file system"):
        await open_database(str(url), create=True)


@pytest.mark.parametrize("mounts", ["missing", "unreadable", "nonsense"])
async def test_a_system_that_does_not_tell_its_mounts_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str
) -> None:
    """Where there is no /proc, as on macOS, or it cannot be read, nothing is refused."""
    path = tmp_path / "mounts"
    if mounts == "unreadable":
        path.mkdir()
    elif mounts == "nonsense":
        path.write_bytes(b"\xff - \x00 nonsense\n")
    monkeypatch.setattr(files, "MOUNTS", path)
    assert files.file_system(tmp_path / "q.db") is None
    await (await open_database(str(tmp_path / "q.db"), create=True)).close()


async def test_link_to_a_file_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a link the WAL is beside the file itself: it is found there, and checkpoints are taken."""
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 100_000)
    (tmp_path / "far").mkdir()
    link, real = tmp_path / "q.db", tmp_path / "far" / "real.db"
    link.symlink_to(real)
    database = await open_database(str(link), create=True)
    for n in range(5):
        await put(database, [f"prompt {n} {m} " + "x" * 300 for m in range(300)], name=f"r{n}")
    wal, moved = Path(f"{real}-wal").stat().st_size, real.stat().st_size
    await database.close()
    assert wal < 300_000
    assert moved > 400_000
    assert [path.name for path in tmp_path.glob("q.db*")] == ["q.db"]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("runs.db", "runs.db"),
        ("sqlite:///runs.db", "runs.db"),
        ("sqlite+aiosqlite:///runs.db", "runs.db"),
        ("sqlite+aiosqlite:////tmp/a b.db", "/tmp/a b.db"),
    ],
)
def test_paths_and_urls_name_files(url: str, path: str) -> None:
    """A path and the URLs that people paste name the same file."""
    assert sqlite_path(url) == Path(path).absolute()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@host/db", "nearly a PostgreSQL URL"),
        ("postgres//me:secret@host/db", "nearly a PostgreSQL URL"),
        ("mysql+pymysql://me:secret@host/db", r"a mysql\+pymysql URL"),
        ("sqlite://", "to name a file"),
        (":memory:", "to name a file"),
        ("sqlite:///x.db?mode=ro", "the options mode"),
        ("", "to name a file"),
    ],
)
def test_other_urls_are_refused_without_their_password(url: str, words: str) -> None:
    """What cannot be a shared queue is refused, and a password in it is not repeated."""
    with pytest.raises(UsageError, match=words) as caught:
        sqlite_path(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("query", "level"), [("", 2), ("?synchronous=FULL", 2), ("?synchronous=NORMAL", 1)])
async def test_durability_is_full_unless_the_url_says_otherwise(tmp_path: Path, query: str, level: int) -> None:
    """Every commit reaches the disk by default; a URL may ask for less."""
    database = await open_database(f"sqlite:///{tmp_path / 'q.db'}{query}", create=True)
    assert await database.write(lambda c, _: c.exec_driver_sql("PRAGMA synchronous").scalar()) == level
    await database.close()


async def test_newer_schema_is_refused(tmp_path: Path) -> None:
    """A database of a newer lbr is left as it is, with advice to upgrade."""
    path = tmp_path / "q.db"
    await (await open_database(str(path), create=True)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, 'future', 0)")
    connection.close()
    with pytest.raises(DatabaseError, match=rf"schema version {migrations.LATEST} or older, got: 99.*a newer lbr"):
        await open_database(str(path), create=True)


async def test_interrupted_creation_is_completed(tmp_path: Path) -> None:
    """A file that a creator left empty when it was killed becomes a database on the next enqueue."""
    path = tmp_path / "q.db"
    path.touch(mode=0o600)
    with pytest.raises(UsageError, match="there is no lbr queue in"):
        await open_database(str(path))
    database = await open_database(str(path), create=True)
    await put(database, ["a"])
    await database.close()


async def test_many_processes_may_create_at_once(tmp_path: Path) -> None:
    """Processes that all want to create the database end up with one, whole."""
    cli, words = Cli(tmp_path), ("enqueue", "-", "--model", "offline:echo", "--run")
    await asyncio.gather(*(asyncio.to_thread(cli, *words, f"r{n}", stdin="a\n") for n in range(5)))
    database = await open_database(str(tmp_path / "runs.db"))
    version = await database.read(lambda c, _: c.execute(text("SELECT count(*) FROM schema_version")))
    assert version.scalar() == migrations.LATEST
    assert {run.name for run in await database.read(reads.all_runs)} == {f"r{n}" for n in range(5)}
    await database.close()


@pytest.mark.slow
async def test_foreign_lock_is_ridden_out(tmp_path: Path) -> None:
    """Another program that holds the write lock for longer than the busy timeout delays us, and no more."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    program = (
        "import sqlite3, sys, time\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True)\n"
        "time.sleep(10); c.execute('ROLLBACK')\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    run = await put(database, ["a"])
    await assert_counted(database, run)
    assert holder.wait() == 0
    holder.stdout.close()
    await database.close()


async def test_endless_foreign_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that stays locked ends in words with the way out, after a bounded time."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 50)
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await database.close()
    database = SQLiteDatabase(path, patience=0.5)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseBusyError, match="has kept .* locked for too long.*fuser"):
        await put(database, ["a"])
    blocker.execute("ROLLBACK")
    blocker.close()
    await put(database, ["a"])
    await database.close()


async def test_wal_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of our own keep the WAL near its limit under a load with readers."""
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 1_000_000)
    database = await open_database(str(tmp_path / "q.db"), create=True)
    run = await database.write(runs.open_run, runs.RunSpec("r", ECHO, 8))
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=100)
    maker, largest = KeyMaker(ECHO), 0
    for start in range(0, 10_000, 1_000):
        items = [Item(Prompt(text=f"prompt {n} " + "x" * 300)) for n in range(start, start + 1_000)]
        keys = [maker.key(item.prompt) for item in items]
        reading = asyncio.create_task(queue.check_due([run.id]))
        await database.write(enqueue.add_chunk, run, start, items, keys, reuse=True)
        claims = await queue.claim(worker, [run.id], 1_000, lease=60)
        await database.write(settle, [answered(claim, "y" * 300) for claim in claims])
        await reading
        largest = max(largest, (tmp_path / "q.db-wal").stat().st_size)
    moved = (tmp_path / "q.db").stat().st_size
    await database.close()
    assert largest < 2_000_000
    assert moved > 5_000_000


async def test_checkpoint_gives_way_to_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that stays in its transaction delays the checkpoint, not the writers."""
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 10_000)
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM jobs").fetchone()
    run = await put(database, [f"p{n}" for n in range(500)])
    reader.close()
    await assert_counted(database, run)
    await database.close()


async def read_slowly(database: Database, reading: asyncio.Event) -> None:
    """Set `reading` within a read-only transaction that then takes a while longer."""

    def work(connection: Connection, _now: Millis) -> None:
        connection.execute(text(RUNS)).all()
        reading.set()
        counted = (
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 30000) SELECT count(*) FROM c"
        )
        connection.execute(text(counted)).all()

    await database.read(work)


async def fill_wal(database: Database, path: Path) -> int:
    """Write over a megabyte, and return the size that the log has then."""
    for n in range(5):
        await put(database, [f"prompt {n} {m} " + "x" * 300 for m in range(300)], name=f"more {n}")
    return Path(f"{path}-wal").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in their transaction", "anywhere"])
async def test_cancelled_reads_keep_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Reads, more at a time than there are connections, that are cancelled at any moment hold no checkpoint up later."""
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 100_000)
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAUSE_SECONDS", 0.0)
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await put(database, ["a"])
    for n in range(20):
        reading = asyncio.Event()
        slow = [asyncio.create_task(read_slowly(database, reading)) for _ in range(8)]
        if moment == "anywhere":
            for _ in range(n):
                await asyncio.sleep(0)
        else:
            await reading.wait()
        for one in slow:
            one.cancel()
        ended = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(one) for one in ended} == {asyncio.CancelledError}
    assert await fill_wal(database, path) < 300_000
    await database.close()


async def test_a_cancelled_collect_keeps_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a run that are read when a program cancels it do not hold up the checkpoints of what it does next."""
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 100_000)
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAUSE_SECONDS", 0.0)
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await put(database, [f"prompt {n}" for n in range(3_000)])
    for n in range(40):
        collecting = asyncio.create_task(lbr.collect("r", out=tmp_path / "out.jsonl", db_url=path))
        await asyncio.sleep(n / 1_000)
        collecting.cancel()
        [ended] = await asyncio.gather(collecting, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError | lbr.Collected)
    assert await fill_wal(database, path) < 300_000
    await database.close()


async def test_a_checkpoint_lock_that_may_not_be_opened_fails_no_commit(
    mortal_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lock is another user's, workers and enqueues go on without checkpoints; the next who may takes one."""
    monkeypatch.chdir(mortal_folder)
    monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(sqlite, "CHECKPOINT_PAUSE_SECONDS", 0.0)
    lock, wal = Path("q.db.checkpoint.lock"), Path("q.db-wal")

    async def long(prompt: str) -> str:
        return prompt + "x" * 5_000

    await lbr.enqueue(["a"], run="r", function=long, db_url="q.db")
    lock.unlink(missing_ok=True)
    lock.touch(0o000)
    await lbr.enqueue([f"p{n}" for n in range(50)], run="r", function=long, append=True, db_url="q.db")
    database = await open_database("q.db")
    report = await lbr.work(functions=[long], db_url="q.db")
    assert (report.done, report.released) == (51, 0)
    assert wal.stat().st_size > 100_000
    lock.chmod(0o600)
    await put(database, ["b"], name="more")
    assert wal.stat().st_size < 100_000
    await database.close()


async def test_an_exclusive_lock_that_may_not_be_opened_is_told(mortal_folder: Path) -> None:
    """A lock of another user is an error with the file and the way out."""
    path = mortal_folder / "q.db"
    await (await open_database(str(path), create=True)).close()
    path.with_name("q.db.worker.lock").touch(0o000)
    with pytest.raises(DatabaseError, match=r"expected a lock .*q\.db\.worker\.lock, got: Permission denied; make"):
        async with sqlite.sole_worker(str(path)):
            pass


async def test_writes_are_refused_on_a_reading_connection(database: Database) -> None:
    """Nothing that reads can change the queue by mistake."""
    with pytest.raises(DatabaseError, match="read-only"):
        await database.read(lambda c, _: c.execute(text("DELETE FROM jobs")))


async def test_unused_database_is_removed(tmp_path: Path) -> None:
    """Teardown removes the file and what lies beside it, but not while anybody has it open."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await put(database, ["a"])
    await database.close()
    program = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM jobs').fetchone()\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    assert await files.remove_unused(path, run="r", query=RUNS) is False
    holder.communicate()
    database = await open_database(str(path))
    await assert_counted(database, await put(database, ["a"]))
    await database.close()
    assert await files.remove_unused(path, run="other", query=RUNS) is False
    assert await files.remove_unused(path, run="r", query=RUNS) is True
    assert list(tmp_path.glob("q.db*")) == []


async def test_a_log_that_goes_away_is_noticed(tmp_path: Path) -> None:
    """What is written to a log that was removed nobody else can read: the first commit to it fails."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await put(database, ["a"])
    Path(f"{path}-wal").unlink()
    with pytest.raises(DatabaseError, match=r"the log .* was removed while in use"):
        await put(database, ["b"])
    Path(f"{path}-wal").touch()
    with pytest.raises(DatabaseError, match=r"the log .* was replaced while in use"):
        await put(database, ["b"])
    await database.close()


async def test_file_that_goes_away_is_noticed(tmp_path: Path) -> None:
    """Nothing is written to a file that was removed or replaced while it was open: it would be lost."""
    path = tmp_path / "q.db"
    database = await open_database(str(path), create=True)
    await put(database, ["a"])
    path.unlink()
    with pytest.raises(DatabaseError, match="was removed while in use"):
        await put(database, ["a"])
    path.touch()
    with pytest.raises(DatabaseError, match="was replaced while in use"):
        await put(database, ["a"])
    await database.close()


async def test_a_file_with_a_second_hard_link_is_refused(tmp_path: Path) -> None:
    """By each name a process would have a WAL of its own; with the other name gone the file is opened again."""
    path = tmp_path / "q.db"
    await (await open_database(str(path), create=True)).close()
    (tmp_path / "backup.db").hardlink_to(path)
    for url in (path, tmp_path / "backup.db"):
        with pytest.raises(UsageError, match=r"to have one name, got: 2 hard links.*as a copy \(`cp`\)"):
            await open_database(str(url), create=True)
    found = {one.check: one for one in await lbr.doctor(db_url=str(path))}
    assert any("2 hard links" in one.found for one in found.values())
    (tmp_path / "backup.db").unlink()
    await (await open_database(str(path))).close()


@pytest.mark.parametrize(
    ("points", "mounted"),
    [
        (["/", "/data/q.db"], True),
        (["/", "/data", "/data/q.db"], True),
        (["/", "/data/q.db", "/data"], False),
        (["/", "/data/q.db", "/data/other"], True),
        (["/", "/data"], False),
        (["/", "/data/q.db-wal"], False),
        ([], False),
    ],
)
def test_a_mount_point_is_the_path_itself(points: list[str], mounted: bool) -> None:
    """A folder that is mounted is none, nor what a later mount hides."""
    mounts = "".join(f"30 1 0:40 / {point} rw - ext4 /dev/sda rw\n" for point in points)
    assert files.is_mount_point(Path("/data/q.db"), mounts) is mounted


def test_a_mount_point_with_white_space_is_read() -> None:
    """Its name has octal escapes, as in proc(5)."""
    assert files.is_mount_point(Path("/my data/q\\.db"), "30 1 0:40 / /my\\040data/q\\134.db rw - ext4 x rw\n")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_file_that_is_bind_mounted_is_refused(tmp_path: Path) -> None:
    """`docker run -v ./q.db:/data/q.db` shares the file without its WAL; the folder is what must be mounted."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "q.db").touch()
    (tmp_path / "in.txt").write_text("a\n")
    lbr_ = f"{sys.executable} -m lbr"
    script = f"""
        {lbr_} --db q.db enqueue in.txt --model offline:echo &&
        mount --bind q.db data/q.db && ! {lbr_} --db data/q.db worker && umount data/q.db &&
        mount --bind . data && {lbr_} --db data/q.db worker
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "got: a mount of its own" in done.stderr
    assert "mount the folder that it is in" in done.stderr
    assert "worker: 1 done" in done.stderr


async def test_free_space_is_given_back(tmp_path: Path) -> None:
    """The file of a removed run shrinks, in several transactions; what other runs hold stays, and the file is sound."""
    path = tmp_path / "queue.db"
    opened = await open_database(path, create=True)
    await put(opened, [f"{n} " * 2_000 for n in range(900)], name="large")
    kept = await put(opened, ["a", "b"], name="small")
    await opened.close()
    before = path.stat().st_size
    await lbr.remove("large", db_url=path)
    after = path.stat().st_size
    assert before > 5_000_000
    assert after < before / 10
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA freelist_count").fetchall() == [(0,)]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM jobs WHERE run_id = ?", [kept.id]).fetchall() == [(2,)]


async def test_a_file_of_an_older_version_keeps_its_free_space(tmp_path: Path) -> None:
    """Until VACUUM has changed it, as the documentation says."""
    path = tmp_path / "queue.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1")  # writes the first page, and so settles it
        connection.commit()
    opened = await open_database(path, create=True)
    await put(opened, [f"{n} " * 1_000 for n in range(300)])
    await opened.close()
    await lbr.remove("r", db_url=path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA freelist_count").fetchone()[0] > 100
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")
        assert connection.execute("PRAGMA freelist_count").fetchone() == (0,)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


async def test_an_interrupted_backup_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends between two steps without a traceback, the queue goes on, and the same backup can be made again."""
    path, copy = tmp_path / "queue.db", tmp_path / "copy.db"
    opened = await open_database(path, create=True)
    await put(opened, [f"{n} " * 500 for n in range(300)])
    begun, cancelled, new_private = threading.Event(), threading.Event(), files.new_private

    @contextmanager
    def waits(target: Path) -> Iterator[tuple[Path, int]]:
        with new_private(target) as made:
            begun.set()
            assert cancelled.wait(60)
            yield made

    monkeypatch.setattr(files, "new_private", waits)
    copying = asyncio.ensure_future(lbr.backup(copy, db_url=path))
    await asyncio.to_thread(begun.wait, 60)
    copying.cancel()
    await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await copying
    del copying
    gc.collect()
    assert caplog.text == ""
    assert not list(tmp_path.glob("*copy.db*"))
    await opened.close()
    await lbr.backup(copy, db_url=path)
    assert (await lbr.status(db_url=copy)).runs[0].jobs == 300


async def test_a_backup_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A file that a living process writes, and those of backups with other names, stay."""
    path, copy = tmp_path / "queue.db", tmp_path / "c[1].db"
    await (await open_database(path, create=True)).close()
    program = (
        "import os, sys; from pathlib import Path; from lbr.store.files import new_private\n"
        "with new_private(Path(sys.argv[1])) as (_, file): os.write(file, b'half'); os.kill(os.getpid(), 9)"
    )
    for name in ("c[1].db", "c1.db"):
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.glob(".*.part"))) == 2
    with suppress(InterruptedError), files.new_private(copy) as (held, file):
        os.write(file, b"half")
        await lbr.backup(copy, db_url=path)
        (other,) = {*tmp_path.glob(".*.part")} - {held}
        assert other.name.startswith(".c1.db.")
        raise InterruptedError
    assert (await lbr.status(db_url=copy)).runs == []
