"""The fence: whose outcome of a job is still taken, given how the job stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import literal_column

from lbr.core.types import JobState
from lbr.core.values import value

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from lbr.core.types import Settlement

# A claim's outcome is taken while nobody has claimed the job again. Pending is let in, for a late answer to a job that
# was reclaimed but not yet claimed again is paid for.
FENCE: ColumnElement[bool] = literal_column("jobs.state IN ('inflight', 'pending')")


@value(frozen=True, slots=True)
class JobStatus:
    """How a job and its run stand when an outcome comes; states are words as stored."""

    job_id: int
    run_id: int
    state: str
    claim_seq: int
    retry_seq: int
    run_state: str
    answerer: str
    budget_nanos: int | None = None
    highest_nanos: int | None = None


def is_plain(settlement: Settlement, job: JobStatus) -> bool:
    """Tell whether a settlement is as nearly all are: an answer to a job that its claim still holds."""
    return (
        job.state == JobState.INFLIGHT
        and job.claim_seq == settlement.claim.claim_seq
        and settlement.outcome.failure is None
    )


def was_put_back(job: JobStatus) -> bool:
    """Tell whether a job was put back by hand, and not claimed again since."""
    return job.state == JobState.PENDING and job.retry_seq == job.claim_seq


def is_mine(settlement: Settlement, job: JobStatus) -> bool:
    """Tell whether the fence lets a settlement through, given how the job stands."""
    if job.claim_seq != settlement.claim.claim_seq:
        return False
    if job.state == JobState.INFLIGHT:
        return True
    if was_put_back(job) and settlement.outcome.failure is not None:
        # Somebody has put the job back by hand since: a late answer is welcome, a late failure is of the past.
        return False
    return job.state == JobState.PENDING


def is_repeated(settlement: Settlement, job: JobStatus, told: set[tuple[int, int]]) -> bool:
    """Tell whether this very settlement is in the database already: only its claim could have written it.

    `told` are the claims, by job and claim_seq, whose failure, late answer or redone answer is on record.
    """
    claim = settlement.claim
    if told and (claim.job_id, claim.claim_seq) in told:
        return True
    done = job.state == JobState.DONE and job.claim_seq == claim.claim_seq
    return done and settlement.outcome.failure is None


def is_doubtful(settlement: Settlement, job: JobStatus, *, fits: bool) -> bool:
    """Tell whether a settlement may be on record: an answer that fits is so only where it was redone since."""
    return not fits or settlement.outcome.failure is not None or was_put_back(job)
