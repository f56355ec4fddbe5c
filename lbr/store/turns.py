"""A worker's whole turn at a database that lets one write at a time: settle what has ended, claim what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.store.settle import settle_within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbr.core.types import Claim, Settlement
    from lbr.store.claims import ClaimRequest
    from lbr.store.database import Connection, Database
    from lbr.store.queue import Queue
    from lbr.store.settle import Settled


async def settle_and_claim(
    database: Database, queue: Queue, batch: Sequence[Settlement], wish: ClaimRequest, *, lease: float
) -> tuple[Settled, list[Claim]]:
    """Do in one transaction what `settle` and `Queue.claim` do in two: the file is locked and written once.

    Only where one writes at a time: a claim locks what a settlement has locked in another order.
    """

    async def work(connection: Connection) -> tuple[Settled, list[Claim]]:
        settled = await settle_within(connection, database, batch)
        return settled, await queue.claim_within(connection, wish, lease=lease)

    return await database.write(work)
