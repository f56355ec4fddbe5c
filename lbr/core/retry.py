"""What becomes of a job after a call: decisions over values, with time and randomness as arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from lbr.core.errors import MAX_NANOS, MAX_TOKENS, NO_USAGE, CallError, Family, Symptom, Usage
from lbr.core.types import Claim, Failure, JobState, Outcome, PauseCause, Paused, Settlement

if TYPE_CHECKING:
    from random import Random

    from lbr.core.outages import Evidence

MESSAGE_LIMIT = 2_000
TEXT_LIMIT = 1_000_000
MAX_AHEAD_MS = 3600 * 1000
"""No wait is as long as this: a later time was set by a clock that has been set back since."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The bounds of trying again. Times are in seconds.

    `max_attempts` bounds a job's charged attempts, `bad_answer_retries` how often an answer that does not validate is
    asked for again. `limited_patience` is how long rate limits may turn a job away before each further refusal is
    charged like a transient failure.
    """

    max_attempts: int = 8
    bad_answer_retries: int = 2
    backoff_first: float = 1.0
    backoff_most: float = 60.0
    retry_after_least: float = 0.05
    retry_after_most: float = 600.0
    limited_patience: float = 3600.0


def failure_of(error: BaseException) -> Failure:
    """Turn what a model raised into a failure; anything that is not a `CallError` counts as transient."""
    if not isinstance(error, CallError):
        return Failure(Family.TRANSIENT, type(error).__name__, _message(error))
    return Failure(
        error.family,
        storable(error.kind)[:MESSAGE_LIMIT],
        _message(error),
        error.retry_after,
        None if error.text is None else storable(error.text)[:TEXT_LIMIT],
        storable_usage(error.usage),
        overloaded=error.overloaded,
        finish_reason=error.finish_reason and storable(error.finish_reason)[:MESSAGE_LIMIT],
        symptom=error.symptom,
    )


def is_overload(failure: Failure) -> bool:
    """Return whether fewer calls at a time could have avoided a failure: a rate limit, or an overloaded model."""
    is_limit = failure.family is Family.RATE_LIMITED and failure.symptom is not Symptom.NO_CAPACITY
    return is_limit or failure.overloaded


def storable(text: str) -> str:
    """Replace what not every database holds as text: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def storable_usage(usage: Usage) -> Usage:
    """Leave out numbers that cannot be the usage of one call: negative, or implausibly large."""
    if usage is NO_USAGE:
        return usage
    tokens = ((one, MAX_TOKENS) for one in (usage.input_tokens, usage.output_tokens))
    counts = (*tokens, (usage.cost_nanos, MAX_NANOS), (usage.cached_tokens, MAX_TOKENS))
    return Usage(*(count if count is not None and 0 <= count <= most else None for count, most in counts))


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a user's exception whose own __str__ fails
        text = ""
    return storable((text or type(error).__name__).replace("\x00", ""))[:MESSAGE_LIMIT]


def wait_seconds(failure: Failure, tries: int, policy: RetryPolicy, rng: Random) -> float:
    """Return how long to wait after a failure: the provider's Retry-After, capped, plus jitter; otherwise backoff.

    Backoff is full jitter under a ceiling that doubles up to `backoff_most` (see "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015). A provider that asks for next to nothing again and again gets more each time. A lack of
    capacity may last for hours, so that its ceiling is that of a Retry-After.
    """
    doubled = 2.0 ** min(tries - 1, 32)
    if failure.retry_after is None:
        most = policy.retry_after_most if failure.symptom is Symptom.NO_CAPACITY else policy.backoff_most
        ceiling = min(most, policy.backoff_first * doubled)
        return max(policy.backoff_first / 2, rng.random() * ceiling)
    least = min(policy.backoff_most, policy.retry_after_least * doubled)
    asked = min(max(least, failure.retry_after), policy.retry_after_most)
    return asked * (1.0 + 0.1 * rng.random())


def decide(
    claim: Claim, outcome: Outcome, policy: RetryPolicy, rng: Random, evidence: Evidence | None = None
) -> Settlement:
    """Choose between done, retry, fail and pause for one ended call, judged by itself.

    `evidence` is what this worker's other calls show about the model; the store judges by it, see `lbr.core.outages`.
    """
    failure, history = outcome.failure, claim.history
    if failure is None:
        return Settlement(claim, JobState.DONE, outcome, charge=1, evidence=evidence)
    # A bad answer is charged too, but has its own budget.
    tries = max(1, claim.attempts + 1 - history.bad_answers)

    def settle(state: JobState, charge: int = 1, wait: float = 0.0, *, cool_down: bool = False) -> Settlement:
        wait_ms = round(wait * 1000)
        return Settlement(claim, state, outcome, charge, wait_ms=wait_ms, cool_down=cool_down, evidence=evidence)

    if failure.symptom in {Symptom.DENIED, Symptom.FORBIDDEN} and not history.denied_tries:
        # Among calls that succeed, a stray 401 or 403 may pass: one more attempt, then it is about this job.
        return settle(JobState.PENDING, wait=wait_seconds(failure, 1, policy, rng))
    match failure.family:
        case Family.TRANSIENT | Family.OUTAGE:
            if tries >= policy.max_attempts:
                return settle(JobState.FAILED)
            return settle(JobState.PENDING, wait=wait_seconds(failure, tries, policy, rng))
        case Family.RATE_LIMITED:
            # A failed job cools the model down too: a refusal may be about the key.
            wait = wait_seconds(failure, history.limited_tries + 1, policy, rng)
            is_limit = failure.symptom is not Symptom.NO_CAPACITY  # which says nothing about other calls, and may last
            impatient = is_limit and history.limited_ms > policy.limited_patience * 1000
            spent = impatient and tries >= policy.max_attempts
            return settle(JobState.FAILED if spent else JobState.PENDING, int(impatient), wait, cool_down=is_limit)
        case Family.BAD_ANSWER:
            spent = history.bad_answers >= policy.bad_answer_retries
            return settle(JobState.FAILED if spent else JobState.PENDING)
        case Family.PERMANENT | Family.CUT_OFF:
            return settle(JobState.FAILED)
        case Family.ACCOUNT:
            pause = Paused(PauseCause.ACCOUNT, f"{failure.error}: {failure.message}")
            return Settlement(claim, JobState.PENDING, outcome, charge=0, pause=pause, evidence=evidence)
    assert_never(failure.family)
