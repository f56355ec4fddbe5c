"""What a worker claims: jobs for its free slots, alone or in the transaction that settles those which became free."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from lbr.core.errors import DatabaseBusyError, DatabaseError
from lbr.core.types import RunId, WorkerId
from lbr.store.claims import ClaimRequest
from lbr.store.settle import settle
from lbr.store.turns import settle_and_claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from lbr.core.limits import CallBound
    from lbr.core.types import Claim, Settlement
    from lbr.store.database import Database
    from lbr.store.queue import Queue
    from lbr.store.settle import Settled
    from lbr.worker.runs import ServedRun


class Claiming:
    """Claims for one worker, by turns, so that no slot is claimed for twice.

    `more` tells whether the last claim filled every slot that it was for, so that another is likely to find more.
    """

    def __init__(
        self, database: Database, queue: Queue, served: Mapping[RunId, ServedRun], *, lease: float
    ) -> None:
        self._database = database
        self._queue = queue
        self._served = served
        self._lease = lease
        self._order: deque[RunId] = deque()
        self.worker = WorkerId(0)
        self.more = True
        self._turn = asyncio.Lock()
        self._wanted = False
        # Whether a call has ended since the last claim, and whether its answerer was held to few at a time.
        self._ended = False
        self._narrow = False
        self._brought: list[Claim] = []
        self._asked = False

    @property
    def order(self) -> list[RunId]:
        """The runs that jobs are claimed of, in the order of the next claim."""
        return list(self._order)

    def serve(self, run_ids: Iterable[RunId]) -> None:
        """Claim of these runs from now on; those that were served before keep their turns."""
        served = list(run_ids)
        known = [run_id for run_id in self._order if run_id in served]
        self._order = deque(known + [run_id for run_id in served if run_id not in known])

    def worth_it(self) -> bool:
        """Tell whether a claim is likely to find something, without a look at the database."""
        # Where an answerer is held to fewer calls than there are slots, one that ended makes room for another.
        ended, self._ended = self._ended, False
        return self.more or (ended and self._narrow)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let no settlement claim meanwhile; wait for one that does."""
        self._wanted = True
        try:
            async with self._turn:
                yield
        finally:
            self._wanted = False

    async def claim(self, most: int) -> list[Claim]:
        """Claim up to `most` jobs, `alone`."""
        self._order.rotate(-1)
        claims = await self._queue.claim(
            self.worker, self.order, most, lease=self._lease, extra=self._extra(), bounds=self._bounds()
        )
        return self._noted(claims, most)

    async def claim_suspect(self) -> list[Claim]:
        """Claim, `alone`, one job that has crashed its workers and must run alone."""
        return await self._queue.claim(
            self.worker,
            self.order,
            1,
            lease=self._lease,
            suspects=True,
            extra=self._extra(),
            bounds=self._bounds(),
        )

    async def settle(self, batch: Sequence[Settlement], free: int) -> Settled:
        """Settle a batch and, where that costs no lock, claim for the `free` slots that there are then.

        `brought` has what was claimed. Raises as `lbr.store.settle.settle`.
        """
        likely = free > 0 and (self.more or self._narrow)
        # It never queues for its turn, for `free` holds now.
        if not likely or self._wanted or not self._database.one_writer:
            return await settle(self._database, batch)
        async with self._turn:
            self._order.rotate(-1)
            wish = ClaimRequest(
                self.worker, self.order, free, suspects=False, extra=self._extra(), bounds=self._bounds()
            )
            try:
                settled, claims = await settle_and_claim(
                    self._database, self._queue, batch, wish, lease=self._lease
                )
            except DatabaseBusyError:
                raise
            except DatabaseError:
                # A row that cannot be claimed must not keep answers out that are paid for; the next claim tells.
                return await settle(self._database, batch)
            self._brought += self._noted(claims, free)
            self._asked = True
        return settled

    def brought(self) -> list[Claim]:
        """Return what settlements have brought since the last time."""
        brought, self._brought = self._brought, []
        return brought

    def ended(self) -> None:
        """Hear that a slot became free, for which nothing may have been claimed yet."""
        self._ended |= not self._asked
        self._asked = False

    def _extra(self) -> dict[RunId, int]:
        return {run_id: self._served[run_id].extra_tokens for run_id in self._order}

    def _bounds(self) -> dict[RunId, CallBound]:
        bounds = ((run_id, self._served[run_id].bound) for run_id in self._order)
        return {run_id: bound for run_id, bound in bounds if bound is not None}

    def _noted(self, claims: list[Claim], most: int) -> list[Claim]:
        self.more = len(claims) == most
        self._narrow = any(claim.throttled for claim in claims) or (self._narrow and not claims)
        return claims
