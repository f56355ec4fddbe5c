"""The decisions about ended calls, as plain functions of values."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr.core.errors import CallError, Family, Pause, Permanent, RetryLater, Symptom
from lbr.core.retry import RetryPolicy, decide, failure_of, wait_seconds
from lbr.core.types import Claim, Failure, History, JobId, JobState, Outcome, Prompt, Reply, RunId

POLICY = RetryPolicy()


def claim(attempts: int = 0, history: History | None = None) -> Claim:
    """Return a claim with a past."""
    return Claim(JobId(1), RunId(1), 5, attempts, 0, Prompt(text="p"), b"k", history or History())


def outcome(family: Family, retry_after: float | None = None) -> Outcome:
    """Return how a call failed."""
    return Outcome(None, Failure(family, "E", "words", retry_after), 1)


def test_answer_is_done() -> None:
    """A reply ends the job and charges the try."""
    done = decide(claim(), Outcome(Reply("x"), None, 1), POLICY, Random(0))
    assert (done.state, done.charge, done.pause, done.cool_down) == (JobState.DONE, 1, None, False)


@pytest.mark.parametrize(
    ("family", "attempts", "history", "state", "charge"),
    [
        (Family.TRANSIENT, 0, History(), JobState.PENDING, 1),
        (Family.TRANSIENT, 6, History(), JobState.PENDING, 1),
        (Family.TRANSIENT, 7, History(), JobState.FAILED, 1),
        (Family.TRANSIENT, 7, History(bad_answers=2), JobState.PENDING, 1),
        (Family.RATE_LIMITED, 7, History(), JobState.PENDING, 0),
        (Family.RATE_LIMITED, 0, History(limited_tries=9, limited_ms=3_599_000), JobState.PENDING, 0),
        (Family.RATE_LIMITED, 0, History(limited_tries=9, limited_ms=3_601_000), JobState.PENDING, 1),
        (Family.RATE_LIMITED, 7, History(limited_tries=9, limited_ms=3_601_000), JobState.FAILED, 1),
        (Family.BAD_ANSWER, 0, History(), JobState.PENDING, 1),
        (Family.BAD_ANSWER, 9, History(bad_answers=1), JobState.PENDING, 1),
        (Family.BAD_ANSWER, 2, History(bad_answers=2), JobState.FAILED, 1),
        (Family.PERMANENT, 0, History(), JobState.FAILED, 1),
        (Family.ACCOUNT, 0, History(), JobState.PENDING, 0),
    ],
)
def test_every_family_has_its_way(
    family: Family, attempts: int, history: History, state: JobState, charge: int
) -> None:
    """Each family of failures is charged, retried or failed as its row of the table says."""
    decided = decide(claim(attempts, history), outcome(family), POLICY, Random(0))
    assert (decided.state, decided.charge) == (state, charge)
    assert (decided.pause is not None) == (family is Family.ACCOUNT)
    assert decided.cool_down == (family is Family.RATE_LIMITED)
    assert (decided.wait_ms > 0) >= decided.cool_down


def test_a_lack_of_flex_capacity_is_waited_out() -> None:
    """For hours, at no charge, with longer waits, and without a word about other calls."""
    lack = Outcome(None, Failure(Family.RATE_LIMITED, "E", "none", symptom=Symptom.NO_CAPACITY), 1)
    past = History(limited_tries=50, limited_ms=36_000_000)
    found = [decide(claim(7, past), lack, POLICY, Random(seed)) for seed in range(50)]
    assert {(one.state, one.charge, one.cool_down) for one in found} == {(JobState.PENDING, 0, False)}
    assert 60_000 < max(one.wait_ms for one in found) <= 600_000


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_backoff_is_bounded(tries: int, seed: int) -> None:
    """A wait is never nothing and never more than the ceiling."""
    wait = wait_seconds(Failure(Family.TRANSIENT, "E", "m"), tries, POLICY, Random(seed))
    assert 0.5 <= wait <= 60.0
    assert tries > 1 or wait <= 1.0


@given(st.floats(-10, 1e9, allow_nan=False), st.integers(0, 2**32))
def test_retry_after_wins_over_backoff(asked: float, seed: int) -> None:
    """What the provider asks for is respected, up to ten minutes, with at most a tenth added."""
    wait = wait_seconds(Failure(Family.RATE_LIMITED, "E", "m", asked), 1, POLICY, Random(seed))
    expected = min(max(0.05, asked), 600.0)
    assert expected <= wait <= expected * 1.1


@pytest.mark.parametrize(("tries", "least"), [(1, 0.05), (5, 0.8), (20, 60.0)])
def test_asking_for_nothing_again_and_again_is_slowed_down(tries: int, least: float) -> None:
    """A provider that says "retry after 0" is not hammered: each refusal of a job doubles its least wait."""
    wait = wait_seconds(Failure(Family.RATE_LIMITED, "E", "m", 0.0), tries, POLICY, Random(1))
    assert least <= wait <= least * 1.1


@pytest.mark.parametrize(
    ("error", "family", "retry_after"),
    [
        (Permanent("no"), Family.PERMANENT, None),
        (RetryLater(3), Family.RATE_LIMITED, 3),
        (RetryLater(), Family.RATE_LIMITED, None),
        (RetryLater("5"), Family.RATE_LIMITED, 5.0),  # type: ignore[arg-type]
        (Pause("no credit"), Family.ACCOUNT, None),
        (CallError("?"), Family.TRANSIENT, None),
        (ValueError("x"), Family.TRANSIENT, None),
        (TimeoutError(), Family.TRANSIENT, None),
    ],
)
def test_errors_have_families(error: Exception, family: Family, retry_after: float | None) -> None:
    """What a function raises says what becomes of the job; anything unknown is transient."""
    failure = failure_of(error)
    assert (failure.family, failure.error, failure.retry_after) == (family, type(error).__name__, retry_after)
    assert failure.message


def test_messages_can_always_be_stored() -> None:
    """An error's text is cut, and freed of what no database holds."""
    message = failure_of(ValueError("\ud800\x00" + "x" * 5_000)).message
    assert len(message) == 2_000
    assert message.startswith("?x")
    failure = failure_of(Permanent("bad", text="\ud800", kind="\ud800"))
    assert (failure.text, failure.error) == ("?", "?")


def test_an_error_that_cannot_be_printed_is_named() -> None:
    """An exception whose own text raises is told by its class."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert failure_of(MuteError()).message == "MuteError"
