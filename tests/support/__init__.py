"""What tests share: a clock to move, a small driver of the store, and real `lbr` processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import asynccontextmanager, closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import func, make_url, select

from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import (
    Claim,
    Item,
    JobId,
    JobState,
    KeyMaker,
    Millis,
    Outcome,
    Prompt,
    Reply,
    Run,
    RunId,
    Settlement,
    Task,
    WorkerId,
)
from lbr.store import counters, enqueue, leases, runs
from lbr.store.claim import ClaimRequest, claim
from lbr.store.database import Database
from lbr.store.schema import jobs
from tests.support import forks, postgres

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence

    import pytest

    from lbr.core.extras import Extra
    from lbr.core.limits import CallBound
    from lbr.core.types import Failure

ROOT = Path(__file__).resolve().parents[2]
ECHO = Task(model="offline:echo")
PATIENCE_SECONDS = 60.0


class Clock:
    """Milliseconds that stand still until a test moves them."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> Millis:
        """Return the time."""
        return Millis(self.now)

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self.now += round(seconds * 1000)


def real_clock(shift_seconds: float = 0) -> Callable[[], Millis]:
    """Return this machine's clock, fast by so many seconds."""
    return lambda: Millis(time.time_ns() // 1_000_000 + round(shift_seconds * 1000))


async def put(
    database: Database,
    prompts: Sequence[str],
    *,
    name: str = "r",
    task: Task = ECHO,
    keep: tuple[Extra, ...] = (),
    reuse: bool = True,
    lane: str | None = None,
    warm_cache: bool = False,
) -> Run:
    """Enqueue prompts into a run and seal it."""
    spec = runs.RunSpec(name, task, 8, keep=keep, lane=lane, warm_cache=warm_cache)
    run = await database.write(runs.open_run, spec)
    items = [Item(Prompt(text=prompt)) for prompt in prompts]
    maker = KeyMaker(task)
    await database.write(enqueue.add_chunk, run, 0, items, [maker.key(i.prompt) for i in items], reuse=reuse)
    await database.write(runs.seal, run)
    return run


class Queue:
    """A queue as a worker's statements see it: each of its methods is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, *, host: str, pid: int, concurrency: int) -> WorkerId:
        """Add a worker."""
        return await leases.register(self._database, host=host, pid=pid, concurrency=concurrency)

    async def unregister(self, worker: WorkerId) -> None:
        """Remove a worker."""
        await leases.unregister(self._database, worker)

    def leave(self, worker: WorkerId) -> None:
        """Free the worker's lock, as its end would."""
        self._database.presence.leave(worker)

    async def claim(
        self,
        worker: WorkerId,
        run_ids: Sequence[RunId],
        most: int,
        *,
        lease: float,
        suspects: bool = False,
        extra: dict[RunId, int] | None = None,
        bounds: dict[RunId, CallBound] | None = None,
    ) -> list[Claim]:
        """Claim due jobs."""
        request = ClaimRequest(worker, run_ids, most, lease, suspects, extra or {}, bounds or {})
        return await self._database.write(claim, request)

    async def check_due(self, run_ids: Sequence[RunId], *, worker: WorkerId = leases.NO_WORKER) -> leases.DueWork:
        """Look whether a claim would find anything."""
        return await self._database.quick_read(leases.check_due, self._database.presence, run_ids, worker)

    async def bring_forward(self, run_ids: Sequence[RunId]) -> None:
        """Make stranded jobs due."""
        await self._database.write(leases.bring_forward, run_ids)

    async def renew(
        self, worker: WorkerId, claims: Iterable[Claim], *, lease: float, settled: int, rate: float
    ) -> set[JobId]:
        """Extend leases and return the jobs that were lost."""
        held, seen = list(claims), time.monotonic()
        _, lost = await self._database.write(
            leases.renew, worker, held, lease=lease, settled=settled, rate=rate, seen=seen
        )
        return lost

    async def release(self, worker: WorkerId, claims: Iterable[Claim], *, unused: bool = False) -> int:
        """Give claims back."""
        return await self._database.write(leases.release, worker, list(claims), unused=unused)

    async def reclaim(self, dead: Collection[WorkerId] = ()) -> list[leases.Reclaimed]:
        """Take back jobs."""
        return await leases.reclaim(self._database, dead)


def meanwhile(
    monkeypatch: pytest.MonkeyPatch,
    statement: Callable[..., Any],
    before: Callable[[], Awaitable[object]] | None = None,
    after: Callable[[Any], Awaitable[object]] | None = None,
) -> None:
    """Have something happen before each transaction of this statement, or after it, with what it returned."""
    write = Database.write

    async def watched(database: Database, work: Any, *args: Any, **options: Any) -> Any:
        if work is statement and before is not None:
            await before()
        found = await write(database, work, *args, **options)
        if work is statement and after is not None:
            await after(found)
        return found

    monkeypatch.setattr(Database, "write", watched)


def answered(claim: Claim, text: str = "answer") -> Settlement:
    """Return the settlement of a call that succeeded."""
    return decide(claim, Outcome(Reply(text), None, 5), RetryPolicy(), Random(1))


def failed(claim: Claim, failure: Failure, policy: RetryPolicy | None = None) -> Settlement:
    """Return the settlement of a call that failed."""
    return decide(claim, Outcome(None, failure, 5), policy or RetryPolicy(), Random(1))


async def states(database: Database, run: Run) -> dict[str, int]:
    """Count a run's jobs by state, from the rows themselves."""
    query = select(jobs.c.state, func.count()).where(jobs.c.run_id == run.id).group_by(jobs.c.state)
    found = await database.read(lambda connection, _: connection.execute(query))
    return dict(found.all())


async def assert_counted(database: Database, run: Run) -> None:
    """Check that the counters say what a recount of the rows says."""
    assert await database.read(counters.recount) == []
    kept = await database.read(lambda connection, _: counters.of_runs(connection, [RunId(run.id)]))
    by_state = {str(s): n for s in JobState if (n := kept[run.id][s])}
    assert by_state == await states(database, run)


async def job_row(database: Database, job_id: int) -> Any:
    """Return a job's row."""
    query = select(jobs).where(jobs.c.id == job_id)
    return (await database.read(lambda connection, _: connection.execute(query))).one()


async def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; fail loudly when it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.02)
    return value


