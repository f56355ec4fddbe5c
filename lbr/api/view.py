"""What is going on in runs at one moment, as plain data and as a line; `lbr.api.draw` draws it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lbr.api.batches import look
from lbr.api.status import batch_words, paused_words, printable
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import Family, LbrError
from lbr.core.text import duration, pluralize
from lbr.core.types import RunState
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from lbr.api.status import RunStatus, Status
    from lbr.core.types import Json, PathOrUrl

RATE_SECONDS = 60.0
"""A rate is that of the latest looks, over this time."""
CUT_AT = 120
"""How much of another program's message a view shows."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment: `per_minute` are answers, `elapsed` and `left` seconds, and `reason` is why it waits.

    All of them are None if they are not known, `reason` if it does not wait.
    """

    status: RunStatus
    per_minute: float | None
    elapsed: float | None
    left: float | None
    reason: str | None

    @property
    def ended(self) -> int:
        """How many jobs have ended."""
        return self.status.done + self.status.failed + self.status.cancelled

    @property
    def is_over(self) -> bool:
        """Whether no job is left that anybody will answer."""
        return self.status.finished or self.status.state == RunState.CANCELLED

    @property
    def percent(self) -> str:
        """The share of jobs that have ended."""
        return f"{100 * self.ended // max(1, self.status.jobs)} %"

    @property
    def counts(self) -> list[str]:
        """The jobs by what became of them."""
        one = self.status
        more = (
            (one.failed, "failed"),
            (one.cancelled, "cancelled"),
            (one.retrying, "retrying"),
            (one.inflight, "in flight"),
            (one.at_provider, "at the provider"),
        )
        return [f"{one.done:,} done", *(f"{count:,} {word}" for count, word in more if count)]

    @property
    def rate(self) -> str:
        """The answers per minute; empty if they are not known."""
        if self.per_minute is None:
            return ""
        return f"{self.per_minute:,.0f}/min" if self.per_minute >= 10 else f"{self.per_minute:.1f}/min"

    @property
    def rest(self) -> str:
        """The time until the end; empty if it is not known."""
        return "" if self.left is None else f"{span(self.left)} left"

    @property
    def tokens(self) -> str:
        """The tokens so far; empty if there are none."""
        read, written = self.status.input_tokens, self.status.output_tokens
        return f"tokens {short(read)} in, {short(written)} out" if read or written else ""

    @property
    def money(self) -> str:
        """The cost so far and what it may be; empty if neither is known."""
        cost, most = self.status.cost_usd, self.status.max_cost_usd
        spent = "" if cost is None and most is None else money(cost or 0.0)
        return spent if most is None else f"{spent} of {money(most)}"

    @property
    def errors(self) -> str:
        """The failed attempts, counted by kind; empty without one."""
        kinds = sorted(self.status.errors.items(), key=lambda one: -one[1])
        return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds)

    @property
    def line(self) -> str:
        """All of it in one line, safe for a terminal."""
        counts = [f"{self.ended:,} of {self.status.jobs:,} ({self.percent})", *self.counts[1:]]
        parts = [part for part in (*counts, self.rate, self.rest, self.money) if part]
        reason = "" if self.reason is None else f"; {self.reason}"
        return printable(f"{self.status.run}: {', '.join(parts)}{reason}")


@dataclass(slots=True)
class Watch:
    """Makes views of what is seen now and then: with the time since it began, and the rate over the last minute.

    A run's own counters give its rate, so other runs of the same workers do not count. `at_work` is True if this process works on the runs.
    """

    at_work: bool = True
    started: float = field(default_factory=time.monotonic)
    _seen: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def views(self, status: Status) -> list[RunView]:
        """Return what is going on in each run now."""
        return [self.view(status, one, time.monotonic(), time.time()) for one in status.runs]

    def view(self, status: Status, run: RunStatus, clock: float, now: float) -> RunView:
        """Return what is going on in one of the runs; `clock` only runs on, `now` is the time of day, both in seconds."""
        rate, left = self._rate(run, clock), None
        per_minute = run.per_minute if rate is None else rate
        reason = reason_of(status, run, now, at_work=self.at_work)
        is_away = any(one["answerer"] == run.answerer for one in status.outages)
        if per_minute and run.state == RunState.ACTIVE and not is_away and not run.at_provider:
            left = 60 * (run.pending + run.inflight) / per_minute
        elapsed = clock - self.started if self.at_work else run.elapsed_seconds
        return RunView(run, per_minute, elapsed, left or None, reason)

    def _rate(self, run: RunStatus, clock: float) -> float | None:
        """Return the answers per minute; None without an answer in this time. It counts from the look before the first."""
        looks = self._seen.setdefault(run.run, deque())
        looks.append((clock, run.done + run.failed - run.reused))
        while len(looks) > 2 and clock - looks[0][0] > RATE_SECONDS:
            looks.popleft()
        then, before = looks[0]
        answered = looks[-1][1] - before
        if answered > 0:
            return 60 * answered / (clock - then) if run.done > run.reused else None
        self._seen[run.run] = deque([looks[-1]])
        return None


def reason_of(status: Status, run: RunStatus, now: float, *, at_work: bool = False) -> str | None:
    """Return why a run waits and what ends that; None if it does not wait. `now` is the time of day in seconds."""
    if run.pause is not None and not run.finished:
        return f"paused: {paused_words(run.run, run.pause)}"
    if run.finished or run.state != RunState.ACTIVE:
        return None
    if (away := _of(status.outages, run)) is not None:
        since = time.strftime("%H:%M", time.localtime(now - away["seconds"]))
        probe = away["probe_seconds"]
        then = f"next try in {span(probe)}" if probe else "trying now"
        return f"{run.answerer} unreachable since {since} ({_cut(away['reason'])}), {then}"
    limit = _of(status.limits, run) or {}
    held = f"{limit.get('at_a_time')} of {limit.get('slots')} at a time" if _is_throttled(limit) else ""
    if (cooling := _of(status.cooldowns, run)) is not None:
        wait = f"rate limited, next call in {span(cooling['seconds'])}"
        return f"{wait}, {held}" if held else f"{wait} ({_cut(cooling['reason'])})"
    if not run.pending:
        return None if run.inflight else "waiting for its other inputs: if no enqueue is running, repeat it"
    if held:
        return f"rate limited, {held}" if Family.RATE_LIMITED in run.errors else f"starting slowly, {held}"
    if run.inflight:
        return _limited(limit)
    return _idle(status, run, at_work=at_work) or _limited(limit)


def _idle(status: Status, run: RunStatus, *, at_work: bool) -> str | None:
    """Return why none of a run's pending jobs is called; None if nothing is known of that."""
    if run.at_provider == run.pending:
        return batch_words(status, run)
    if not at_work and not status.workers:
        return "no worker is running; `lbr worker` starts one"
    if run.retrying == run.pending:
        return f"waiting to try {pluralize(run.retrying, 'failed call')} again"
    return None


