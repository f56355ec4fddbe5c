"""The SQLite file on disk: its creation, its locks, the file system under it and its removal."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import sqlite3
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from filelock import AsyncFileLock, FileLock, Timeout

from lbr.core import ownership
from lbr.core.errors import DatabaseBusyError, DatabaseError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

NETWORK_FILE_SYSTEMS = frozenset(
    (  # noqa: SIM905 - a line for each name is no clearer
        "nfs nfs3 nfs4 cifs smb2 smb3 smbfs 9p afs coda ncpfs davfs ceph lustre glusterfs beegfs fhgfs gpfs panfs pvfs2 "
        "orangefs sshfs ceph-fuse s3fs goofys mount-s3 mountpoint-s3 gcsfuse blobfuse blobfuse2 rclone curlftpfs smbnetfs "
        "davfs2 juicefs mfs moosefs lizardfs saunafs seaweedfs fuse_dfs dfuse gvfsd-fuse kio-fuse google-drive-ocamlfuse "
        # Folders of the host that a virtual machine shares: the host knows nothing of its locks.
        "vboxsf vmhgfs vmhgfs-fuse prl_fs osxfs grpcfuse"
    ).split()
)
"""As /proc/self/mountinfo names them, those in user space without the `fuse.` before their name."""
SUFFIXES = ("", *ownership.COMPANIONS)
PART = ".part"
"""The end of the name of a file that is being written."""
LOOKS = 100
MOUNTS = Path("/proc/self/mountinfo")
NETWORK_WAYS = "put it on a local disk, or name a PostgreSQL server with --db"
_ESCAPED = re.compile(r"\\([0-7]{3})")


def lock_path(database: Path, purpose: str) -> Path:
    """Return the lock file of one purpose: `runs.db.create.lock` beside `runs.db`."""
    return database.with_name(f"{database.name}.{purpose}.lock")


@contextmanager
def locked(database: Path, purpose: str) -> Iterator[None]:
    """Hold a kernel lock on a file beside the database; a killed holder frees it at once.

    Raises Timeout if another process holds it, OSError if it cannot be used.
    """
    path = lock_path(database, purpose)
    ownership.check_ours(path, database)
    with FileLock(path, timeout=0, mode=0o600, fallback_to_soft=False):
        yield


def lock_open(descriptor: int) -> None:
    """Lock an open file until it is closed. Raises OSError."""
    for _ in range(LOOKS):  # a process that checks whether it is free holds it for a moment
        with suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.001)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_free(path: Path, beside: Path | None = None) -> bool:
    """Return whether a file was locked by a process that has ended; an empty one may be about to be locked.

    It may also belong to the owner of the database that it is `beside`.
    """
    try:
        descriptor = ownership.open_ours(path, os.O_RDWR, beside)
    except OSError:  # none there, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_size > 0
    except OSError:  # another process holds it
        return False
    finally:
        os.close(descriptor)


def file_system_of(path: Path, mounts: str, device: str = "") -> str | None:
    """Return the type of the file system that holds a path, from the text of /proc/self/mountinfo; None if none does.

    `device` is the major:minor of the file at the path: a mount point may be hidden under a later mount.
    """
    holding = [
        (of == device, len(str(point)), kind)
        for point, of, kind in _mounts(mounts)
        if kind and path.is_relative_to(point)
    ]
    # Of equal ones, the last.
    return max(reversed(holding), key=lambda one: one[:2])[2] if holding else None


def _mounts(text: str) -> Iterator[tuple[Path, str, str]]:
    """Yield mount point, device and type, by proc(5): the fifth and third field, and the first one after a lone hyphen."""
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        parts = fields.split(" ")
        if len(parts) > 4:
            point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), parts[4])
            yield Path(point), parts[2], tail.split(" ")[0]


def file_system(path: Path) -> str | None:
    """Return the type of the file system that a file is on, or will be; None if this system does not report it."""
    try:
        real = Path(os.path.realpath(path))
        return file_system_of(real, MOUNTS.read_text(encoding="utf-8", errors="replace"), device_of(real))
    except (OSError, ValueError):  # the second for what cannot be a path
        return None


def check_file(path: Path) -> None:
    """Raise UsageError if a queue's file has a second name, or a file beside it may be another user's.

    SQLite's files beside it have its name: a process that uses another name does not see the WAL, and answers are lost.
    """
    names = path.stat().st_nlink if path.exists() else 1
    mounts = ""
    with suppress(OSError):  # this system does not report mounts
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    if is_mount_point(path, mounts):
        raise UsageError(
            f"expected {path} to be a file in a folder, got: a mount of its own, whose WAL other processes do not see, "
            f"so that answers are lost; mount the folder that it is in"
        )
    if names > 1:
        raise UsageError(
            f"expected {path} to have one name, got: {names} hard links, by which processes do not see each other's "
            f"WAL, so that answers are lost; keep a backup as a copy (`cp`) instead, and remove the other name: "
            f"`find FOLDER -samefile {path}` finds it"
        )
    ownership.check_database(path)


def is_mount_point(path: Path, mounts: str) -> bool:
    """Return whether the path itself is a mount point, not hidden by a later mount, from /proc/self/mountinfo's text."""
    real = Path(os.path.realpath(path))
    points = [point for point, *_ in _mounts(mounts) if real.is_relative_to(point)]
    return points[-1:] == [real]