def is_postgresql(db_url: str) -> bool:
    """Tell whether a URL is one of PostgreSQL."""
    return make_url(db_url).get_backend_name() == "postgresql"


@asynccontextmanager
async def locked_by_another(db_url: str) -> AsyncIterator[None]:
    """Let another program keep everybody from writing jobs for the length of the block."""

    def lock() -> sqlite3.Connection | psycopg.Connection:
        if is_postgresql(db_url):
            other = postgres.connect(db_url, autocommit=False)
            other.execute("LOCK TABLE lbr.jobs IN ACCESS EXCLUSIVE MODE")
            return other
        file = sqlite3.connect(str(make_url(db_url).database), isolation_level=None, check_same_thread=False)
        file.execute("BEGIN IMMEDIATE")
        return file

    # In a thread: it may wait for a transaction of ours, which this loop has to finish.
    holder = await asyncio.to_thread(lock)
    try:
        yield
    finally:
        holder.rollback()
        holder.close()


class Cli:
    """Runs `lbr` commands as processes of their own in one folder, with the queue `runs.db` there or at a URL.

    What is started is `python -m lbr`; what is run to its end is a fork that saves the imports, where that is the same.
    `prefix` is what stands before each command, such as what it is to run under.
    """

    def __init__(
        self, folder: Path, *, db_url: str | None = None, prefix: Sequence[str] = (), **environment: str
    ) -> None:
        self.folder = folder
        self._prefix = prefix
        self.outside_url = db_url or f"sqlite:///{folder / 'runs.db'}"
        """Where `query` asks: the same queue, perhaps by another way than the commands take."""
        self._server: psycopg.Connection | None = None
        secret = ("KEY", "MODEL", "LBR_", "OPENAI", "OPENROUTER")
        clean = {name: value for name, value in os.environ.items() if not any(s in name for s in secret)}
        self.constants: dict[str, float] = {}
        """What forks have in the place of constants of lbr, as `lbr.store.health.PATIENCE`: how long they wait."""
        self.environment = clean | ({"LBR_DB": db_url} if db_url else {}) | environment
        self.started: list[subprocess.Popen[str]] = []

    def __call__(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; with `check`, it must end with 0."""
        done = self._run(arguments, stdin)
        assert "Traceback" not in done.stderr, done.stderr
        if check:
            assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a program as a script of the folder to its end, which must be 0."""
        script = self.folder / "program.py"
        script.write_text(textwrap.dedent(program))
        done = self._run((), None, str(script))
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return done

    def _run(
        self, arguments: Sequence[str], stdin: str | None, script: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        timeout = PATIENCE_SECONDS * 2
        if not self._prefix and forks.can_run(self.environment):
            given = (stdin or "").encode()
            done = forks.run(
                arguments,
                script=script,
                cwd=self.folder,
                env=self.environment,
                constants=self.constants,
                stdin=given,
                timeout=timeout,
            )
            out, error = ("\n".join(re.split("\r\n?", raw.decode())) for raw in (done.stdout, done.stderr))
            return subprocess.CompletedProcess(done.args, done.returncode, out, error)
        return subprocess.run(
            [*self._prefix, sys.executable, script] if script else self._command(arguments),
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command and let it run."""
        process = subprocess.Popen(
            self._command(arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [*self._prefix, sys.executable, "-m", "lbr", *arguments]

    def status(self, run: str) -> Counter[str]:
        """Return a run's numbers; all 0 while there is no such run yet."""
        done = self("status", run, "--json", check=False)
        if done.returncode:
            return Counter()
        numbers = json.loads(done.stdout)["runs"][0]
        return Counter({name: value for name, value in numbers.items() if isinstance(value, int)})

    def wait_for(self, run: str, name: str, least: int) -> None:
        """Wait until one of a run's numbers is large enough.

        It looks into the database itself: starting a command takes so long that the moment would be gone.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._look(run, name)) < least:
            assert time.monotonic() < deadline, f"{name} never reached {least}: {now}"
            time.sleep(0.005)

    def wait_for_file(self, name: str) -> None:
        """Wait until a file in the folder holds something: what a function has come to is not in the database."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.folder / name).exists() or not (self.folder / name).stat().st_size:
            assert time.monotonic() < deadline, f"{name} was never written"
            time.sleep(0.005)

    def _look(self, run: str, name: str) -> int:
        mine = "run_id = (SELECT id FROM runs WHERE name = ?)"
        try:
            if name == "inputs":
                found = self.query(f"SELECT max(idx) + 1 FROM items WHERE {mine}", run)
            else:
                found = self.query(f"SELECT sum(value) FROM counters WHERE {mine} AND name = ?", run, name)
        except (sqlite3.OperationalError, psycopg.Error):  # the tables are being made, or the server is away
            return 0
        return int(found[0][0] or 0)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the queue's database as an outsider; values stand for `?`.

        Raises sqlite3.OperationalError or psycopg.Error, also where there is no database yet.
        """
        if not is_postgresql(self.outside_url):
            path = Path(str(make_url(self.outside_url).database))
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                return connection.execute(sql, values).fetchall()
        own = sql.replace("%", "%%").replace("?", "%s")
        for again in (True, False):
            if self._server is None or self._server.closed:
                self._server = postgres.connect(self.outside_url, options="-c search_path=lbr")
            try:
                return self._server.execute(own, values).fetchall()
            except psycopg.OperationalError:  # the server has been restarted since
                if not again or not self._server.closed:
                    raise
        raise AssertionError

    def collect(self, run: str, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """Return a run's collected rows."""
        done = self("collect", run, *arguments, check=False)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def stop_all(self) -> None:
        """Kill what a test left running."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        if self._server is not None:
            self._server.close()
