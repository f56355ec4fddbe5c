"""One worker's turns at the database: each settles the calls that have ended, and claims jobs for the free slots."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lbr.core.errors import DatabaseBusyError, DatabaseError
from lbr.core.types import RunId, WorkerId
from lbr.store.claim import ClaimRequest, claim, settle_and_claim
from lbr.store.settle import settle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lbr.core.types import Claim, Settlement
    from lbr.store.database import Database
    from lbr.store.settle import Settled
    from lbr.worker.runs import ServedRun

MAX_ROWS = 500
MAX_SERVER_ROWS = 1_000
"""How many calls a turn settles. On a server a turn is a dozen round trips, and no other writer waits for its end."""
MAX_LINGER_SECONDS = 0.05
LATEST_TURNS = 4


def pace(turn_seconds: float, call_seconds: float, held: int, most: int = MAX_ROWS) -> tuple[int, float]:
    """Return how many ended calls are worth a turn, and for how many seconds to wait for so many.

    A turn takes `turn_seconds`, a call `call_seconds`, and `held` are the slots in use. A quarter of them: calls that
    begin together end together, and would stay in step, so that either all call or all are written. More if turns are
    slow, as many as end meanwhile, up to `most`. The wait leaves other writers three quarters of the time, or is a
    fiftieth of a call, so that calls that end one by one share a commit.
    """
    ending = turn_seconds / (turn_seconds + call_seconds) if call_seconds else 1.0
    rows = round(held * max(1 / 4, ending))
    return min(most, max(1, rows)), min(MAX_LINGER_SECONDS, max(3 * turn_seconds, call_seconds / 50))


class Turns:
    """Settles and claims for one worker.

    `more` is True if the last claim filled all its slots, so that another will probably find jobs; `throttled` if a
    model is limited to fewer calls than there are slots, so that each call that ends makes room for another. `claims`
    are those not yet taken over.
    """

    def __init__(self, database: Database, served: Mapping[RunId, ServedRun], *, lease: float) -> None:
        self._database = database
        self._served = served
        self._lease = lease
        self._order: deque[RunId] = deque()
        self._latest = deque([0.0], maxlen=LATEST_TURNS)
        self.worker = WorkerId(0)
        self.more = True
        self.throttled = False
        self.claims: list[Claim] = []
        self.claiming_since: float | None = None
        """When the claim began that is under way, None if none is."""

    @property
    def order(self) -> list[RunId]:
        """The runs to claim jobs of, in the order of the next claim."""
        return list(self._order)

    def serve(self, run_ids: Iterable[RunId]) -> None:
        """Claim jobs of these runs from now on; runs that were served before keep their order."""
        served = list(run_ids)
        known = [run_id for run_id in self._order if run_id in served]
        self._order = deque(dict.fromkeys(known + served))

    def pace(self, ended: Sequence[Settlement], held: int) -> tuple[int, float]:
        """Return how many ended calls are worth a turn, and for how many seconds to wait for so many."""
        # One slow turn may be due to our own calls in the interpreter. If calls compute in threads, every other one is.
        usual = sorted(self._latest)[len(self._latest) // 2]
        # The quickest call counts: others may have waited for the processor.
        quickest = min([settlement.outcome.latency_ms for settlement in ended]) / 1000
        return pace(usual, quickest, held, MAX_ROWS if self._database.one_writer else MAX_SERVER_ROWS)

    def take_claims(self) -> list[Claim]:
        """Return what was claimed since the last call."""
        claims, self.claims = self.claims, []
        return claims

    async def claim(self, most: int, *, suspects: bool = False) -> None:
        """Claim up to `most` jobs; with `suspects`, jobs that crashed their workers and must run alone."""
        with self._claiming():
            found = await self._database.write(claim, self._request(most, suspects=suspects))
            self.claims += found if suspects else self._noted(found, most)

    @contextmanager
    def _claiming(self) -> Iterator[None]:
        self.claiming_since = time.monotonic()
        try:
            yield
        finally:
            self.claiming_since = None

    def lose(self, claim: Claim) -> None:
        """Do not call for a job that is not ours any more."""
        self.claims = [one for one in self.claims if (one.job_id, one.claim_seq) != (claim.job_id, claim.claim_seq)]

    async def settle(self, batch: Sequence[Settlement], free: int, freed: int) -> Settled:
        """Settle a batch and claim for the `free` slots; on a file, for those `freed` by it too.

        Raises DatabaseError, with nothing of the batch written.
        """
        most = free + (freed if self._database.one_writer else 0)
        started = time.perf_counter()
        if most <= 0:
            settled = await self._database.write(settle, batch)
        elif self._database.one_writer:
            settled = await self._settle_and_claim(batch, most)
        else:
            # One transaction could wait for another in a circle: a claim locks limits, then jobs; a settlement the
            # other way round. Together they take no longer than one.
            claiming = asyncio.create_task(self.claim(most))
            try:
                settled = await self._database.write(settle, batch)
            finally:
                # The next claim reports what is wrong.
                await asyncio.gather(claiming, return_exceptions=True)
        self._latest.append(time.perf_counter() - started)
        return settled

    async def _settle_and_claim(self, batch: Sequence[Settlement], most: int) -> Settled:
        request = self._request(most, suspects=False)
        with self._claiming():
            try:
                settled, claims = await self._database.write(settle_and_claim, batch, request)
            except DatabaseBusyError:
                raise
            except DatabaseError:
                # A row that cannot be claimed must not keep paid answers out; the next claim reports it.
                return await self._database.write(settle, batch)
            self.claims += self._noted(claims, most)
        return settled

    def _request(self, most: int, *, suspects: bool) -> ClaimRequest:
        if not suspects:
            self._order.rotate(-1)
        served = {run_id: self._served[run_id] for run_id in self._order}
        extra = {run_id: one.extra_tokens for run_id, one in served.items()}
        bounds = {run_id: bound for run_id, one in served.items() if (bound := one.bound) is not None}
        return ClaimRequest(self.worker, self.order, most, self._lease, suspects, extra, bounds)

    def _noted(self, claims: list[Claim], most: int) -> list[Claim]:
        self.more = len(claims) == most
        self.throttled = any(claim.throttled for claim in claims) or (self.throttled and not claims)
        return claims
