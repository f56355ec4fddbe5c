"""Every error that lbr raises on purpose, each with what its reader can do about it.

Two roots: :class:`LbrError` is for the person at the keyboard and carries the exit code of the command
line; :class:`CallError` is for one model call and carries the family that decides what happens to the job.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import ClassVar

from lbr.core.values import value


class LbrError(Exception):
    """Something that the user can act on; its message says what was expected, what came and what to do."""

    exit_code: ClassVar[int] = 1
    in_flags: str | None = None
    """The message as the command line prints it; None if that is the same."""


class UsageError(LbrError):
    """The request as given cannot be carried out: a flag, a name, a path or a combination of them."""

    exit_code: ClassVar[int] = 2


class InputError(LbrError):
    """An input file or line is not what was promised; the message names file and line."""

    def __init__(self, message: str, *, source: str | None = None, line: int | None = None) -> None:
        self.message = message
        self.source = source
        self.line = line
        where = ", ".join(
            part for part in (source, f"line {line}" if line is not None else None) if part is not None
        )
        super().__init__(f"{where}: {message}" if where else message)


class OutputError(LbrError):
    """The answers cannot be written where they were asked for; nothing was changed there."""


class DatabaseError(LbrError):
    """The database cannot be opened, read or written."""


class DatabaseBusyError(DatabaseError):
    """Other processes kept the database locked for longer than lbr waits."""


class MisfitError(DatabaseError):
    """The database holds, or was to take, a value of a type that lbr never writes there."""


class RunNotFoundError(UsageError):
    """No run of that name is in the database."""


class RunMismatchError(UsageError):
    """A run of that name exists, but asks for something else."""


class RunChangedError(InputError):
    """An input line differs from what the run already holds at that place."""


class NothingToServeError(LbrError):
    """A worker found runs to work on, but may or can answer none of them."""


class AlreadyRunningError(LbrError):
    """An exclusive worker already holds the lock; not a failure, the other one does the work."""

    exit_code: ClassVar[int] = 0


class StoppedError(LbrError):
    """Ctrl-C, SIGTERM or SIGHUP has ended a command before its end."""

    exit_code: ClassVar[int] = 130


class Family(StrEnum):
    """What kind of failure a call ended in; `lbr.core.retry` decides by it."""

    TRANSIENT = "transient"
    RATE_LIMITED = "rate_limited"
    CUT_OFF = "cut_off"
    OUTAGE = "outage"
    BAD_ANSWER = "bad_answer"
    PERMANENT = "permanent"
    ACCOUNT = "account"


class Symptom(StrEnum):
    """What a failed call says about more than its own job, if other calls fail as well; see `lbr.core.outage`."""

    UNREACHABLE = "unreachable"  # refused, reset, no such host, TLS, no connection in time
    SERVER_ERROR = "server error"  # 5xx
    DENIED = "denied"  # 401: the key
    FORBIDDEN = "forbidden"  # 403: the key, or a firewall that dislikes this prompt
    SET_UP = "set-up"  # 400, 404, 405, 422: a wrong model, route or parameter would give it to every job


@value(frozen=True, slots=True)
class Usage:
    """Tokens and money of one call; None where the provider did not say. Money in billionths of a US dollar."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_nanos: int | None = None


MAX_TOKENS = 10**12
MAX_NANOS = 10**14
"""What no one call takes, a hundred thousand dollars in money: more is a slip of the provider's. So far below what a
database holds that the sum over millions of calls is held too."""

NO_USAGE = Usage()
"""Nothing is known of what a call took."""


CUT_OFF = "length"
"""The finish reason of an answer that reached its token limit."""

UNREAD = frozenset({"EmptyAnswer", "UnreadAnswer"})
"""What errors are called whose `text` is all that the provider sent, not an answer."""

NO_REASON = "the function gave no reason"


class CallError(Exception):
    """One model call that failed, and how.

    `retry_after` is in seconds, None where nobody said. `text` is the raw answer where there was one,
    `usage` what the call cost all the same, `finish_reason` why that answer ended. `overloaded` says that the answerer has too much to do, or took too
    long, so that fewer calls at a time may help; of a rate limit the family says so already. `symptom` is what the
    failure may say about other calls, None for nothing.
    """

    family: Family = Family.TRANSIENT

    def __init__(
        self,
        message: str = NO_REASON,
        *,
        family: Family | None = None,
        retry_after: float | None = None,
        text: str | None = None,
        kind: str | None = None,
        usage: Usage | None = None,
        overloaded: bool = False,
        finish_reason: str | None = None,
        symptom: Symptom | None = None,
    ) -> None:
        super().__init__(message)
        self.family = family or type(self).family
        self.retry_after = _seconds(retry_after)
        self.text = text
        self.kind = kind or type(self).__name__
        self.usage = usage or NO_USAGE
        self.overloaded = overloaded
        self.finish_reason = finish_reason
        self.symptom = symptom


def _seconds(value: object) -> float | None:
    """Read what somebody passed on as seconds, perhaps a header's text; None where it is no finite number."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


class Permanent(CallError):  # noqa: N818 - the name that a user's function raises
    """Raise it from a function when trying again cannot help: the job fails at once."""

    family = Family.PERMANENT


class RetryLater(CallError):  # noqa: N818
    """Raise it from a function that was told to slow down; no attempt is charged.

    `seconds` is how long to wait; None leaves the choice to lbr.
    """

    family = Family.RATE_LIMITED

    def __init__(self, seconds: float | None = None, message: str = "asked to be called again later") -> None:
        super().__init__(message, retry_after=seconds)


class Pause(CallError):  # noqa: N818
    """Raise it from a function when no call can succeed until somebody steps in: the run is paused."""

    family = Family.ACCOUNT


class BadAnswer(CallError):  # noqa: N818
    """The answer came, but does not fit the output schema; `text` keeps it."""

    family = Family.BAD_ANSWER
