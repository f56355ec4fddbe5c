"""The limit of open files (`ulimit -n`), which counts connections too: often 1,024, on macOS 256."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
from contextlib import suppress

RESERVED = 64
"""Open files that a worker needs besides its calls: the database, imports, name look-ups."""
LOOK_UP = 8
"""A name look-up that fails with fewer left may have needed one of them."""
MACOS_LIMIT = 10_240
"""The most that macOS grants if its hard limit is unlimited."""


def raise_limit() -> None:
    """Raise the soft limit to the hard one. For commands only: a library leaves its host's limits alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, max(soft, MACOS_LIMIT)):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def limit() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def left() -> int:
    """Return how many files this process may still open."""
    try:
        return limit() - len(os.listdir("/dev/fd"))
    except FileNotFoundError:
        return limit() - RESERVED
    except OSError:  # no file handle is left to list them
        return 0


def room() -> int:
    """Return how many calls can run at a time, with one connection each: at least 1."""
    return max(1, left() - RESERVED)


def are_exhausted(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, means that no more file can be opened."""
    for _ in range(20):
        match error:
            case None:
                return False
            case OSError(errno=errno.EMFILE | errno.ENFILE):
                return True
            case socket.gaierror() if left() < LOOK_UP:
                return True
        error = error.__cause__ or error.__context__
    return False


def exhausted_message() -> str:
    """Return the message for an error that `are_exhausted` recognises."""
    return f"out of file handles (limit {limit()}); raise it with `ulimit -n`, or lower --concurrency"
