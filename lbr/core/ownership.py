"""Which files may be used where other users can write to the folder, and so can plant files and links."""

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
"""What SQLite keeps beside a database."""
FOREIGN = (
    "it is not a regular file of yours alone: see `ls -l`; `chmod go-w` it if it is yours, else remove it"
)


def is_ours(found: os.stat_result, beside: Path | None = None) -> bool:
    """Return whether a file is regular, belongs to this user or root, and no other user may write to it.

    A file beside a database may also belong to the database's owner, and be writable by the users who may write that:
    its owner may have opened it to a group.
    """
    owners, mode, shared = {os.geteuid(), 0}, 0, False
    try:
        of = None if beside is None else os.stat(beside)
    except OSError:
        of = None
    if of is not None:
        owners.add(of.st_uid)
        mode = of.st_mode
        shared = bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and found.st_gid == of.st_gid))
    return (
        stat.S_ISREG(found.st_mode)
        and (shared or found.st_uid in owners)
        and not found.st_mode & ~mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def check_ours(path: Path, beside: Path | None = None) -> None:
    """Raise PermissionError if there is something at a path that `is_ours` refuses."""
    with suppress(FileNotFoundError):
        if not is_ours(os.lstat(path), beside):
            raise PermissionError(errno.EPERM, FOREIGN, str(path))


def open_ours(path: Path, flags: int, beside: Path | None = None) -> int:
    """Open a file, never through a link and without waiting for a pipe. Raises OSError, also for what is not ours.

    What is opened to be written may have no second name: that could be another file of ours.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    if not is_ours(found, beside) or (flags & os.O_RDWR and found.st_nlink > 1):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, FOREIGN, str(path))
    return descriptor


def check_database(database: Path) -> None:
    """Raise UsageError for a database, or what SQLite keeps beside it, that another user may have put there."""
    with suppress(FileNotFoundError):
        if _is_open_to_all(os.stat(database.parent), os.stat(database).st_uid):
            raise UsageError(
                f"expected {database} to be yours, got: a file of another user in a folder where everyone may put one; "
                f"name another file, or share the database in a folder of its own"
            )
    for suffix in COMPANIONS:
        path = database.with_name(database.name + suffix)
        with suppress(FileNotFoundError):
            found = os.lstat(path)
            if not is_ours(found, database) or found.st_nlink > 1:
                raise UsageError(
                    f"expected {path} to be what SQLite keeps beside {database.name}, but {FOREIGN}"
                )


def _is_open_to_all(folder: os.stat_result, owner: int) -> bool:
    """Return whether everyone may put files into a folder, and the owner of one is neither we, root nor the folder's."""
    mode = folder.st_mode
    return bool(mode & stat.S_ISVTX and mode & stat.S_IWOTH) and owner not in {
        os.geteuid(),
        0,
        folder.st_uid,
    }


def refuse_foreign_link(path: str) -> None:
    """Raise UsageError for a link that another user put into a folder where all may: it leads to a file of their choice.

    The rule is Linux's (fs.protected_symlinks), for the last part of a path, which is resolved before it is opened.
    """
    for _ in range(MAX_LINKS):
        folder = os.path.realpath(os.path.dirname(path))
        if not os.path.islink(path):
            return
        if _is_open_to_all(os.stat(folder), os.lstat(path).st_uid):
            raise UsageError(
                f"expected {path} to be a file or a link of yours, got: a link of another user in a folder where "
                f"everyone may put one; remove it, or name another file"
            )
        path = os.path.join(folder, os.readlink(path))
