"""What becomes of a job after a call: plain functions over values, with time and chance as arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, assert_never

from lbr.core.errors import MAX_NANOS, MAX_TOKENS, NO_USAGE, CallError, Family, Symptom, Usage
from lbr.core.types import Claim, Failure, JobState, Outcome, PauseCause, Paused, Settlement

if TYPE_CHECKING:
    from random import Random

    from lbr.core.outage import Evidence

MESSAGE_LIMIT = 2_000
TEXT_LIMIT = 1_000_000
FARTHEST_MS = 3600 * 1000
"""Nobody is ever told to wait for so long: a later time was set by a clock that has been set back since."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The bounds of trying again. Times are in seconds.

    `max_attempts` bounds the charged tries of a job, `bad_answer_retries` how often an answer that does not
    validate is asked for again. `limited_patience` is how long a job may be turned away by rate limits
    before each further refusal is charged like a transient failure.
    """

    max_attempts: int = 8
    bad_answer_retries: int = 2
    backoff_first: float = 1.0
    backoff_most: float = 60.0
    retry_after_least: float = 0.05
    retry_after_most: float = 600.0
    limited_patience: float = 3600.0


def failure_of(error: BaseException) -> Failure:
    """Turn what a model raised into a failure; whatever is not a `CallError` counts as transient."""
    if not isinstance(error, CallError):
        return Failure(Family.TRANSIENT, type(error).__name__, _message(error))
    text = None if error.text is None else storable(error.text)[:TEXT_LIMIT]
    kind = storable(error.kind)[:MESSAGE_LIMIT]
    ending = error.finish_reason and storable(error.finish_reason)[:MESSAGE_LIMIT]
    return Failure(
        error.family,
        kind,
        _message(error),
        error.retry_after,
        text,
        storable_usage(error.usage),
        overloaded=error.overloaded,
        finish_reason=ending,
        symptom=error.symptom,
    )


def is_overload(failure: Failure) -> bool:
    """Tell whether fewer calls at a time could have avoided a failure: 429, 408, 503, 504, 529, timeouts in numbers.

    Every other failure, also another transient one, says nothing about how much the answerer has to do.
    """
    return failure.family is Family.RATE_LIMITED or failure.overloaded


def storable(text: str) -> str:
    """Replace what not every database holds as text: NUL, and halves of surrogate pairs. Most text is returned itself."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def storable_usage(usage: Usage) -> Usage:
    """Leave out what cannot be the count of one call: numbers below 0, and those that no call comes to.

    Most usage is returned itself.
    """
    if usage is NO_USAGE:
        return usage
    input_ = _count(usage.input_tokens, MAX_TOKENS)
    output = _count(usage.output_tokens, MAX_TOKENS)
    cost = _count(usage.cost_nanos, MAX_NANOS)
    if input_ is usage.input_tokens and output is usage.output_tokens and cost is usage.cost_nanos:
        return usage
    return Usage(input_, output, cost)


def _count(number: int | None, most: int) -> int | None:
    return number if number is not None and 0 <= number <= most else None


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an error that cannot even say what it is
        text = ""
    return storable((text or type(error).__name__).replace("\x00", ""))[:MESSAGE_LIMIT]


def backoff_seconds(tries: int, policy: RetryPolicy, rng: Random) -> float:
    """Return the wait before try `tries` + 1: full jitter over an exponential ceiling.

    The ceiling doubles from `backoff_first` to `backoff_most`; see "Exponential Backoff And Jitter",
    AWS Architecture Blog, 2015. Half the first ceiling is the least, so that no retry is immediate.
    """
    ceiling = min(policy.backoff_most, policy.backoff_first * 2.0 ** min(tries - 1, 32))
    return max(policy.backoff_first / 2, rng.random() * ceiling)


def wait_seconds(failure: Failure, tries: int, policy: RetryPolicy, rng: Random) -> float:
    """Return how long to wait after a failure: what the provider asked for, capped, plus jitter; else backoff.

    A provider that asks for next to nothing, again and again, is given more each time.
    """
    if failure.retry_after is None:
        return backoff_seconds(tries, policy, rng)
    least = min(policy.backoff_most, policy.retry_after_least * 2.0 ** min(tries - 1, 32))
    asked = min(max(least, failure.retry_after), policy.retry_after_most)
    return asked * (1.0 + 0.1 * rng.random())


def decide(
    claim: Claim, outcome: Outcome, policy: RetryPolicy, rng: Random, evidence: Evidence | None = None
) -> Settlement:
    """Choose between done, retry, fail and pause for one ended call, taken for itself.

    `evidence` is what other calls say about its model; the store, which knows what all workers saw, judges by it.
    """
    settlement = _decide(claim, outcome, policy, rng)
    return settlement if evidence is None else replace(settlement, evidence=evidence)


def _decide(claim: Claim, outcome: Outcome, policy: RetryPolicy, rng: Random) -> Settlement:
    failure = outcome.failure
    if failure is None:
        return Settlement(claim, JobState.DONE, outcome, charge=1)
    if failure.symptom in {Symptom.DENIED, Symptom.FORBIDDEN} and not claim.history.denied_tries:
        # Among calls that succeed, a stray 401 or 403 passes: once more, then it is about this job.
        wait_ms = round(wait_seconds(failure, 1, policy, rng) * 1000)
        return Settlement(claim, JobState.PENDING, outcome, charge=1, wait_ms=wait_ms)
    match failure.family:
        case Family.TRANSIENT | Family.OUTAGE:
            return _retry_or_fail(claim, outcome, failure, policy, rng)
        case Family.RATE_LIMITED:
            return _wait_for_limit(claim, outcome, failure, policy, rng)
        case Family.BAD_ANSWER:
            spent = claim.history.bad_answers >= policy.bad_answer_retries
            return Settlement(claim, JobState.FAILED if spent else JobState.PENDING, outcome, charge=1)
        case Family.PERMANENT | Family.CUT_OFF:
            return Settlement(claim, JobState.FAILED, outcome, charge=1)
        case Family.ACCOUNT:
            pause = Paused(PauseCause.ACCOUNT, f"{failure.error}: {failure.message}")
            return Settlement(claim, JobState.PENDING, outcome, charge=0, pause=pause)
    assert_never(failure.family)


def _retry_or_fail(
    claim: Claim, outcome: Outcome, failure: Failure, policy: RetryPolicy, rng: Random
) -> Settlement:
    tries = _charged_tries(claim)
    if tries >= policy.max_attempts:
        return Settlement(claim, JobState.FAILED, outcome, charge=1)
    wait_ms = round(wait_seconds(failure, tries, policy, rng) * 1000)
    return Settlement(claim, JobState.PENDING, outcome, charge=1, wait_ms=wait_ms)


def _charged_tries(claim: Claim) -> int:
    """Return how many charged tries there are with this one; bad answers are charged too, but have their own budget."""
    return max(1, claim.attempts + 1 - claim.history.bad_answers)


def _wait_for_limit(
    claim: Claim, outcome: Outcome, failure: Failure, policy: RetryPolicy, rng: Random
) -> Settlement:
    # Whatever becomes of this job, a refusal may be about the key: the store sees how many calls are refused.
    wait_ms = round(wait_seconds(failure, claim.history.limited_tries + 1, policy, rng) * 1000)
    impatient = claim.history.limited_ms > policy.limited_patience * 1000
    spent = impatient and _charged_tries(claim) >= policy.max_attempts
    state = JobState.FAILED if spent else JobState.PENDING
    return Settlement(claim, state, outcome, charge=int(impatient), wait_ms=wait_ms, cool_down=True)
