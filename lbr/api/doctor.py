"""`lbr.doctor`: what is wrong with a queue, how grave it is, and what to do."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lbr.api.arguments import checked
from lbr.api.status import way_on
from lbr.core.config import DB_URL_DEFAULT, load_environment
from lbr.core.errors import DatabaseError, LbrError, UsageError
from lbr.core.text import duration, pluralize
from lbr.core.types import PauseCause, Paused, Report, RunState
from lbr.models.base import Kind, kind_of
from lbr.models.build import Authority, build_model
from lbr.store import batches, counters, files, health, migrations, reads
from lbr.store.database import file_of, local_clock, opened
from lbr.worker import kept_answers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from lbr.core.batches import BatchRow
    from lbr.core.types import Millis, PathOrUrl, Run
    from lbr.store.counters import Drift
    from lbr.store.database import Database
    from lbr.store.health import ServerFacts
    from lbr.store.reads import Overview, RunCounts

T = TypeVar("T")

MIB = 1024 * 1024
MAX_WAL_BYTES = 128 * MIB
MIN_FREE_BYTES = 100 * MIB
MIN_SERVER = 14
CLOCK_NOTE_MS, CLOCK_WARNING_MS = 2_000, 60_000
LONG_EXPIRED_MS = 60_000
LIVE_ENQUEUE_MS = 60_000
MAX_DRIFTS = 10
SERVER_RISKS = {
    "synchronous_commit": "a crash of the server can lose the latest answers",
    "fsync": "a crash of the server can damage the database",
    "full_page_writes": "a crash of the server can damage the database",
    "autovacuum": "claims become slower and slower",
    "idle_in_transaction_session_timeout": "behind a pooler, a worker that is cut off may keep its locks for hours",
}


class Gravity(StrEnum):
    """How grave a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


OK, NOTE, WARNING, ERROR = Gravity


@dataclass(frozen=True, slots=True)
class Finding(Report):
    """The result of one check: `found` is what is there, `do` what to do, None for nothing."""

    check: str
    gravity: Gravity
    found: str
    do: str | None = None

    @property
    def is_grave(self) -> bool:
        """Whether you should do something."""
        return self.gravity in {WARNING, ERROR}