def device_of(path: Path) -> str:
    """Return the major:minor of the device that a file is on, or will be. Raises OSError."""
    found = next((one for one in (path, *path.parents) if one.exists()), path).stat().st_dev
    return f"{os.major(found)}:{os.minor(found)}"


def is_network(kind: str | None) -> bool:
    """Return whether a type of file system is known to be on other machines; an unknown one may be local."""
    return kind is not None and kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS


def check_location(path: Path, *, create: bool, name: str = "--db") -> None:
    """Raise UsageError if the path cannot hold a database, or without `create` holds none.

    DatabaseError for a file that this user may not read, or with `create` write. `name` is the option in messages.
    """
    try:
        if path.is_dir():
            raise UsageError(f"expected {name} to name a file, got a directory: {path}; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"expected a folder for the database at {path.parent}, got: none; create it first")
        if not create and not path.exists():
            raise UsageError(f"expected a database at {path}, got: no such file; `lbr enqueue` creates it")
        if path.exists() and not os.access(path, os.R_OK | os.W_OK if create else os.R_OK):
            allowed = "read and written" if create else "read"
            raise DatabaseError(
                f"expected {path} to be a file that may be {allowed}, got: permission denied; change its mode"
            )
    except OSError as error:
        raise UsageError(f"expected a database path, got: {path}: {error.strerror}") from error


def create_private(path: Path) -> None:
    """Create an empty file that only its owner can read; prompts are private. An existing one stays as it is."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise DatabaseError(f"cannot create the database {path}: {error.strerror}") from error


def state_places(database: str) -> list[Path]:
    """Return the beginning of a path in lbr's folder by the XDG specification; none for a user who has no home."""
    with suppress(RuntimeError):
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser())
        return [folder / "lbr" / telling_name(database)]
    return []


def telling_name(database: str) -> str:
    """Return a readable file name that is different for each database."""
    digest = hashlib.blake2b(database.encode(), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', database)[-60:].strip('-')}.{digest}"


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read, whole or not at all, and wait for the disk. Raises OSError."""
    with new_private(path) as (_, descriptor), open(descriptor, "wb", closefd=False) as file:
        file.write(data)


def check_new(file: os.PathLike[str] | str) -> Path:
    """Return a new file's path. Raises UsageError if it, or a file that SQLite would take as its own, is there."""
    path = Path(file).absolute()
    if taken := [f"{path}{suffix}" for suffix in SUFFIXES if os.path.lexists(f"{path}{suffix}")]:
        raise UsageError(f"{taken[0]} exists already, and a backup replaces no file; use another name, or remove it")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for the backup; create it first")
    return path


@contextmanager
def new_private(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a hidden new file that only its owner can read, and its descriptor.

    If the block succeeds, it gets its name, on the disk, else it is removed. What killed processes left of the same file
    is removed first. Raises OSError.
    """
    remove_parts(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{PART}"))
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}{PART}")
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with suppress(OSError):
            lock_open(descriptor)
        yield part, descriptor
        os.fsync(descriptor)
        # Under the lock, because other processes remove a part that none holds.
        part.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def remove_parts(parts: Iterable[Path]) -> None:
    """Remove those of these files that killed processes were writing; a process that still writes one holds its lock."""
    for part in parts:
        # The locks of other machines are not visible here.
        if is_free(part) and not is_network(file_system(part)):
            with suppress(OSError):
                part.unlink()


@asynccontextmanager
async def creation_lock(path: Path) -> AsyncIterator[None]:
    """Hold the lock of creation, migration and removal. Raises DatabaseError."""
    file = lock_path(path, "create")
    lock = AsyncFileLock(file, timeout=60, mode=0o600, fallback_to_soft=False)
    try:
        ownership.check_ours(file, path)
        await lock.acquire()
    except Timeout as error:
        raise DatabaseBusyError(f"another process has been creating or removing {path} for a minute") from error
    except OSError as error:
        raise DatabaseError(
            f"cannot create or upgrade the database {path} with the lock {file}: {error.strerror or error}"
        ) from error
    try:
        yield
    finally:
        await lock.release()


async def remove_unused(path: Path, *, run: str, query: str) -> bool:
    """Remove a database file that no process has open and that holds one run only; else return False.

    `query` selects the names of its runs. No connection of this process may be open: closing the file would drop its locks.
    """
    async with creation_lock(path):
        removed = _remove_if_sole(path, run, query)
        if removed:
            # A process that waits for one of these locks notices that it is gone, and makes a new one.
            for lock in path.parent.glob(f"{glob.escape(path.name)}.*.lock"):
                lock.unlink(missing_ok=True)
    return removed


def _remove_if_sole(path: Path, run: str, query: str) -> bool:
    """Remove the file if this is its only connection, which SQLite checks when it leaves WAL mode."""
    if not path.exists():
        return True
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        if connection.execute("PRAGMA journal_mode = DELETE").fetchone() != ("delete",):
            return False
        connection.execute("BEGIN EXCLUSIVE")
        if {name for (name,) in connection.execute(query)} != {run}:
            return False
        for suffix in SUFFIXES:
            with suppress(FileNotFoundError):
                os.unlink(f"{path}{suffix}")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True
