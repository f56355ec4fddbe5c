"""Random interleavings of all that is done to a queue, on real databases, compared step by step with a small model.

Without LBR_TEST_EXAMPLES the search is short and the same each time; LBR_TEST_EXAMPLES=2000 makes it so many
examples long, and another one each time.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from lbr.core.errors import DatabaseError
from lbr.core.types import JobState
from lbr.store import claim
from lbr.store import settle as settling
from lbr.store.sql import BulkStatement
from tests.proofs.queue_machine import QueueMachine, World
from tests.support import is_postgresql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = os.environ.get("LBR_TEST_EXAMPLES")
STEPS = 40


def search(world: World, examples: int, *, same: bool = True, shrink: bool = True) -> None:
    """Run so many random sequences of steps; raise what the first one that fails raises."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        derandomize=same,
        database=None,
        deadline=None,
        print_blob=not same,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
    )
    QueueMachine.world, QueueMachine.examples, QueueMachine.steps = world, 0, 0
    run_state_machine_as_test(QueueMachine, settings=chosen)


@pytest.fixture
def world(db_url: str) -> Iterator[World]:
    """Return an empty queue."""
    opened = World(db_url if is_postgresql(db_url) else f"{db_url}?synchronous=NORMAL")
    yield opened
    opened.close()


# Long enough for a failing sequence to be made shorter, for which Hypothesis takes five minutes at most.
@pytest.mark.timeout(0 if EXAMPLES else 600)
def test_queue_is_as_its_model(world: World, db_url: str) -> None:
    """Whatever is done in whatever order, no job is lost, no answer is doubled or changed, and every count is right."""
    examples = int(EXAMPLES or (60 if is_postgresql(db_url) else 120))
    search(world, examples, same=EXAMPLES is None)
    print(f"{QueueMachine.examples} examples, {QueueMachine.steps} steps: the queue is as its model")


def _anything(*_: object) -> bool:
    return True


def _nothing(*_: object) -> bool:
    return False


def _unfinished(_: object, row: Any) -> bool:
    return row.state in {JobState.INFLIGHT, JobState.PENDING}


def _without(*words: str) -> BulkStatement:
    """Return the store's own statement that settles, without the conditions on these columns."""

    def build(given: Any) -> Any:
        statement = settling._settling(given)
        kept = [one for one in statement._where_criteria if not any(word in str(one) for word in words)]
        assert len(kept) == len(statement._where_criteria) - len(words)
        statement._where_criteria = tuple(kept)
        return statement

    return BulkStatement(settling.SETTLE._types, build)


def _let_in(patch: pytest.MonkeyPatch, is_mine: Callable[..., bool], *columns: str) -> None:
    patch.setattr(settling, "is_mine", is_mine)
    patch.setattr(settling, "SETTLE", _without(*columns))


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a settle without the claim's number": lambda patch: _let_in(patch, _unfinished, "claim_seq"),
    "a settle without the fence": lambda patch: _let_in(patch, _anything, "claim_seq", "jobs.state"),
    "a settle that knows no repetition": lambda patch: patch.setattr(settling, "is_repeated", _nothing),
    "a claim that is not counted": lambda patch: patch.setattr(claim, "_deltas", lambda *_: Counter()),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(bug: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine fails where the fence is taken out of the settle, or another promise's guard out of its place."""
    BUGS[bug](monkeypatch)
    # Without the fence it may be the primary key of the results that refuses the second.
    with pytest.raises((AssertionError, DatabaseError)) as found:
        search(world, 300, shrink=False)
    print(f"{bug}: found after {QueueMachine.examples} examples: {str(found.value)[:150]}")