@checked
async def doctor(
    *, fix: bool = False, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> list[Finding]:
    """Return the findings about a queue: in use or not, damaged, of another version, or missing.

    Nothing is changed, unless `fix` is set: then counters that differ from a recount are fixed, while workers go on.
    Raises UsageError for what cannot be a database's path or URL.
    """
    load_environment(Path.cwd())
    return await examine(db_url, fix=fix, allow_network_fs=allow_network_fs)


@dataclass(slots=True)
class _Examination:
    """A queue and what could not be read of it; `path` is None if it is on a server."""

    url: PathOrUrl
    database: Database
    path: Path | None
    allow_network_fs: bool
    is_sound: bool = True
    problems: list[Finding] = field(default_factory=list)

    async def look(self, check: str, at: Awaitable[T]) -> T | None:
        """Return a fact, or None with a problem noted under `check`: a damaged part must not hide the others."""
        try:
            return await at
        except (LbrError, OSError) as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - a database may hold anything
            problem = f"the tables hold values that lbr never writes ({type(error).__name__}: {error})"
        found, do = f"cannot be read: {problem}", f"restore a copy of {self.database.name}"
        if check in {"database", "fix"}:
            before, _, after = problem.rpartition("; ")  # messages of `lbr.store` end with what to do
            found, do = (before, after) if before else (problem, do)
        self.problems.append(Finding(check, ERROR, found, do))
        return None


async def examine(
    url: PathOrUrl,
    *,
    fix: bool = False,
    quick: bool = False,
    allow_network_fs: bool = False,
    clock: Callable[[], Millis] | None = None,
) -> list[Finding]:
    """Do what `doctor` does; `clock` replaces the queue's. With `quick`, leave out what reads all of the queue."""
    queue = _Examination(url, health.open_unchanged(url, clock), file_of(url), allow_network_fs)
    database, path = queue.database, queue.path
    found: list[Finding | None] = []
    try:
        refused = path is not None and files.is_network(files.file_system(path)) and not allow_network_fs
        # Before the file is opened, because SQLite makes others beside it.
        outside = None if path is None else await queue.look("database", _file(path))
        version = await queue.look("database", _version(queue, refused=refused))
        if path is not None:
            found += [_sqlite(), _file_system(path, refused=refused)]
            if outside and (version is not None or refused):  # else it may be any program's
                found += outside
        if version is not None:
            found += [_schema(version), *await (_server(queue) if path is None else _integrity(queue, quick=quick))]
        if version == migrations.LATEST:
            found += await _tables(queue, fix=fix, quick=quick)
    finally:
        await database.close()
    return [*queue.problems, *(one for one in found if one is not None), *_kept(database)]


async def _version(queue: _Examination, *, refused: bool) -> int | None:
    if queue.path is not None:
        files.check_location(queue.path, create=False)
        files.check_file(queue.path)
    return None if refused else await queue.database.read(health.version, queue.database)


async def _tables(queue: _Examination, *, fix: bool, quick: bool) -> list[Finding | None]:
    """Return the findings about the tables of this version."""
    view = await queue.look("runs", queue.database.read(reads.overview))
    expired = await queue.look("leases", queue.database.read(health.expired))
    overdue = await queue.look("batches", queue.database.read(batches.overdue))
    drifts, fixed = None, None
    if not quick:
        drifts = await queue.look("counters", queue.database.read(counters.recount))
    if fix and drifts and (fixed := await queue.look("fix", _fix(queue))) is not None:
        drifts = await queue.look("counters", queue.database.read(counters.recount))
    found: list[Finding | None] = [_counters(drifts, fixed)]
    if view is None:
        return found
    runs = [one for one in view.runs if one.run.state is not RunState.CANCELLED]
    authority = Authority(openrouter_api_key=os.environ.get("OPENROUTER_API_KEY") or None)
    keys = [await _key(one.run, authority) for one in runs if not one.finished]
    return [
        _leases(view, *expired) if expired else None,
        *found,
        *_runs(runs, view.now),
        *keys,
        *_batches(overdue or []),
    ]


async def _fix(queue: _Examination) -> list[Drift]:
    if not queue.is_sound:
        raise DatabaseError("counters in a damaged file are not fixed; see to the damage first")
    async with opened(queue.url, allow_network_fs=queue.allow_network_fs) as database:
        return await database.write(counters.fix)


def has_wal_reset_bug(version: str) -> bool:
    """Return whether a version of SQLite can corrupt a database when two checkpoints follow each other closely."""
    numbers = tuple(int(part) for part in version.split(".")[:3])
    fixed = numbers >= (3, 51, 3) and numbers != (3, 52, 0)  # which was withdrawn
    return not (fixed or (3, 50, 7) <= numbers < (3, 51) or (3, 44, 6) <= numbers < (3, 45))


def _sqlite() -> Finding:
    version = sqlite3.sqlite_version
    if not has_wal_reset_bug(version):
        return Finding("sqlite", OK, f"SQLite {version}, without the WAL-reset bug")
    found = f"SQLite {version} has the WAL-reset bug; lbr takes its checkpoints in a way that avoids it"
    do = "let no other program write to the database while lbr does, or use a Python with SQLite 3.51.3 or newer"
    return Finding("sqlite", NOTE, found, do)


def _file_system(path: Path, *, refused: bool) -> Finding:
    kind = files.file_system(path)
    if not files.is_network(kind):
        return Finding("file system", OK, kind or "not reported by the system; assumed to be local")
    found = f"a network file system ({kind}), whose locks can fail and corrupt the database"
    if not refused:
        return Finding("file system", WARNING, found, files.NETWORK_WAYS)
    do = f"{files.NETWORK_WAYS}; --allow-network-fs examines it all the same"
    return Finding("file system", ERROR, f"{found}; the database was not opened", do)


async def _file(path: Path) -> list[Finding | None]:
    if not os.path.isfile(path):  # noqa: ASYNC240 - one stat
        return []
    return [_mode(path), _writable(path), _disk(path), _wal(path)]


def _mode(path: Path) -> Finding:
    there = [one for suffix in files.SUFFIXES if os.path.isfile(one := Path(f"{path}{suffix}"))]
    exposed = {one: mode for one in there if (mode := stat.S_IMODE(one.stat().st_mode)) & 0o077}
    if not exposed:
        return Finding("mode", OK, "only its owner can read it")
    modes = ", ".join(f"{one.name} {mode:04o}" for one, mode in exposed.items())
    found = f"others can read or write prompts and answers: {modes}"
    return Finding("mode", WARNING, found, f"chmod 600 {' '.join(map(str, exposed))}")


def _writable(path: Path) -> Finding | None:
    locks = [files.lock_path(path, purpose) for purpose in ("checkpoint", "create", "worker")]
    used = [path.parent, path, *(lock for lock in locks if lock.exists())]
    paths = " ".join(str(one) for one in used if not health.may_write(one))
    if not paths:
        return None
    found = f"you may not write {paths}: your workers cannot use the database, or leave its WAL to grow"
    do = f"make it writable with `chmod u+w`, or give it to the database's owner with `chown`: `ls -ld {paths}`"
    return Finding("writable", WARNING, found, do)


def _disk(path: Path) -> Finding:
    free_bytes = shutil.disk_usage(path.parent).free
    free = f"{free_bytes / MIB:,.0f} MiB are free"
    if free_bytes >= MIN_FREE_BYTES:
        return Finding("disk", OK, free)
    return Finding("disk", WARNING, f"{free}: workers stop when the disk is full", "make room for answers and the WAL")


def _wal(path: Path) -> Finding:
    wal = Path(f"{path}-wal")
    wal_bytes = wal.stat().st_size if wal.is_file() else 0
    size = f"the WAL has {wal_bytes / MIB:,.1f} MiB"
    if wal_bytes < MAX_WAL_BYTES:
        return Finding("wal", OK, size)
    do = f"start `lbr worker`, which takes one, unless a program stays in a transaction: `fuser {path}` finds it"
    return Finding("wal", WARNING, f"{size}: no checkpoint has finished for a while", do)


async def _server(queue: _Examination) -> list[Finding]:
    facts = await queue.look("server", queue.database.read(health.server_facts, local_clock()))
    return [] if facts is None else [_release(facts), _settings(facts), _server_clock(facts)]


def _release(server: ServerFacts) -> Finding:
    name = f"PostgreSQL {server.settings['server_version']}"
    if int(server.settings["server_version_num"]) < MIN_SERVER * 10_000:
        do = f"use a server of version {MIN_SERVER} or newer"
        return Finding("server", ERROR, f"{name}, which is older than {MIN_SERVER}", do)
    if server.settings["standby"] == "true":
        return Finding("server", ERROR, f"{name}, a standby: nothing can be written", "name the primary")
    return Finding("server", OK, name)


def _settings(server: ServerFacts) -> Finding:
    risky = [name for name in SERVER_RISKS if server.settings[name] in {"off", "0"}]
    if not risky:
        return Finding("settings", OK, "commits reach the server's disk, and autovacuum is on")
    found = "; ".join(f"{name} = {server.settings[name]}: {SERVER_RISKS[name]}" for name in risky)
    values = ", ".join(f"{name} = {'20s' if server.settings[name] == '0' else 'on'}" for name in risky)
    do = f"set {values}, for the server or the role (ALTER ROLE … SET …)"
    return Finding("settings", WARNING, found, do)


def _server_clock(server: ServerFacts) -> Finding:
    off = abs(server.clock_ms)
    if off < CLOCK_NOTE_MS:
        return Finding("machine's clock", OK, "agrees with the server's")
    way = "ahead of" if server.clock_ms > 0 else "behind"
    found = f"this machine's clock is {duration(off / 1000)} {way} the server's, which leases and waits go by"
    gravity = NOTE if off < CLOCK_WARNING_MS else WARNING
    return Finding("machine's clock", gravity, found, "set both by a time server")


def _schema(version: int) -> Finding:
    match version:
        case 0:
            return Finding("schema", WARNING, "no lbr queue here yet", "`lbr enqueue` creates it")
        case migrations.LATEST:
            return Finding("schema", OK, f"version {version}")
    if version > migrations.LATEST:
        found = f"version {version}, of a newer lbr; this one knows {migrations.LATEST}"
        return Finding("schema", ERROR, found, "use the lbr that wrote it")
    found = f"version {version}, of an older lbr; this one reads {migrations.LATEST}"
    do = "run any other command, for example `lbr status`: it upgrades the queue"
    return Finding("schema", NOTE, found, do)


async def _integrity(queue: _Examination, *, quick: bool) -> list[Finding]:
    if quick:
        return []
    damages = await queue.look("integrity", queue.database.read(health.damages))
    queue.is_sound = damages == []
    if not damages:
        return [] if damages is None else [Finding("integrity", OK, "SQLite finds no damage")]
    do = (
        f"stop all workers, keep a copy of all files, collect what you can; then restore a copy, or let "
        f"`sqlite3 {queue.path} .recover` make a new file"
    )
    return [Finding("integrity", ERROR, f"the file is damaged: {'; '.join(damages)}", do)]


def _batches(overdue: Sequence[tuple[BatchRow, str]]) -> list[Finding]:
    """Return a finding for each batch that should have ended; its jobs wait for it."""
    return [
        Finding(
            "batches",
            WARNING,
            f"run {name}: batch {row.nonce} of {pluralize(row.count, 'request')} is {row.state}, and providers promise an "
            f"answer within a day{f' ({row.error})' if row.error else ''}",
            f"start a worker with the key that it was made with; if the provider has lost it, `lbr batches --forget "
            f"{row.nonce}` puts its jobs back",
        )
        for row, name in overdue
    ]


def _leases(view: Overview, expired: int, oldest_ms: int) -> Finding:
    if not expired:
        return Finding("leases", OK, "none has expired")
    workers = view.workers
    live = sum(one.is_live for one in workers)
    found = (
        f"{pluralize(expired, 'lease')} expired, the oldest {duration(oldest_ms / 1000)} ago; "
        f"{live} of {pluralize(len(workers), 'worker')} reported recently"
    )
    if not live:
        return Finding("leases", WARNING, found, "start `lbr worker`: it takes the jobs over")
    if oldest_ms < LONG_EXPIRED_MS:
        return Finding("leases", NOTE, found, "nothing: the workers take such jobs over")
    do = "check with `lbr status` that the workers make progress, or start another"
    return Finding("leases", WARNING, found, do)


def _counters(drifts: list[Drift] | None, fixed: list[Drift] | None) -> Finding | None:
    if drifts:
        found = f"differ from a recount: {_drift_words(drifts)}"
        return Finding("counters", ERROR, found, "`lbr doctor --fix` fixes them, while workers go on")
    if fixed:
        return Finding("counters", NOTE, f"differed and are fixed: {_drift_words(fixed)}")
    return None if drifts is None else Finding("counters", OK, "agree with a recount")


def _drift_words(drifts: list[Drift]) -> str:
    shown = [f"run {one.run}: {one.counter} {one.kept}, counted {one.counted}" for one in drifts[:MAX_DRIFTS]]
    return "; ".join(shown) + (f"; and {len(drifts) - MAX_DRIFTS} more" if drifts[MAX_DRIFTS:] else "")


def _runs(runs: list[RunCounts], now: int) -> list[Finding]:
    unsealed = [one.run for one in runs if one.run.sealed_at is None]
    found = [_unsealed(run, now) for run in unsealed if not run.is_paused_by(PauseCause.MOVING_FROM)]
    found += [_paused(one.run, one.open) for one in runs if one.run.state is RunState.PAUSED]
    return found or [Finding("runs", OK, "none is paused or still being enqueued")]


def _unsealed(run: Run, now: int) -> Finding:
    since = max(0, now - run.enqueued_at)
    ago = duration(since / 1000)
    found = f"run {run.name}: its enqueue has not finished; the latest inputs came {ago} ago"
    if since < LIVE_ENQUEUE_MS:
        return Finding("runs", NOTE, found)
    do = "run the same enqueue again: it adds what is missing; with --append, check first what is there"
    return Finding("runs", WARNING, found, do)


def _paused(run: Run, left: int) -> Finding:
    pause = run.pause or Paused(PauseCause.USER, "no reason is stored")
    found = f"run {run.name}: paused with {pluralize(left, 'job')} to do: {pause.message}"
    if pause.cause is PauseCause.MOVED_TO or not (left or pause.cause.is_move):
        return Finding("runs", OK, found)
    gravity = NOTE if pause.cause is PauseCause.USER else WARNING
    return Finding("runs", gravity, found, way_on(run.name, pause.cause))


async def _key(run: Run, authority: Authority) -> Finding:
    """Build the run's model as a worker does; neither the key nor the network is tried."""
    if kind_of(run.task) is Kind.FUNCTION:
        own = "the program that defines it" if run.task.fingerprint else f"--function {run.task.function}"
        return Finding("keys", OK, f"run {run.name} needs no key, and a worker with {own}")
    try:
        await build_model(run.task, authority, concurrency=1).aclose()
    except UsageError as error:
        found = f"run {run.name}: a worker started here cannot serve it: {error}"
        return Finding("keys", WARNING, found, "fix it where the workers run, in the environment or .env")
    return Finding("keys", OK, f"run {run.name}: nothing is missing for {run.task.answerer}")


def _kept(database: Database) -> Iterator[Finding]:
    for path, count in kept_answers.kept_files(database.spool_places).items():
        answers = "unreadable answers" if count is None else pluralize(count, "finished answer")
        found = f"{answers} in {path} are not in the database yet"
        yield Finding("kept answers", WARNING, found, "start `lbr worker` on this machine: it writes them")
