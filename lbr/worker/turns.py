"""One worker's turns at the database: group commit of ended calls, and claims for the slots that they free."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from lbr.core.errors import DatabaseBusyError, DatabaseError
from lbr.core.types import RunId, WorkerId
from lbr.store.claim import ClaimRequest, claim, settle_and_claim
from lbr.store.settle import settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from lbr.core.types import Claim, Settlement
    from lbr.store.database import Database
    from lbr.store.settle import Settled
    from lbr.worker.runs import ServedRun

MAX_ROWS = 500
MIN_ROWS = 25
LATEST_COMMITS = 4
MAX_LINGER_SECONDS = 0.05
MIN_LINGER_SECONDS = 0.002
"""The event loop rounds waits up to a millisecond."""
COMMIT_SECONDS = 0.003
ROW_SECONDS = 0.000025
"""The most that an undisturbed commit takes, and each of its rows, on a common machine."""


class Commit(NamedTuple):
    """How long a commit took, and how many rows it had."""

    seconds: float
    rows: int

    @property
    def hindered_seconds(self) -> float:
        """How much longer it took than its rows: on a slow disk, or because others write."""
        return max(0.0, self.seconds - COMMIT_SECONDS - self.rows * ROW_SECONDS)


def usual_commit(latest: Sequence[Commit]) -> Commit:
    """Return the commit to expect next: the median by how much they were hindered.

    One slow commit may be due to our own calls in the interpreter. But if calls compute in threads, every other commit
    waits for them with the database locked, and then many rows at once are better.
    """
    return sorted(latest, key=lambda commit: commit.hindered_seconds)[len(latest) // 2]


def linger_seconds(usual: Commit, call_seconds: float) -> float:
    """Return how long to gather rows, given the usual commit and how long a call takes: at most 50 ms.

    Three times as long as commits are hindered, so that other writers get their turns; else a fiftieth of a call, so
    that calls that end one by one share a commit; nothing for calls that are too quick for the event loop's clock.
    """
    part = call_seconds / 50
    return min(MAX_LINGER_SECONDS, max(3 * usual.hindered_seconds, part if part >= MIN_LINGER_SECONDS else 0.0))


def batch_size(usual: Commit, call_seconds: float) -> int:
    """Return how many rows to write at once, given the usual commit and how long a call takes.

    Calls that begin together end together, and would stay in step: either all call or all are written. Small batches
    prevent that if a call takes longer than a commit. The more a commit is hindered, the more rows it is worth.
    """
    if call_seconds <= usual.seconds:
        return MAX_ROWS
    return min(MAX_ROWS, MIN_ROWS + round(usual.hindered_seconds / ROW_SECONDS))


class Settler:
    """Group commit: takes settlements one by one and writes them in batches, in order, from one task."""

    def __init__(
        self,
        write: Callable[[Sequence[Settlement]], Awaitable[Settled]],
        written: Callable[[Sequence[Settlement], Settled], None],
    ) -> None:
        self._write = write
        self._written = written
        self.unwritten: list[Settlement] = []
        """What was put and is not durable."""
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._most = MAX_ROWS
        self._hurried = False
        self._closing = False
        self._commits = deque([Commit(0.0, 0)], maxlen=LATEST_COMMITS)

    def put(self, settlement: Settlement) -> None:
        """Take one settlement; it is durable only when `written` gets it."""
        self.unwritten.append(settlement)
        self._some.set()
        if len(self.unwritten) >= self._most:
            self._enough.set()

    def hurry(self) -> None:
        """Write all that was put, now, because no more will come for a while."""
        self._hurried = bool(self.unwritten)
        self._enough.set()

    def close(self) -> None:
        """Make `run` return once everything is written."""
        self._closing = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Write batches until closed. Raises DatabaseError, with nothing of the batch written."""
        while True:
            await self._some.wait()
            if not self.unwritten:
                return
            await self._gather(usual_commit(self._commits))
            batch, self.unwritten = self.unwritten[: self._most], self.unwritten[self._most :]
            if not self.unwritten:
                self._hurried = False
                if not self._closing:
                    self._some.clear()
            started = time.perf_counter()
            try:
                settled = await self._write(batch)
            except BaseException:
                self.unwritten = [*batch, *self.unwritten]
                raise
            self._commits.append(Commit(time.perf_counter() - started, len(batch)))
            self._written(batch, settled)

    async def _gather(self, usual: Commit) -> None:
        """Wait for as many rows as are worth a commit, at least for those of the same turn of the event loop."""
        call_seconds = self._call_seconds()
        self._most = batch_size(usual, call_seconds)
        if self._closing or self._hurried or len(self.unwritten) >= self._most:
            return
        if linger := linger_seconds(usual, call_seconds):
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(linger):
                    await self._enough.wait()
        else:
            await asyncio.sleep(0)
        self._most = batch_size(usual, self._call_seconds())

    def _call_seconds(self) -> float:
        # The quickest call: others may have waited for the processor.
        return min(settlement.outcome.latency_ms for settlement in self.unwritten) / 1000


