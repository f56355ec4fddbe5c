"""What may break at any moment of an operation breaks at each of them: the connection, the server, the caller's patience."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from lbr.store.database import open_database
from tests.proofs.kill_points import LATER, OPERATIONS, Fuse, enqueue
from tests.proofs.test_kill_points import BEFORE_AND_AFTER, FEWEST, finish, named, set_limits
from tests.support import assert_counted, postgres, real_clock, states

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from lbr.store.database import Database
    from tests.support.proxy import Proxy


@pytest.fixture(scope="module")
def crashing_server() -> Iterator[postgres.Server]:
    """Return a running PostgreSQL that all these tests may crash."""
    with postgres.Server() as server:
        yield server


async def break_at(url: str, operation: str, length: int, trouble: Callable[[], object]) -> bool:
    """Do an operation with trouble before one of its statements; it must be done all the same, once.

    False where it has not so many statements.
    """
    name = f"{operation} {length}"
    database = await open_database(url, create=True)
    await set_limits(database)
    if operation != "enqueue":
        await enqueue(database, name)
    act = await OPERATIONS[operation](database, name)
    actor = await open_database(url, clock=real_clock(LATER)) if operation == "reclaim" else database
    fuse = Fuse(length, trouble)
    fuse.light()
    try:
        await act(actor)
    finally:
        fuse.douse()
    run = await named(database, name)
    assert run is not None
    assert await states(database, run) == BEFORE_AND_AFTER[operation][-1], length
    await assert_counted(database, run)
    later = await open_database(url, clock=real_clock(2 * LATER))
    await finish(later, name)
    await later.close()
    if actor is not database:
        await actor.close()
    await database.close()
    return fuse.blown


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_connection_that_breaks_at_any_statement_is_ridden_out(proxy: Proxy, operation: str) -> None:
    """Whatever statement the connection breaks before, the operation is done in the end, and done once."""
    length = 0
    while await break_at(proxy.url, operation, length, proxy.cut):
        length += 1
    assert length >= FEWEST


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_server_that_restarts_at_any_statement_is_ridden_out(
    crashing_server: postgres.Server, operation: str
) -> None:
    """So it is when the server crashes and comes back there."""
    url = postgres.create_database(crashing_server.url())
    length = 0
    while await break_at(url, operation, length, lambda: crashing_server.restart("immediate")):
        length += 1
    assert length >= FEWEST


class CancelledAt:
    """Awaits a coroutine, and cancels its own task when that awaits something for the so-manieth time."""

    def __init__(self, work: Awaitable[object], number: int) -> None:
        self._steps = work.__await__()
        self._number = number
        self.cancelled = False

    def __await__(self) -> Generator[Any, Any, object]:
        """Pass on what the work waits for."""
        sent: Any = None
        thrown: BaseException | None = None
        while True:
            try:
                waits_for = self._steps.throw(thrown) if thrown else self._steps.send(sent)
            except StopIteration as end:
                return end.value
            if self._number == 0:
                task = asyncio.current_task()
                assert task is not None
                self.cancelled = task.cancel()
            self._number -= 1
            thrown = None
            try:
                sent = yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is the work's to deal with
                thrown = error


async def cancel_at(url: str, database: Database, operation: str, number: int) -> dict[str, int] | None:
    """Do an operation that is cancelled at one of its awaits, and what comes after it.

    Returns how the jobs stood in between, None where it has not so many awaits.
    """
    name = f"{operation} {number}"
    if operation != "enqueue":
        await enqueue(database, name)
    act = await OPERATIONS[operation](database, name)
    later = await open_database(url, clock=real_clock(LATER))
    actor = later if operation == "reclaim" else database
    waiting = CancelledAt(act(actor), number)

    async def do() -> None:
        await waiting

    with suppress(asyncio.CancelledError):
        await asyncio.create_task(do())
    found = await named(database, name)
    there = {} if found is None else await states(database, found)
    assert there in BEFORE_AND_AFTER[operation], (number, there)
    # The same connections go on: none of them is left in the middle of something.
    await enqueue(actor, f"{name}, another")
    await later.close()
    last = await open_database(url, clock=real_clock(2 * LATER))
    await assert_counted(last, await finish(last, name))
    await last.close()
    return there if waiting.cancelled else None


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_cancellation_at_any_await_leaves_all_or_nothing(db_url: str, operation: str) -> None:
    """Whatever it waits for when it is cancelled, the operation is there or is not, and the queue goes on."""
    database = await open_database(db_url, create=True)
    await set_limits(database)
    number = 0
    while await cancel_at(db_url, database, operation, number) is not None:
        number += 1
    assert number >= 1
    await database.close()
