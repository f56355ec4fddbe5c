"""What there is to say of where a queue is: the file and the disk, or the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.api.diagnosis.findings import Finding, Gravity
from lbr.core.plurals import duration, pluralize
from lbr.store.files import NETWORK_WAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.store.file_health import FileHealth
    from lbr.store.health import Health
    from lbr.store.server_health import ServerHealth

MIB = 1024 * 1024
WAL_NOTE, WAL_WARNING = 32 * MIB, 128 * MIB
"""A checkpoint is due from 16 MiB on; a reader may put it off for a while."""

CLOCK_NOTE_MS, CLOCK_WARNING_MS = 2_000, 60_000
MANY_WRITERS = 500
OLDEST_SERVER = 14


def of_file(file: FileHealth, health: Health) -> Iterator[Finding]:
    """Say what there is to say of the file of an SQLite queue."""
    yield _sqlite(file.sqlite_version)
    yield _file_system(file, health)
    if not file.modes or (health.version is None and not health.refused):
        return  # there is none, or it may be anybody's
    yield _modes(file)
    if not file.writable:
        yield Finding(
            "writable",
            Gravity.WARNING,
            f"this user may not write {file.path} or its folder: workers could not use it",
            f"make both writable with `chmod u+w`, or work as their owner: `ls -ld {file.path.parent} {file.path}`",
        )
    if file.closed_locks:
        yield _closed_locks(file)
    yield _wal(file)


def has_wal_reset_bug(version: str) -> bool:
    """Tell whether a version of SQLite can corrupt a database by two checkpoints that follow each other closely."""
    numbers = tuple(int(part) for part in version.split(".")[:3])
    mended = numbers >= (3, 51, 3) and numbers != (3, 52, 0)  # which was withdrawn
    return not (mended or (3, 50, 7) <= numbers < (3, 51) or (3, 44, 6) <= numbers < (3, 45))


def _sqlite(version: str) -> Finding:
    if not has_wal_reset_bug(version):
        return Finding("sqlite", Gravity.OK, f"SQLite {version}, without the WAL-reset bug")
    return Finding(
        "sqlite",
        Gravity.NOTE,
        f"SQLite {version} has the WAL-reset bug; lbr takes its checkpoints so that it cannot strike",
        "let no other program write to the database while lbr does; a Python with SQLite 3.51.3 is free of it",
    )


def _file_system(file: FileHealth, health: Health) -> Finding:
    kind = file.file_system
    if file.is_network:
        gravity = Gravity.ERROR if health.refused else Gravity.WARNING
        rest = ", and the database was not opened" if health.refused else ""
        found = f"a network file system ({kind}), whose locks can fail and corrupt the database{rest}"
        ways = (
            f"{NETWORK_WAYS}; --allow-network-fs looks at it all the same" if health.refused else NETWORK_WAYS
        )
        return Finding("file system", gravity, found, ways)
    if kind in {"tmpfs", "ramfs"}:
        found = f"{kind}: the database is in memory, and gone when the machine restarts"
        return Finding("file system", Gravity.NOTE, found, "put it on a disk, unless that is what you want")
    if kind == "overlay":
        found = "overlay: the database is in a container's own layer, and gone with the container"
        return Finding("file system", Gravity.NOTE, found, "mount a folder from outside for it")
    return Finding("file system", Gravity.OK, kind or "the system does not tell which; taken for a local one")


def _modes(file: FileHealth) -> Finding:
    open_to_others = {name: mode for name, mode in file.modes.items() if mode & 0o077}
    if not open_to_others:
        return Finding("mode", Gravity.OK, "only its owner can read it")
    shown = ", ".join(f"{name} {mode:04o}" for name, mode in open_to_others.items())
    names = " ".join(str(file.path.parent / name) for name in open_to_others)
    return Finding(
        "mode",
        Gravity.WARNING,
        f"others can read or write prompts and answers: {shown}",
        f"chmod 600 {names}",
    )


def _closed_locks(file: FileHealth) -> Finding:
    names = ", ".join(lock.name for lock in file.closed_locks)
    paths = " ".join(map(str, file.closed_locks))
    return Finding(
        "locks",
        Gravity.WARNING,
        f"this user may not open {names}: without its lock the WAL is not moved into the file, or a command ends with "
        f"an error",
        f"give it to the owner of the database with `chown`: `ls -l {file.path} {paths}`; while no lbr process runs it "
        f"may be removed as well",
    )


def _wal(file: FileHealth) -> Finding:
    size = f"the WAL has {file.wal_bytes / MIB:,.1f} MiB"
    if file.wal_bytes < WAL_NOTE:
        return Finding("wal", Gravity.OK, size)
    gravity = Gravity.NOTE if file.wal_bytes < WAL_WARNING else Gravity.WARNING
    return Finding(
        "wal",
        gravity,
        f"{size}: no checkpoint has come to its end for a while, or nobody has opened the database since a crash",
        f"any lbr command that writes, such as `lbr worker`, takes one; a program that stays in a transaction keeps "
        f"it from that: `fuser {file.path}` finds it",
    )


def of_server(server: ServerHealth) -> Iterator[Finding]:
    """Say what there is to say of a PostgreSQL server."""
    name = f"PostgreSQL {server.settings['server_version']}"
    if server.version < OLDEST_SERVER:
        found = f"{name}, which is older than {OLDEST_SERVER}"
        yield Finding("server", Gravity.ERROR, found, f"use a server of version {OLDEST_SERVER} or newer")
    elif server.standby:
        yield Finding(
            "server", Gravity.ERROR, f"{name}, a standby: nothing can be written", "name the primary"
        )
    else:
        yield Finding("server", Gravity.OK, name)
    yield _durability(server.settings)
    yield _autovacuum(server.settings)
    yield _pooler(server)
    yield _server_clock(server)


def _durability(settings: dict[str, str]) -> Finding:
    off = [name for name in ("synchronous_commit", "fsync", "full_page_writes") if settings[name] == "off"]
    if not off:
        return Finding("durability", Gravity.OK, "a commit has reached the server's disk")
    worse = ", or the whole database be damaged" if set(off) - {"synchronous_commit"} else ""
    return Finding(
        "durability",
        Gravity.WARNING,
        f"{' and '.join(off)} off: when the server crashes, the latest answers may be lost{worse}",
        f"set {' and '.join(f'{name} = on' for name in off)}",
    )


def _autovacuum(settings: dict[str, str]) -> Finding:
    if settings["autovacuum"] == "on":
        return Finding("autovacuum", Gravity.OK, "on")
    return Finding(
        "autovacuum",
        Gravity.WARNING,
        "off: what jobs leave behind as they change stays, and claims become slower and slower",
        "set autovacuum = on, or run VACUUM ANALYZE on the tables of the schema lbr every few minutes",
    )


def _pooler(server: ServerHealth) -> Finding:
    if server.pooler is not None:
        return Finding(
            "pooler",
            Gravity.WARNING,
            f"something stands before the server: {server.pooler}",
            "if it is a transaction pooler, add pgbouncer=true to the URL",
        )
    if not server.pooled:
        return Finding("pooler", Gravity.OK, "none is seen")
    if server.idle_timeout == "0":
        return Finding(
            "pooler",
            Gravity.WARNING,
            "a transaction pooler, by the URL; the server never ends a session that is silent in a transaction, so "
            "a worker that is cut off may keep its locks for hours",
            "ALTER ROLE … SET idle_in_transaction_session_timeout = '20s', for the role that lbr works as",
        )
    return Finding("pooler", Gravity.OK, "a transaction pooler, by the URL")


def _server_clock(server: ServerHealth) -> Finding:
    off = max(0, abs(server.clock_ms) - server.unsure_ms)
    if off < CLOCK_NOTE_MS:
        return Finding("machine's clock", Gravity.OK, "as the server's")
    way = "ahead of" if server.clock_ms > 0 else "behind"
    return Finding(
        "machine's clock",
        Gravity.NOTE if off < CLOCK_WARNING_MS else Gravity.WARNING,
        f"this machine's clock is {duration(off / 1000)} {way} the server's, by which leases and waits go",
        "set both by a time server: some providers say until when to wait, which is read by this machine's",
    )


def of_writers(health: Health) -> Iterator[Finding]:
    """Say how many processes are known to write to a server."""
    writers = health.writers
    if writers is None:
        return
    found = f"{pluralize(writers.total, 'row')} of writers, {writers.silent} silent for an hour"
    if writers.silent < MANY_WRITERS:
        yield Finding("writers", Gravity.OK, found)
    else:
        yield Finding(
            "writers",
            Gravity.NOTE,
            f"{found}: many processes were killed",
            "nothing: the next that ends in good order removes those of more than a day",
        )
