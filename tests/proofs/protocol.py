"""Every state of the protocol's model, and whether a promise is broken in one of them.

`python -m tests.proofs.protocol` goes through them and prints how many there are, then takes the fence out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lbr.store.settle import is_mine
from tests.proofs.protocol_rules import (
    AT_END,
    DONE,
    INFLIGHT,
    PENDING,
    WORKING,
    Budget,
    Job,
    Worker,
    World,
    steps,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.types import Settlement
    from tests.proofs.protocol_rules import Fence, Step


def _broken(before: World, step: Step, full: Budget) -> Iterator[str]:
    """Yield what a step breaks of the promises."""
    for j, (old, new) in enumerate(zip(before.jobs, step.world.jobs, strict=True)):
        if len(new.results) > 1:
            yield f"job {j} has two results"
        if (new.state is DONE) != bool(new.results):
            yield f"job {j} is {new.state} with {len(new.results)} results"
        if old.results and new.results != old.results and step.kind != "retry":
            yield f"a result of job {j} changed"
        if new.claim_seq < old.claim_seq:
            yield f"the claim_seq of job {j} went back"
        if new.calls > 1 + step.world.budget.spent(full):
            yield f"job {j} was called {new.calls} times"
    if step.kind == "settle" and step.job is not None:
        yield from _badly_settled(before.jobs[step.job], step)


def _badly_settled(old: Job, step: Step) -> Iterator[str]:
    seq, answered = int(step.words.split("claim ")[1].split(":")[0]), ": answer" in step.words
    new = step.world.jobs[step.job or 0]
    if seq != old.claim_seq and new._replace(told=old.told) != old:
        yield f"claim {seq} settled job {step.job}, which claim {old.claim_seq} has"
    unclaimed = seq == old.claim_seq and old.state in {INFLIGHT, PENDING} and seq not in old.told
    if answered and unclaimed and new.results != (seq,):
        yield f"the answer of claim {seq} to job {step.job} is lost, though nobody claimed it since"


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    `problem` is the first promise that is broken, None where all hold, and `trace` the fewest steps to it.
    """

    states: int
    transitions: int
    problem: str | None = None
    trace: tuple[str, ...] = ()


def search(budget: Budget, *, fence: Fence = is_mine, jobs: int = 2, workers: int = 2, promise: str = "") -> Found:
    """Go through every state that can be reached, the nearest first, until a promise is broken.

    With `promise`, only those count in whose words it is.
    """
    start = World((Job(),) * jobs, tuple(Worker(n) for n in range(workers)), budget)
    came: dict[World, tuple[World, str] | None] = {start: None}
    onward: dict[World, list[World]] = {}
    waiting, transitions = deque([start]), 0
    while waiting:
        world = waiting.popleft()
        working = []
        for step in steps(world, fence):
            if step.world == world:
                continue
            transitions += 1
            if problem := next((one for one in _broken(world, step, budget) if promise in one), None):
                return Found(len(came), transitions, problem, (*_trace(came, world), step.words))
            if step.kind in WORKING:
                working.append(step.world)
            if step.world not in came:
                came[step.world] = (world, step.words)
                waiting.append(step.world)
        onward[world] = working
    stuck = _stuck(onward)
    problem = None if stuck is None else "somebody keeps working, and a job does not come to its end"
    return Found(len(came), transitions, problem, () if stuck is None else _trace(came, stuck))


def _trace(came: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    words = []
    while (before := came[world]) is not None:
        world, step = before
        words.append(step)
    return tuple(reversed(words))


def _stuck(onward: dict[World, list[World]]) -> World | None:
    """Return a state from which work does not lead to the end of all jobs; None where it always does.

    It always does where work cannot go in a circle, and ends only in states without an open job or an awake worker.
    """
    for world, there in onward.items():
        awake = any(one.mode == "awake" for one in world.workers)
        if not there and awake and any(job.state not in AT_END for job in world.jobs):
            return world
    left = dict.fromkeys(onward, 0)
    for there in onward.values():
        for world in there:
            left[world] += 1
    free = deque(world for world, count in left.items() if count == 0)
    while free:
        for world in onward[free[0]]:
            left[world] -= 1
            if left[world] == 0:
                free.append(world)
        del left[free.popleft()]
    return next(iter(left), None)


def without_number(settlement: Settlement, row: Any) -> bool:
    """Stand in for the fence, without the comparison of the claim's number."""
    numbered = replace(settlement, claim=replace(settlement.claim, claim_seq=row.claim_seq))
    return is_mine(numbered, row)


def no_fence(settlement: Settlement, row: Any) -> bool:
    """Stand in for the fence where there is none."""
    return True


TWO_RESULTS = "two results"

# Title, jobs, and what may go wrong: these are searched in the tests.
SHORT = (
    ("two jobs, a death and a zombie", 2, Budget(deaths=1, sleeps=1)),
    ("two jobs, three deaths", 2, Budget(deaths=3)),
    ("one job, a zombie, a failure, a lost reply, a retry by hand", 1, Budget(0, 1, 1, 1, retries=1)),
    ("one job, a death, a zombie, a release, a cancel, a retry by hand", 1, Budget(1, 1, 0, 0, 1, 1, 1)),
)
LONG = (
    ("two jobs, a death, a zombie, a failure, a lost reply", 2, Budget(1, 1, 1, 1)),
    ("one job, and one of everything", 1, Budget(1, 1, 1, 1, 1, 1, 1)),
)
SEEDED = (("without the claim's number", without_number, ""), ("without a fence", no_fence, TWO_RESULTS))


def main() -> None:
    """Print what the searches come to."""
    for title, jobs, budget in SHORT + LONG:
        found = search(budget, jobs=jobs)
        print(f"{title}: {found.states} states, {found.transitions} steps between them")
        print(f"  {found.problem or 'every promise holds'}", *found.trace, sep="\n    ", flush=True)
    for title, fence, promise in SEEDED:
        found = search(SHORT[0][2], fence=fence, promise=promise)
        print(f"{title}: {found.problem}", *found.trace, sep="\n    ")


if __name__ == "__main__":
    main()
