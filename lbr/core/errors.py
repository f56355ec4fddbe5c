"""The errors of lbr: an `LbrError` is for the user of a command, a `CallError` is one model call that failed."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from lbr.core import value


class LbrError(Exception):
    """Something that the user can fix; the message says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 1
    in_flags: str | None = None
    """The message as the command line prints it; None if that is the same."""


class UsageError(LbrError):
    """The request cannot be carried out: a flag, a name, a path or a combination of them is wrong."""

    exit_code: ClassVar[int] = 2


class InputError(LbrError):
    """An input file or line is wrong; the message begins with its `source` and `line`."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, source: str | None = None, line: int | None = None) -> None:
        self.message = message
        self.source = source
        self.line = line
        where = [source] * (source is not None) + [f"line {line}"] * (line is not None)
        super().__init__(f"{', '.join(map(str, where))}: {message}" if where else message)


class OutputError(LbrError):
    """The output cannot be written; nothing was changed there."""


class DatabaseError(LbrError):
    """The database cannot be opened, read or written."""


class DatabaseBusyError(DatabaseError):
    """Other processes kept the database locked for longer than lbr waits."""


class MisfitError(DatabaseError):
    """The database holds, or was to store, a value of a type that lbr never writes there."""


class RunNotFoundError(UsageError):
    """The database has no run of that name."""


class RunMismatchError(UsageError):
    """A run of that name exists, with a different task."""


class RunChangedError(InputError):
    """An input line differs from the one that the run holds in its place."""


class NothingToServeError(LbrError):
    """A worker found runs with work, but can serve none of them."""


class AlreadyRunningError(LbrError):
    """Another exclusive worker holds the lock and does the work, so this is no failure."""

    exit_code: ClassVar[int] = 0


class StoppedError(LbrError):
    """Ctrl-C, SIGTERM or SIGHUP ended a command early."""

    exit_code: ClassVar[int] = 130


class Family(StrEnum):
    """The kind of a failed call, which decides what happens to the job; see `lbr.core.retry`."""

    TRANSIENT = "transient"
    RATE_LIMITED = "rate_limited"
    CUT_OFF = "cut_off"
    OUTAGE = "outage"
    BAD_ANSWER = "bad_answer"
    PERMANENT = "permanent"
    ACCOUNT = "account"


class Symptom(StrEnum):
    """What a failed call means for its model if other calls fail as well; see `lbr.core.outages`."""

    UNREACHABLE = "unreachable"  # refused, reset, no such host, TLS, no connection in time
    SERVER_ERROR = "server error"  # 5xx
    DENIED = "denied"  # 401: the key
    FORBIDDEN = "forbidden"  # 403: the key, or a firewall that rejects this prompt
    NO_CAPACITY = "no capacity"  # of the flex tier: not because of the number of calls
    SET_UP = "set-up"  # 400, 404, 405, 422: a wrong model, route or parameter would fail every job


@value(frozen=True, slots=True)
class Usage:
    """Tokens and cost of one call, in billionths of a US dollar; None if the provider did not report it.

    `cached_tokens` are those of the input that the provider had in its cache.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_nanos: int | None = None
    cached_tokens: int | None = None


NO_USAGE = Usage()
MAX_TOKENS = 10**12
MAX_NANOS = 10**14
"""More than any call takes (100,000 US dollars), so a larger count is a provider's mistake. Sums of millions still fit."""
CUT_OFF = "length"
"""The finish reason of an answer that reached its token limit."""
UNREAD = frozenset({"EmptyAnswer", "UnreadAnswer"})
"""The names of errors whose `text` is the whole body that the provider sent, not an answer."""


class CallError(Exception):
    """One model call that failed.

    `retry_after` is in seconds, None if unknown. `text` is the raw answer if there was one, `usage` what the call cost,
    `finish_reason` why that answer ended. `overloaded` means that fewer calls at a time may help. `symptom` is what the
    failure may mean for other calls, None for nothing. `kind` replaces the class name in reports.
    """

    family: Family = Family.TRANSIENT

    def __init__(
        self,
        message: str = "the function gave no reason",
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
        self.retry_after = None if retry_after is None else float(retry_after)  # a function may pass a header's text
        self.text = text
        self.kind = kind or type(self).__name__
        self.usage = usage or NO_USAGE
        self.overloaded = overloaded
        self.finish_reason = finish_reason
        self.symptom = symptom


class Permanent(CallError):  # noqa: N818 - the name that a user's function raises
    """Raise it from a function if another try cannot help: the job fails at once."""

    family = Family.PERMANENT


class RetryLater(CallError):  # noqa: N818
    """Raise it from a function to wait `seconds` without charging an attempt; None lets lbr choose the wait."""

    family = Family.RATE_LIMITED

    def __init__(self, seconds: float | None = None, message: str = "asked to be called again later") -> None:
        super().__init__(message, retry_after=seconds)


class Pause(CallError):  # noqa: N818
    """Raise it from a function if no call can succeed until the user fixes something: the run is paused."""

    family = Family.ACCOUNT


class BadAnswer(CallError):  # noqa: N818
    """An answer that does not fit the output schema; `text` keeps it."""

    family = Family.BAD_ANSWER
