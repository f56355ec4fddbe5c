"""Operations of the store in processes that kill themselves before a chosen statement or commit, as SIGKILL would."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from random import Random
from typing import TYPE_CHECKING, Any

from lbr.api.enqueue import put
from lbr.core.errors import Family
from lbr.core.retry import RetryPolicy, decide
from lbr.core.types import Failure, Item, Outcome, Prompt, Reply
from lbr.store import reads, redo, runs
from lbr.store.claim import ClaimRequest, settle_and_claim
from lbr.store.database import open_database
from lbr.store.runs import RunSpec
from lbr.store.settle import settle
from tests.support import ECHO, Queue, answered, real_clock
from tests.support.hearing import Hearing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from lbr.core.types import Claim, Settlement, WorkerId
    from lbr.store.database import Database

PROMPTS = [f"prompt {n}" for n in range(6)]
TURN = 3
"""So many of the prompts are settled, and as many claimed, in one turn."""
LEASE = 60.0
LATER = 3600.0
"""By so many seconds the clock is ahead of those who come after a death: every lease has run out for them."""


class Fuse:
    """Burns with each statement and commit from `light` on; before the chosen one it does what it is there for."""

    def __init__(self, length: int, blow: Callable[[], object]) -> None:
        self.left = length
        self._blow = blow
        self._hearing = Hearing(self._burn, self._burn)

    @property
    def blown(self) -> bool:
        """Whether there were so many statements."""
        return self.left < 0

    def light(self) -> None:
        """Begin to count."""
        self._hearing.begin()

    def douse(self) -> None:
        """Count no more."""
        self._hearing.end()

    def _burn(self, *_: Any) -> None:
        self.left -= 1
        if self.left == -1:
            self._blow()


def spec(name: str) -> RunSpec:
    """Return the run that the operations are tried on."""
    return RunSpec(name, ECHO, 8)


def enqueue(database: Database, name: str) -> Awaitable[object]:
    """Put the prompts into the run."""
    return put(database, spec(name), [Item(Prompt(text=one)) for one in PROMPTS], fresh=True)


def outcomes(claims: list[Claim]) -> list[Settlement]:
    """Return how calls ended: three well, the others in ways that wait, fail for good and cool down."""
    failures = [
        Failure(Family.TRANSIENT, "E", "broke"),
        Failure(Family.PERMANENT, "E", "never"),
        Failure(Family.RATE_LIMITED, "E", "429", retry_after=0.001),
    ]
    ends = [Outcome(Reply(claim.prompt.text or ""), None, 5) for claim in claims[:3]]
    ends += [Outcome(None, failure, 5) for failure in failures]
    return [decide(claim, end, RetryPolicy(), Random(1)) for claim, end in zip(claims, ends, strict=True)]


async def _claimed(database: Database, name: str, count: int = len(PROMPTS)) -> tuple[WorkerId, list[Claim]]:
    run = await database.read(reads.find_run, name)
    queue = Queue(database)
    worker = await queue.register(host="h", pid=1, concurrency=8)
    claims: list[Claim] = []
    while len(claims) < count:
        # The answerer may cool down for a moment from what was settled before.
        claims += await queue.claim(worker, [run.id], count, lease=LEASE)
    return worker, claims


async def _enqueue(_: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    return lambda database: enqueue(database, name)


async def _claim(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    run = await database.read(reads.find_run, name)
    worker = await Queue(database).register(host="h", pid=1, concurrency=8)
    return lambda database: Queue(database).claim(worker, [run.id], 8, lease=LEASE)


async def _settle(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    _, claims = await _claimed(database, name)
    return lambda database: database.write(settle, outcomes(claims))


async def _turn(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    worker, claims = await _claimed(database, name, TURN)
    run = await database.read(reads.find_run, name)
    batch, request = (
        [answered(claim, claim.prompt.text or "") for claim in claims],
        ClaimRequest(worker, [run.id], TURN, LEASE),
    )
    return lambda database: database.write(settle_and_claim, batch, request)


async def _renew(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    worker, claims = await _claimed(database, name)
    return lambda database: Queue(database).renew(worker, claims, lease=LEASE, settled=0, rate=0)


async def _release(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    worker, claims = await _claimed(database, name)
    return lambda database: Queue(database).release(worker, claims, unused=True)


async def _reclaim(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    await _claimed(database, name)
    return lambda database: Queue(database).reclaim()


async def _cancel(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    run = await database.read(reads.find_run, name)
    return lambda database: runs.cancel(database, run)


async def _redo(database: Database, name: str) -> Callable[[Database], Awaitable[object]]:
    _, claims = await _claimed(database, name)
    await database.write(settle, outcomes(claims))
    run = await database.read(reads.find_run, name)
    done = redo.read_conditions(["status=done"])
    return lambda database: redo.retry(database, run, done, {"latency": 0})


OPERATIONS = {
    "enqueue": _enqueue,
    "claim": _claim,
    "settle": _settle,
    "turn": _turn,
    "renew": _renew,
    "release": _release,
    "reclaim": _reclaim,
    "cancel": _cancel,
    "redo": _redo,
}


def _run(url: str, name: str, operation: str, length: int) -> None:
    async def operate() -> None:
        database = await open_database(url)
        act = await OPERATIONS[operation](database, name)
        if operation == "reclaim":
            # Late enough for it to find something.
            await database.close()
            database = await open_database(url, clock=real_clock(LATER))
        Fuse(length, lambda: os.kill(os.getpid(), signal.SIGKILL)).light()
        await act(database)
        os._exit(0)

    asyncio.run(operate())


def die(url: str, name: str, operation: str, length: int) -> bool:
    """Do the operation in a process that dies after so many statements; False when it came to its end before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(url, name, operation, length))
    process.start()
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL}, process.exitcode
    return process.exitcode != 0
