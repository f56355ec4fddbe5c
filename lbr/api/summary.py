"""How runs ended, in at most five lines: answered, failed, cut off, tokens, cost and time, with what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.api.failures import groups_of, kinds_of, short
from lbr.api.status import paused_words, printable, status_of
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.pricing import NANOS, dollars
from lbr.core.text import duration, pluralize
from lbr.store import reads
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.api.failures import FailureGroup
    from lbr.api.status import RunStatus
    from lbr.core.types import PathOrUrl
    from lbr.store.database import Database
    from lbr.worker.calls import WorkReport

MAX_RUNS = 4


@dataclass(frozen=True, slots=True)
class Ending:
    """A run at the end of a command, and its failed jobs in groups, as far as they were read."""

    status: RunStatus
    groups: Sequence[FailureGroup] = ()

    def line(self, seconds: float | None = None) -> str:
        """Return what was answered, in how many seconds, and what it took."""
        one, left = self.status, self.status.pending + self.status.inflight
        more = (("reused", one.reused), ("cancelled", one.cancelled), ("unfinished", left))
        counts = [f"{one.done} of {pluralize(one.jobs, 'job')} done", *(f"{n} {word}" for word, n in more if n)]
        took = "" if seconds is None else f" in {duration(seconds)}"
        used = [one.tokens] * bool(one.input_tokens or one.output_tokens)
        used += [] if one.cost_usd is None else [f"cost {dollars(round(one.cost_usd * NANOS))}"]
        return printable("; ".join([f"run {one.run}: {', '.join(counts)}{took}", *[", ".join(used)] * bool(used)]))

    def problems(self, cut_off: int = 0, *, limited: bool = False) -> list[str]:
        """Return lines with what failed, was cut off or paused, and what to do; see `cut_off_words`."""
        one, lines = self.status, []
        if one.failed:
            often = ": " if len(self.groups) == 1 else ", most often: "
            why = f" ({kinds_of(self.groups)}){often}{short(self.groups[0].message)}" if self.groups else ""
            way = f"`lbr failures {one.run}` shows why, `lbr retry {one.run}` puts them back"
            lines.append(f"{one.failed} failed{why}; {way}")
        if cut_off:
            lines.append(cut_off_words(one.run, cut_off, limited=limited))
        if one.pause is not None and not one.finished:
            lines.append(f"run {one.run} is paused: {paused_words(one.run, one.pause)}")
        return [printable(line) for line in lines]

    def all_in_one(self, seconds: float | None = None) -> str:
        """Return one line."""
        return "; ".join([self.line(seconds), *self.problems()])


def cut_off_words(run: str, count: int, *, limited: bool) -> str:
    """Return what to do about answers that reached a token limit; `limited` is True if the settings set it."""
    answers, command = f"{pluralize(count, 'answer')} cut off", f"lbr retry {run} --where finish_reason=length"
    if limited:
        return f"{answers} at max_tokens; to redo: `{command} --set max_tokens=NUMBER`"
    advice = "ask for shorter answers or use another model, or redo"
    return f"{answers} at the token limit of the model; {advice}: `{command}`"


async def ending_of(database: Database, run: str, *, with_failures: bool = True) -> Ending:
    """Return how a run stands; with its failed jobs in groups, unless that is not asked for."""
    (now,) = status_of(await database.quick_read(reads.overview, run)).runs
    if not (now.failed and with_failures):
        return Ending(now)
    return Ending(now, await groups_of(database, await database.quick_read(reads.find_run, run)))


async def run_ending(run: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False) -> Ending:
    """Return how a run stands."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await ending_of(database, run)


async def work_lines(
    report: WorkReport, seconds: float, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> list[tuple[str, bool]]:
    """Return lines about the runs of a worker that has ended, and whether each is a problem; those with one first."""
    names = [*dict.fromkeys([*report.paused, *report.by_run])]
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        ends = [await ending_of(database, name, with_failures=report.failed > 0) for name in names]
    if len(ends) == 1:
        problems = ends[0].problems(report.cut_off[names[0]], limited=names[0] in report.limited)
        return [(ends[0].line(seconds), False), *((line, True) for line in problems)]
    ends.sort(key=lambda one: (one.status.pause is None, -one.status.failed, one.status.run))
    lines = [(one.all_in_one(), bool(one.problems())) for one in ends]
    more = len(lines) - MAX_RUNS + 1
    return lines if more <= 1 else [*lines[: MAX_RUNS - 1], (f"and {more} more runs; `lbr list` shows them", False)]
