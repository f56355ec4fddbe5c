"""Descriptors: each open file and each connection is one, and a process may have so many.

The limit that holds is the soft one (`ulimit -n`, often 1024, on macOS 256); a process may raise it up to the hard one.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

try:
    import resource
except ImportError:  # a system without such limits
    resource = None  # type: ignore[assignment]

HAS_LIMITS = resource is not None
RESERVED = 64
"""What a worker needs besides its calls: the database, what it imports, the look-up of names."""

SCARCE = 8
"""With fewer left, whatever could not be opened just now may well have wanted one of them."""

LEAST = 16
"""What a worker needs at the least, before it opens anything: the database, what it imports, and one call."""


def most() -> int:
    """Return how many this process may have."""
    if not HAS_LIMITS:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def left() -> int:
    """Return how many this process may still open."""
    try:
        return most() - len(os.listdir("/dev/fd"))
    except FileNotFoundError:  # a system that does not tell
        return most() - RESERVED
    except OSError:  # not even one to look with
        return 0


def room() -> int:
    """Return for how many calls there are enough, at least 1, each with one connection."""
    return max(1, left() - RESERVED)


def are_lacking(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came of, is that no descriptor was left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, socket.gaierror):  # it has codes of its own, and opens files to find a name
            if left() < SCARCE:
                return True
        elif isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            return True
        error = error.__cause__ or error.__context__
    return False


def ask_for(calls: int) -> None:
    """Raise the limit to what so many calls at a time need, as far as this process may; it is never lowered.

    That is four for each where there are so many: what was called before keeps its connections open for a while, and a
    connection may be tried at two addresses at once. For the commands only: a library leaves its host's limits alone.
    """
    if not HAS_LIMITS:
        return
    for each in (4, 2, 1):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = each * calls + 2 * RESERVED
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # macOS allows less than its hard limit says
            continue
        return
