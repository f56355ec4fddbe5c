"""Which files lbr may use in a folder where other users can plant files and links."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINKS = 40
COMPANIONS = ("-wal", "-shm", "-journal")
"""The endings of files that SQLite keeps beside a database."""
FOREIGN = "it is not a regular file of yours alone: see `ls -l`; `chmod go-w` it if it is yours, else remove it"


def is_ours(found: os.stat_result, beside: Path | None = None) -> bool:
    """Return whether a file is regular, belongs to this user or root, and no other user may write to it.

    A file beside a database may also belong to the database's owner, and its group may write if it may write there.
    """
    owners, mode, shared = {os.geteuid(), 0}, 0, False
    with suppress(OSError):
        if beside is not None:
            of = os.stat(beside)
            owners.add(of.st_uid)
            mode = of.st_mode
            shared = bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and found.st_gid == of.st_gid))
    others_write = found.st_mode & ~mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(found.st_mode) and (shared or found.st_uid in owners) and not others_write


def check_ours(path: Path, beside: Path | None = None) -> None:
    """Raise PermissionError if the file at a path exists and `is_ours` rejects it."""
    with suppress(FileNotFoundError):
        if not is_ours(os.lstat(path), beside):
            raise PermissionError(errno.EPERM, FOREIGN, str(path))


def open_ours(path: Path, flags: int, beside: Path | None = None) -> int:
    """Open a file without following a link or waiting for a pipe. Raises OSError, also if `is_ours` rejects it."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    # A second name of a file to write could be that of another file of ours.
    if not is_ours(found, beside) or (flags & os.O_RDWR and found.st_nlink > 1):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, FOREIGN, str(path))
    return descriptor


def check_database(database: Path) -> None:
    """Raise UsageError if another user may have put the database, or a file that SQLite keeps beside it."""
    with suppress(FileNotFoundError):
        if _is_planted(os.stat(database.parent), os.stat(database).st_uid):
            raise UsageError(
                f"expected {database} to be yours, got: a file of another user in a folder where everyone may put one; "
                f"name another file, or share the database in a folder of its own"
            )
    for suffix in COMPANIONS:
        path = database.with_name(database.name + suffix)
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            if not is_ours(found, database) or found.st_nlink > 1:
                raise UsageError(f"expected {path} to be what SQLite keeps beside {database.name}, but {FOREIGN}")


def _is_planted(folder: os.stat_result, owner: int) -> bool:
    """Return whether a file of this owner in a folder where everyone may put files is not ours, root's or the folder's."""
    everyones = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    return bool(everyones) and owner not in {os.geteuid(), 0, folder.st_uid}


def refuse_foreign_link(path: str) -> None:
    """Raise UsageError if a path is a link that another user put into a folder where everyone may put files.

    This is Linux's rule (fs.protected_symlinks), which does not apply to a path that is resolved before it is opened.
    """
    for _ in range(MAX_LINKS):
        folder = os.path.realpath(os.path.dirname(path))
        if not os.path.islink(path):
            return
        if _is_planted(os.stat(folder), os.lstat(path).st_uid):
            raise UsageError(
                f"expected {path} to be a file or a link of yours, got: a link of another user in a folder where "
                f"everyone may put one; remove it, or name another file"
            )
        path = os.path.join(folder, os.readlink(path))
