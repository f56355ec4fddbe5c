"""Who goes first at the interpreter: a transaction that locks a database file, or functions in threads.

Each statement, and each row of it, lets go of the interpreter for a moment. A function that computes may take it then,
and others that wait come next: for as long as all of them take, a short transaction has the file locked, and keeps
every other process from the queue. So no call of a function begins while one is under way, unless that has itself been
waiting for long.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_SECONDS = 0.05
"""For how long a transaction holds calls back at most: it may itself have to wait for another process."""


class Precedence:
    """Any number of transactions, and the calls that let them go first. For use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._until = 0.0
        self._none = threading.Event()
        self._none.set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Be a transaction for a while."""
        with self._lock:
            if not self._under_way:
                self._until = time.monotonic() + LONGEST_SECONDS
            self._under_way += 1
            self._none.clear()
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._none.set()

    def give(self) -> None:
        """Return when no transaction is under way, or the first of them has been for `LONGEST_SECONDS`."""
        if not self._none.is_set():
            left = self._until - time.monotonic()
            if left > 0:
                self._none.wait(left)


PRECEDENCE = Precedence()
"""The one of this process, for it has one interpreter."""

# A copy of this process has none of its threads, so none of their transactions will come to an end there.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PRECEDENCE.__init__)  # type: ignore[misc]