def _limited(limit: dict[str, Json]) -> str | None:
    """Return which limit of the user holds calls back, perhaps."""
    words = (("rpm", "requests a minute"), ("tpm", "tokens a minute"), ("concurrency", "at a time"))
    limits = [f"{limit[name]:,} {word}" for name, word in words if limit.get(name) is not None]
    return f"limited to {', '.join(limits)}" if limits else None


def _of(rows: Sequence[dict[str, Json]], run: RunStatus) -> dict[str, Json] | None:
    return next((one for one in rows if one["answerer"] == run.answerer), None)


def _is_throttled(limit: dict[str, Json]) -> bool:
    return bool(limit) and limit["at_a_time"] is not None and bool(limit["at_a_time"] < limit["slots"])


def _cut(text: str) -> str:
    return text if len(text) <= CUT_AT else f"{text[:CUT_AT]}…"


def span(seconds: float) -> str:
    """Return a time span in whole seconds: `4 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else duration(whole)


def short(count: int) -> str:
    """Return a large count in four characters or so: `950`, `12.3k`, `4.1M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}" if count < 100 * size else f"{count // size}{letter}"
    return str(count)


def money(amount: float) -> str:
    """Return dollars with cents, or with two digits that are not 0."""
    if amount >= 0.1 or not amount:
        return f"${amount:,.2f}"
    text = f"{amount:.9f}".rstrip("0")
    zeros = len(text) - len(text[2:].lstrip("0")) - 2
    return f"${amount:.{min(9, zeros + 2)}f}".rstrip("0")


def is_terminal(*, stderr: bool = True) -> bool:
    """Return whether stderr, or stdout, is a terminal that can be drawn on."""
    try:
        return (sys.stderr if stderr else sys.stdout).isatty() and os.environ.get("TERM", "dumb").lower() not in {
            "dumb",
            "unknown",
        }
    except (AttributeError, ValueError):  # it is None or closed
        return False


async def follow(
    names: Collection[str],
    *,
    seconds: float,
    at_work: bool = True,
    db_url: PathOrUrl = DB_URL_DEFAULT,
    allow_network_fs: bool = False,
) -> AsyncIterator[tuple[list[RunView], Status]]:
    """Yield views every `seconds`: of the named runs, or of all that have work to do and those that have ended since.

    With `at_work`, runs that were paused before are left out unless they are named. A look that fails is left out: the work itself reports what is wrong.
    """
    watch, known = Watch(at_work), set(names)
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        while True:
            seen: Status | None = None
            with suppress(LbrError):
                seen = await look(database, known)
            if seen is not None:
                if not names:
                    known.update(one.run for one in seen.runs if one.state == RunState.ACTIVE or not at_work)
                yield [one for one in watch.views(seen) if one.status.run in known], seen
            await asyncio.sleep(seconds)
