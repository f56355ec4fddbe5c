"""The progress of one call on stderr: a bar in a terminal or a notebook, else lines; and a last line."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lbr.api.status import status_of
from lbr.api.summary import ending_of
from lbr.api.view import Watch, is_terminal
from lbr.core.text import harmless
from lbr.store import reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from lbr.api.view import RunView
    from lbr.store.database import Database

    Show = Callable[[RunView], None]

REPORT_SECONDS = 0.2
NOTEBOOK_WIDTH = 80


@asynccontextmanager
async def shown(database: Database, run: str, every: int) -> AsyncIterator[None]:
    """Show a run's progress while the block runs, and its end, unless `every` is 0; as lines, one for `every` jobs."""
    if not every:
        yield
        return
    started, watch = time.monotonic(), Watch()
    shows = _notebook if _is_notebook() else _terminal if is_terminal() else _lines
    with shows(run, every) as show:
        watching = asyncio.create_task(_watch(database, run, watch, show))
        try:
            yield
            show(await _look(database, run, watch))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    _print((await ending_of(database, run)).all_in_one(time.monotonic() - started))


async def _watch(database: Database, run: str, watch: Watch, show: Show) -> None:
    """Show the run now and then."""
    while True:
        show(await _look(database, run, watch))
        await asyncio.sleep(REPORT_SECONDS)


async def _look(database: Database, run: str, watch: Watch) -> RunView:
    (now,) = watch.views(status_of(await database.read(reads.overview, run)))
    return now


@contextmanager
def _lines(_: str, every: int) -> Iterator[Show]:
    last: int | None = None

    def show(view: RunView) -> None:
        nonlocal last
        ended = view.status.done + view.status.failed
        if last is not None and ended // every > last // every and view.status.pending + view.status.inflight:
            _print(view.line)
        last = ended

    yield show


@contextmanager
def _terminal(_: str, _every: int) -> Iterator[Show]:
    from lbr.api.draw import Screen  # noqa: PLC0415 - only for a terminal

    with Screen() as screen:
        yield lambda view: screen.show([view])


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


@contextmanager
def _notebook(run: str, _: int) -> Iterator[Show]:
    from IPython.display import display  # noqa: PLC0415 - it is there in a kernel

    from lbr.api.draw import frame  # noqa: PLC0415 - only for a notebook

    show: Any = display  # it has no types
    handle = show({"text/plain": run}, raw=True, display_id=True)

    def update(view: RunView) -> None:
        lines = "\n".join(line.plain for line in frame([view], width=NOTEBOOK_WIDTH))
        handle.update({"text/plain": lines}, raw=True)

    yield update


def _print(line: str) -> None:
    with suppress(OSError, AttributeError):  # stderr may be closed
        print(harmless(f"lbr: {line}"), file=sys.stderr)
