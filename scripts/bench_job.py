"""The job that every queue is measured with, nothing at all, and how a worker process tells that it ran.

Counts go through a small file that all processes map into memory: adding to it costs next to nothing, the same
in every queue, and watching it asks nothing of the database under measurement.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TALLY = "LBR_TEST_TALLY"
PLACE = "LBR_TEST_PLACE"
WIDTH = 2
"""Numbers per process: how many jobs it ran, and 1 once it is ready to be measured."""


class Tally:
    """The numbers of all worker processes, in one mapped file; each process writes only its own."""

    def __init__(self, path: Path | str) -> None:
        with open(path, "r+b") as handle:
            self._numbers = memoryview(mmap.mmap(handle.fileno(), 0)).cast("Q")

    def count(self, place: int) -> None:
        """Add one job to a process's number."""
        self._numbers[place * WIDTH] += 1

    def get_ready(self, place: int) -> None:
        """Say that a process is ready to be measured."""
        self._numbers[place * WIDTH + 1] = 1

    @property
    def calls(self) -> int:
        """How many jobs ran, in all processes together."""
        return sum(self._numbers[::WIDTH].tolist())

    @property
    def ready(self) -> int:
        """How many processes are ready."""
        return sum(self._numbers[1::WIDTH].tolist())


def create_tally(path: Path, places: int) -> Tally:
    """Make the file anew, all 0, and return it."""
    path.write_bytes(bytes(8 * WIDTH * places))
    return Tally(path)


BURN_SECONDS = 0.002

# The process that enqueues imports this module too, and runs nothing.
_tally = Tally(os.environ[TALLY]) if TALLY in os.environ else None
_place = int(os.environ.get(PLACE, "0"))


def count() -> None:
    """Add one job to this process's number."""
    if _tally is not None:
        _tally.count(_place)


def get_ready() -> None:
    """Say that this process is ready to be measured."""
    if _tally is not None:
        _tally.get_ready(_place)


async def noop(prompt: str) -> str:
    """Answer with the prompt itself, so that every answer can be checked."""
    count()
    return prompt


def burn(prompt: str) -> str:
    """Do the same after `BURN_SECONDS` of the processor."""
    end = time.thread_time() + BURN_SECONDS
    while time.thread_time() < end:
        pass
    count()
    return prompt


def wait_for_go() -> None:
    """Wait for the parent to write one byte; end where it ended instead."""
    if not os.read(0, 1):
        os._exit(1)


def leave_with_parent() -> None:
    """Make this process end when its parent does, however that ends: the pipe between them closes."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
