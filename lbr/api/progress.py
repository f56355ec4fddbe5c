"""The progress of one call on stderr: a bar in a terminal or a notebook, else lines; and a last line."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lbr.api.status import one_line, paused_words, printable, status_of
from lbr.core.pricing import NANOS, dollars
from lbr.core.text import duration, harmless, pluralize
from lbr.store import reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from lbr.api.status import RunStatus
    from lbr.store.database import Database

    Show = Callable[[RunStatus], None]

REPORT_SECONDS = 0.2
BAR_CHARACTERS = 30


@asynccontextmanager
async def shown(database: Database, run: str, every: int) -> AsyncIterator[None]:
    """Show a run's progress while the block runs, and its end, unless `every` is 0; as lines, one for `every` jobs."""
    if not every:
        yield
        return
    shows = _notebook if _is_notebook() else bar if sys.stderr is not None and sys.stderr.isatty() else _lines
    with shows(run, every) as show:
        watching = asyncio.create_task(_watch(database, run, show))
        try:
            yield
            last = await _look(database, run)
            show(last)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    _print(last_line(last))


async def _watch(database: Database, run: str, show: Show) -> None:
    """Show the run now and then, with the rate since the first look, which counts this process's calls from the start."""
    clock = asyncio.get_running_loop().time
    started, first = clock(), await _look(database, run)
    show(first)
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        now = await _look(database, run)
        new = now.done + now.failed - first.done - first.failed
        rate = new / (clock() - started) if now.done > first.done else None
        left = None if rate is None else (now.pending + now.inflight) / rate
        show(replace(now, rate=rate, eta_seconds=left))


async def _look(database: Database, run: str) -> RunStatus:
    (now,) = status_of(await database.read(reads.overview, run)).runs
    return now


def last_line(status: RunStatus) -> str:
    """Return how a call ended: its run, the counts of its jobs, what it cost, and why it is paused if work is left."""
    counts = [f"{status.done} of {pluralize(status.jobs, 'job')} done"]
    counts += [f"{count} {word}" for word in ("reused", "failed", "cancelled") if (count := getattr(status, word))]
    cost = "" if status.cost_usd is None else f"; cost {dollars(round(status.cost_usd * NANOS))}"
    pause = "" if status.pause is None or status.finished else f"; paused: {paused_words(status.run, status.pause)}"
    return printable(f"run {status.run}: {', '.join(counts)}{cost}{pause}")


def bar_line(status: RunStatus) -> str:
    """Return a bar and a line of progress."""
    ended = status.done + status.failed + status.cancelled
    full = BAR_CHARACTERS * ended // max(1, status.jobs)
    return printable(f"{'█' * full}{'░' * (BAR_CHARACTERS - full)} {one_line(status)}")


@contextmanager
def _lines(_: str, every: int) -> Iterator[Show]:
    last: int | None = None

    def show(status: RunStatus) -> None:
        nonlocal last
        ended = status.done + status.failed
        if last is not None and ended // every > last // every and status.pending + status.inflight:
            _print(one_line(status))
        last = ended

    yield show


@contextmanager
def bar(run: str, _: int = 0) -> Iterator[Show]:
    """Yield what shows a run as a bar in a terminal."""
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    words, left_words = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[left]"))
    progress = Progress(words, BarColumn(), MofNCompleteColumn(), left_words, console=Console(stderr=True))
    task = progress.add_task(run, total=None, left="")

    def show(status: RunStatus) -> None:
        ended = status.done + status.failed + status.cancelled
        failed = f" ({status.failed} failed)" if status.failed else ""
        left = "" if status.eta_seconds is None else f"{duration(status.eta_seconds)} left"
        progress.update(task, total=status.jobs, completed=ended, description=f"{run}{failed}", left=left)

    progress.start()  # from now on, what is written to stderr appears above it
    try:
        yield show
    finally:
        with suppress(OSError):  # the terminal may be closed before the work is done
            progress.stop()


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


@contextmanager
def _notebook(run: str, _: int) -> Iterator[Show]:
    from IPython.display import display  # noqa: PLC0415 - it is there in a kernel

    show: Any = display  # it has no types
    handle = show({"text/plain": run}, raw=True, display_id=True)
    yield lambda status: handle.update({"text/plain": bar_line(status)}, raw=True)


def _print(line: str) -> None:
    with suppress(OSError, AttributeError):  # stderr may be closed
        print(harmless(f"lbr: {line}"), file=sys.stderr)
