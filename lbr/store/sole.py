"""The lock of a PostgreSQL queue's exclusive worker, which goes with its connection and is kept watch over."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from lbr.core.errors import AlreadyRunningError, DatabaseError, UsageError
from lbr.store.addresses import address_of
from lbr.store.postgres import SOLE_LOCK, arguments_of, check_driver, database_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lbr.core.types import PathOrUrl
    from lbr.store.addresses import Address

RETRY_SECONDS = 1.0
_TRY = "SELECT pg_try_advisory_lock($1, 0)"


class _Lock:
    """Holds the lock; when its connection is lost it is taken again, and where another was quicker, `lost` tells."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Any = None
        self._broken = asyncio.Event()
        self.lost = False

    async def take(self) -> bool:
        """Connect and try; tell whether the lock is ours. Raises DatabaseError."""
        import asyncpg  # noqa: PLC0415 - an extra

        with database_errors(self._address.shown, RETRY_SECONDS):
            try:
                self._connection = await asyncpg.connect(**arguments_of(self._address))
                self._broken.clear()
                self._connection.add_termination_listener(lambda _: self._broken.set())
                return bool(await self._connection.fetchval(_TRY, SOLE_LOCK))
            except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                raise DatabaseError(f"cannot use the database {self._address.shown}: {error}") from error

    async def watch(self, holder: asyncio.Task[Any]) -> None:
        """Take the lock again whenever its connection is lost; cancel its holder where somebody else has it."""
        while True:
            await self._broken.wait()
            try:
                self.lost = not await self.take()
            except DatabaseError:
                # The holder rides the outage out, or ends with it.
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if self.lost:
                holder.cancel()
                return

    def release(self) -> None:
        """Close the connection, and the lock with it."""
        if self._connection is not None:
            self._connection.terminate()


@asynccontextmanager
async def sole_worker(url: PathOrUrl) -> AsyncIterator[None]:
    """Hold the lock of the queue's exclusive worker, on whatever machine.

    Raises AlreadyRunningError where another has it, also when it was lost with its connection and another was
    quicker to take it: the body is then cancelled, and gives back what it holds.
    """
    check_driver()
    address = address_of(url)
    if address.pooled:
        raise UsageError(
            "expected a URL without pgbouncer=true for --exclusive, whose lock a transaction pooler would give "
            "to others; name the server itself"
        )
    lock = _Lock(address)
    taken = AlreadyRunningError(f"an exclusive worker of {address.shown} is running already; nothing to do")
    holder = asyncio.current_task()
    watching: asyncio.Task[None] | None = None
    try:
        if not await lock.take():
            raise taken
        if holder is not None:
            watching = asyncio.create_task(lock.watch(holder))
        try:
            yield
        except asyncio.CancelledError:
            if not lock.lost:
                raise
            raise taken from None
    finally:
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        lock.release()
