"""What `lbr run` and `lbr worker` show of their work: a view on a terminal, else a line from time to time."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lbr.api.view import follow, is_terminal, span
from lbr.cli.app import log, talk
from lbr.core.text import harmless, pluralize

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from lbr.api.draw import Screen
    from lbr.api.view import RunView

LOOK_SECONDS = 0.5
LINE_SECONDS = 30.0
MAX_KINDS = 1_000
SHOWN_KINDS = 3
STOPPING = "stopping: finishing the calls in flight; press Ctrl-C again to give them back at once"
PREFIX = "lbr: "
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Shown:
    """Prints a command's messages, and on a terminal draws its runs below them.

    There, a message that only repeats an earlier one with other numbers is counted instead.
    """

    def __init__(self, screen: Screen | None) -> None:
        self.screen = screen
        self._kinds: dict[str, tuple[int, str]] = {}
        self._views: Sequence[RunView] | None = None
        self._deadline: float | None = None
        self._lines: dict[str, str] = {}

    def notify(self, message: str) -> None:
        """Print a message."""
        kind = _NUMBER.sub("0", message)
        count, _ = self._kinds.pop(kind, (0, ""))
        if self.screen is None or talk.verbose or not count:
            log(message)
        if len(self._kinds) < MAX_KINDS:
            self._kinds[kind] = count + 1, message

    def pass_on(self, line: str) -> None:
        """Print a line of another process of this command: one of its messages, or of a function."""
        if line.startswith(PREFIX):
            self.notify(line.removeprefix(PREFIX))
        else:
            with suppress(OSError, AttributeError):
                sys.stderr.write(harmless(f"{line}\n"))

    def stop(self, grace: float) -> None:
        """Show that the work stops after the calls in flight, and then that it gives them back."""
        first = self._deadline is None
        self._deadline = time.monotonic() + (grace if first else 0)
        if self.screen is None and first:
            log(STOPPING)
        self._draw()

    def show(self, views: Sequence[RunView]) -> None:
        """Show what is going on now; without a terminal, as a line for each run with something new."""
        self._views = views
        if self.screen is not None:
            self._draw()
            return
        for one in views:
            if self._lines.get(one.status.run) != one.line:
                self._lines[one.status.run] = one.line
                log(f"{time.strftime('%H:%M:%S')} {one.line}", **_fields(one))

    def _draw(self) -> None:
        if self.screen is None or self._views is None:
            return
        self.screen.show(self._views, self._repeated()[-SHOWN_KINDS:], self._stopping())

    def end(self) -> None:
        """Print what was only counted, when the view is gone."""
        for message in self._repeated() if self.screen is not None and not talk.verbose else ():
            log(message)

    def _repeated(self) -> list[str]:
        return [f"{count} times: {message}" for count, message in self._kinds.values() if count > 1]

    def _stopping(self) -> str:
        if self._deadline is None:
            return ""
        left = self._deadline - time.monotonic()
        most = f" (at most {span(left)} more)"
        return STOPPING.replace(";", f"{most};") if left > 0 else "stopping: giving back the calls in flight"


def _fields(view: RunView) -> dict[str, Any]:
    numbers = {name: getattr(view, name) for name in ("per_minute", "elapsed", "left", "reason")}
    return asdict(view.status) | numbers


@asynccontextmanager
async def shown(db: dict[str, Any], runs: Collection[str]) -> AsyncIterator[Shown]:
    """Show the work on these runs, or on all without names, until the block ends; nothing of it with -q."""
    with ExitStack() as stack:
        screen = None
        if is_terminal() and not (talk.quiet or talk.log_format == "json"):
            from lbr.api.draw import Screen  # noqa: PLC0415 - only for a terminal

            screen = Screen()
        show = Shown(screen)
        stack.callback(show.end)
        if screen is not None:
            stack.enter_context(screen)
        watching = asyncio.create_task(_watch(show, db, runs))
        try:
            yield show
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _watch(show: Shown, db: dict[str, Any], runs: Collection[str]) -> None:
    seconds = LOOK_SECONDS
    if show.screen is None:  # short work prints no line, and needs no look
        seconds = LINE_SECONDS
        await asyncio.sleep(seconds)
    async for views, _ in follow(runs, seconds=seconds, **db):
        show.show(views)


async def watch_status(db: dict[str, Any], run: str | None, seconds: float) -> None:
    """Draw a run, or all that are not finished, on stdout, a terminal, until they are finished or cancelled."""
    from lbr.api.draw import Screen  # noqa: PLC0415 - only for a terminal

    with Screen(stderr=False, stays=True) as screen:
        async for views, status in follow([] if run is None else [run], seconds=seconds, at_work=False, **db):
            slots = sum(one["concurrency"] for one in status.workers)
            screen.show(views, [f"{pluralize(len(status.workers), 'worker')}, {pluralize(slots, 'slot')}"])
            if all(one.is_over for one in views):
                return
