"""Which workers live: where the kernel can tell, nobody has to wait until the leases of a dead one run out.

A worker of a file holds a kernel lock (flock(2)) on a small file of its own beside it, `runs.db.worker-17.lock` for
worker 17. The kernel frees the lock when the process ends, however it ends, and not before; so a lock that can be
taken says that the worker is dead, in whatever container it ran. A process id would not: others may have it by now,
and each container counts its own. Where there is no such lock, nothing is known, and the leases decide.

A worker takes its lock before its first claim, and others look within the transaction that takes jobs back: so whose
lock is free there, and who has claims, has ended.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from lbr.core import ownership
from lbr.store import files

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lbr.core.types import WorkerId

_held: set[int] = set()


def _let_go_in_copy() -> None:
    """Close what a forked child inherited: it is not the worker, and must not outlive it as such."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_copy)


class Presence:
    """What is known of the workers of a queue without such locks: nothing."""

    tells = False
    """Whether `dead` may ever name somebody."""

    def appear(self, worker: WorkerId) -> None:
        """Show that a worker of this process lives, until it leaves or the process ends."""

    def leave(self, worker: WorkerId) -> None:
        """Show it no longer: what the worker still holds is for others to take back."""

    def dead_workers(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return those of the workers that have ended for certain; the others may have as well."""
        del workers
        return []

    def alive(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return those of the workers that live for certain; the others may as well."""
        del workers
        return []

    def forget(self, workers: Iterable[WorkerId]) -> None:
        """Remove every trace of workers that have ended and hold nothing."""


class FilePresence(Presence):
    """Knows the workers of a database file by the locks beside it."""

    tells = files.HAS_LOCKS

    def __init__(self, database: Path) -> None:
        self._database = database
        self._mine: dict[WorkerId, int] = {}

    def _path(self, worker: WorkerId) -> Path:
        return files.lock_path(self._database, f"worker-{worker}")

    def appear(self, worker: WorkerId) -> None:
        """Hold the worker's lock. Where the file system offers none or is full, the leases have to do."""
        if not self.tells:
            return
        path = self._path(worker)
        try:
            # One may be there from a database of which this one is an older copy, where the same numbers come again.
            descriptor = ownership.open_ours(path, os.O_CREAT | os.O_RDWR, self._database)
        except OSError:
            return
        self._mine[worker] = descriptor
        _held.add(descriptor)
        try:
            files.lock_open(descriptor)
            # An empty file says nothing: its worker may be about to lock it.
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except OSError:
            self.forget([worker])

    def leave(self, worker: WorkerId) -> None:
        """Free the worker's lock; its file stays, and says that the worker has ended."""
        descriptor = self._mine.pop(worker, None)
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)

    def dead_workers(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return the workers whose locks are free."""
        return [
            worker for worker in workers if self.tells and files.is_free(self._path(worker), self._database)
        ]

    def alive(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """Return the workers whose locks are held."""
        there = [worker for worker in workers if self.tells and self._path(worker).exists()]
        dead_workers = self.dead_workers(there)
        return [worker for worker in there if worker not in dead_workers]

    def forget(self, workers: Iterable[WorkerId]) -> None:
        """Free and remove the locks of workers."""
        for worker in workers:
            with suppress(OSError):
                self._path(worker).unlink(missing_ok=True)
            self.leave(worker)
