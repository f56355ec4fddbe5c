"""What may break at any moment of an operation breaks at each of them: the connection, the server, the caller's patience."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from lbr.store.engines import open_database
from tests.kill_points import LATER, OPERATIONS, Fuse, enqueue
from tests.support import assert_counted, real_clock, states
from tests.test_kill_points import BEFORE_AND_AFTER, finish, named, set_limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from tests import postgres
    from tests.proxy import Proxy


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
    assert length >= 3


@pytest.mark.parametrize("operation", ["claim", "settle"])
async def test_a_server_that_restarts_at_any_statement_is_ridden_out(
    own_server: postgres.Server, operation: str
) -> None:
    """So it is when the server crashes and comes back there."""
    length = 0
    while await break_at(own_server.url(), operation, length, lambda: own_server.restart("immediate")):
        length += 1
    assert length >= 5


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


@pytest.mark.parametrize("operation", ["claim", "settle", "redo"])
async def test_a_cancellation_at_any_await_leaves_all_or_nothing(db_url: str, operation: str) -> None:
    """Whatever it waits for when it is cancelled, the operation is there or is not, and the queue goes on."""
    database = await open_database(db_url, create=True)
    await set_limits(database)
    later = await open_database(db_url, clock=real_clock(2 * LATER))
    number = 0
    while True:
        name = f"{operation} {number}"
        await enqueue(database, name)
        act = await OPERATIONS[operation](database, name)
        waiting = CancelledAt(act(database), number)

        async def do(waiting: CancelledAt = waiting) -> None:
            await waiting

        with suppress(asyncio.CancelledError):
            await asyncio.create_task(do())
        run = await named(database, name)
        assert run is not None
        there = await states(database, run)
        assert there in BEFORE_AND_AFTER[operation], (number, there)
        await finish(later, name)
        await assert_counted(database, run)
        if not waiting.cancelled:
            break
        number += 1
    assert number >= 1
    await later.close()
    await database.close()