class Claimer:
    """Claims for one worker, one claim at a time, so that no slot is claimed for twice.

    `more` is True if the last claim filled all its slots, so that another will probably find jobs; `freed` if a slot
    has become free since.
    """

    def __init__(self, database: Database, served: Mapping[RunId, ServedRun], *, lease: float) -> None:
        self._database = database
        self._served = served
        self._lease = lease
        self._order: deque[RunId] = deque()
        self._turn = asyncio.Lock()
        self._wanted = False
        self._throttled = False
        self._claimed: list[Claim] = []
        self.freed = False
        self.worker = WorkerId(0)
        self.more = True

    @property
    def order(self) -> list[RunId]:
        """The runs to claim jobs of, in the order of the next claim."""
        return list(self._order)

    def serve(self, run_ids: Iterable[RunId]) -> None:
        """Claim jobs of these runs from now on; runs that were served before keep their order."""
        served = list(run_ids)
        known = [run_id for run_id in self._order if run_id in served]
        self._order = deque(dict.fromkeys(known + served))

    def is_likely(self) -> bool:
        """Return whether a claim will probably find something, without asking the database."""
        # If a model is throttled to fewer calls than there are slots, each call that ends makes room for another.
        freed, self.freed = self.freed, False
        return self.more or (freed and self._throttled)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep settlements from claiming meanwhile; wait for one that does."""
        self._wanted = True
        try:
            async with self._turn:
                yield
        finally:
            self._wanted = False

    async def claim(self, most: int, *, suspects: bool = False) -> list[Claim]:
        """Claim up to `most` jobs, `alone`; with `suspects`, jobs that crashed their workers and must run alone."""
        if not suspects:
            self._order.rotate(-1)
        claims = await self._database.write(claim, self._request(most, suspects=suspects))
        return claims if suspects else self._noted(claims, most)

    async def settle(self, batch: Sequence[Settlement], free: int) -> Settled:
        """Settle a batch and, if the database has one writer, claim for the slots that will be `free`.

        `take_claimed` returns those claims. Raises like `lbr.store.settle.settle`.
        """
        likely = free > 0 and (self.more or self._throttled)
        # It never waits for its turn, because `free` may change meanwhile.
        if not likely or self._wanted or not self._database.one_writer:
            return await self._database.write(settle, batch)
        async with self._turn:
            self._order.rotate(-1)
            request = self._request(free, suspects=False)
            try:
                settled, claims = await self._database.write(settle_and_claim, batch, request)
            except DatabaseBusyError:
                raise
            except DatabaseError:
                # A row that cannot be claimed must not keep paid answers out; the next claim reports it.
                return await self._database.write(settle, batch)
            self._claimed += self._noted(claims, free)
            return settled

    def take_claimed(self) -> list[Claim]:
        """Return what settlements have claimed since the last call."""
        claimed, self._claimed = self._claimed, []
        return claimed

    def _request(self, most: int, *, suspects: bool) -> ClaimRequest:
        served = {run_id: self._served[run_id] for run_id in self._order}
        extra = {run_id: one.extra_tokens for run_id, one in served.items()}
        bounds = {run_id: bound for run_id, one in served.items() if (bound := one.bound) is not None}
        return ClaimRequest(self.worker, self.order, most, self._lease, suspects, extra, bounds)

    def _noted(self, claims: list[Claim], most: int) -> list[Claim]:
        self.more = len(claims) == most
        self._throttled = any(claim.throttled for claim in claims) or (self._throttled and not claims)
        return claims
