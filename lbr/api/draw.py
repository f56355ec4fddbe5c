"""The view of runs, drawn for a terminal. This imports rich: import it only where something is drawn."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lbr.api.status import printable
from lbr.api.view import span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from lbr.api.view import RunView

MIN_BAR, MIN_WIDTH, MAX_NAME, NOTE_LINES = 10, 40, 30, 3
BAR = (("━", "green"), ("━", "red"), ("╍", "yellow"), ("─", "dim"))
"""How done, failed, called and other jobs are drawn; they differ without colours, too."""
ASCII_BAR = (("#", "green"), ("x", "red"), ("=", "yellow"), ("-", "dim"))
WAITING = "waiting for jobs; Ctrl-C ends the worker"


def frame(
    views: Sequence[RunView],
    *,
    width: int,
    height: int = 24,
    notes: Iterable[str] = (),
    last: str = "",
    ascii_only: bool = False,
) -> list[Text]:
    """Return the lines of a view: all of one run, or a line for each of several, then `notes`, and `last` in bold.

    More runs than fit are counted.
    """
    width = max(MIN_WIDTH, width)
    lines = [Text(WAITING, "dim")] if not views else []
    if len(views) == 1:
        lines += _whole(views[0], width, ascii_only=ascii_only)
    elif views:
        lines += _table(views, width, max(3, height - 6), ascii_only=ascii_only)
    for note in notes:
        lines += _wrapped(note, width, "dim")
    lines += _wrapped(last, width, "bold") if last else []
    for line in lines:
        line.no_wrap = True
        if ascii_only:
            line.plain = line.plain.replace(" · ", ", ").encode("ascii", "replace").decode()
    return lines


def _whole(view: RunView, width: int, *, ascii_only: bool) -> list[Text]:
    """Return the lines of one run: its bar, its jobs and cost, its time and tokens, its failures, why it waits."""
    right = f"  {view.percent:>5}  {view.ended:,} of {view.status.jobs:,}"
    name = _name(view, min(MAX_NAME, width - len(right) - MIN_BAR - 2))
    bar = _bar(view, width - cell_len(name) - 2 - len(right), ascii_only=ascii_only)
    lines = [Text.assemble((name, "bold"), "  ", bar, right)]
    lines += _flowed([*view.counts, view.money], width)
    elapsed = "" if view.elapsed is None else f"elapsed {span(view.elapsed)}"
    lines += _flowed([view.rate, elapsed, view.rest, view.tokens], width)
    if view.errors:
        lines += _wrapped(f"failed attempts: {view.errors}", width, "dim")
    return lines + _reason(view, width)


def _table(views: Sequence[RunView], width: int, most: int, *, ascii_only: bool) -> list[Text]:
    """Return a line for each run, with the columns for which there is room."""
    shown = sorted(views, key=lambda one: (not one.status.inflight, one.status.finished))[:most]
    cells = [[one.percent, f"{one.ended:,}/{one.status.jobs:,}", *_columns(one)] for one in shown]
    names = [_name(one, width // 4) for one in shown]
    first = max(map(cell_len, names))
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while first + sum(size + 2 for size in sizes if size) + 2 + MIN_BAR > width and any(sizes[2:]):
        sizes[max(place for place, size in enumerate(sizes) if size)] = 0
    room = max(MIN_BAR, width - first - 2 - sum(size + 2 for size in sizes if size))
    lines = []
    for view, name, row in zip(shown, names, cells, strict=True):
        right = "".join(f"  {cell:>{size}}" for cell, size in zip(row, sizes, strict=True) if size)
        bar = _bar(view, room, ascii_only=ascii_only)
        lines += [Text.assemble((set_cell_size(name, first), "bold"), "  ", bar, right), *_reason(view, width)]
    if len(views) > most:
        lines.append(Text(f"and {len(views) - most} more runs", "dim"))
    return lines


def _columns(view: RunView) -> list[str]:
    """Return what a line of a table has besides the bar, the most important first."""
    failed = f"{view.status.failed:,} failed" if view.status.failed else ""
    return [failed, view.rest, view.rate, view.money]


def _name(view: RunView, most: int) -> str:
    name = printable(view.status.run)
    return name if cell_len(name) <= most else f"{set_cell_size(name, most - 1).rstrip()}…"


def _bar(view: RunView, size: int, *, ascii_only: bool) -> Text:
    one, bar, done, before = view.status, Text(), 0, 0
    styles = ASCII_BAR if ascii_only else BAR
    for count, (character, style) in zip((one.done, one.failed, one.inflight, one.jobs), styles, strict=True):
        done = min(one.jobs, done + count)
        end = size * done // max(1, one.jobs) if style != "dim" else size
        bar.append(character * (end - before), style)
        before = end
    return bar


def _reason(view: RunView, width: int) -> list[Text]:
    return [] if view.reason is None else _wrapped(view.reason, width, "yellow")


def _flowed(parts: Sequence[str], width: int) -> list[Text]:
    """Return parts as lines that begin below the name; no part is broken."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(f"  {part}")
    return [Text(line) for line in lines]


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    """Return a text of any origin as a few lines that begin below the name."""
    wrapped = Text(printable(text)).wrap(_PLAIN, width - 2)
    lines = [line.plain.rstrip() for line in wrapped[:NOTE_LINES]]
    if len(wrapped) > NOTE_LINES:
        lines[-1] = f"{lines[-1][: width - 3]}…"
    return [Text(f"  {line}", style) for line in lines]


_PLAIN = Console(width=80, color_system=None)


class Screen:
    """The view on a terminal: what is printed meanwhile appears above it. A terminal that is closed is drawn on no more."""

    def __init__(self, *, stderr: bool = True, stays: bool = False) -> None:
        self._console = Console(stderr=stderr, highlight=False)
        redirects = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(console=self._console, auto_refresh=False, transient=not stays, redirect_stdout=redirects)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        with suppress(OSError):  # the terminal may be closed before the work is done
            self._live.stop()

    def show(self, views: Sequence[RunView], notes: Iterable[str] = (), last: str = "") -> None:
        """Draw what is going on now."""
        width, height = self._console.size
        ascii_only = self._console.options.ascii_only
        lines = frame(views, width=width, height=height, notes=notes, last=last, ascii_only=ascii_only)
        with suppress(OSError):
            self._live.update(Text("\n").join(lines), refresh=True)
