"""The values that travel between the rooms of lbr: tasks, inputs, claims, replies and outcomes.

None changes; none knows a database, a model or a clock. Times are integer milliseconds since 1970.
"""

from __future__ import annotations

import hashlib
from dataclasses import field, replace
from enum import StrEnum
from os import PathLike
from typing import TYPE_CHECKING, Any, NewType

import orjson

from lbr.core.errors import NO_USAGE, DatabaseError, Family, Symptom, Usage
from lbr.core.values import value

if TYPE_CHECKING:
    from lbr.core.outage import Evidence
    from lbr.core.pricing import Price

RunId = NewType("RunId", int)
JobId = NewType("JobId", int)
WorkerId = NewType("WorkerId", int)
Millis = NewType("Millis", int)

Json = Any
"""Whatever orjson reads: None, bool, int, float, str, list or dict of these."""

PathOrUrl = str | PathLike[str]
"""Where a database or a file is; a path of any library\'s is one."""

KEY_BYTES = 16
SHOWN, BEFORE = 60, 20
"""So many characters of a long text are shown where two differ, and so many of them before the first difference."""


class JobState(StrEnum):
    """Where a job stands; `docs/explanation/states.md` draws the ways between them."""

    PENDING = "pending"
    INFLIGHT = "inflight"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RunState(StrEnum):
    """Whether a run's jobs may be claimed."""

    ACTIVE = "active"
    PAUSED = "paused"
    CANCELLED = "cancelled"


class PauseCause(StrEnum):
    """What paused a run; REMOVING is kept of a cancelled one, a part of which is gone."""

    USER = "user"
    ACCOUNT = "account"  # no call can succeed until the user steps in: money, or a key that is refused
    BUDGET = "budget"
    UNPRICED = "unpriced"  # its cost is limited, but not known
    OUTAGE = "outage"
    SET_UP = "set_up"
    MOVED_TO = "moved_to"
    MOVING_FROM = "moving_from"
    REMOVING = "removing"

    @property
    def is_move(self) -> bool:
        """Whether `lbr move` paused the run."""
        return self in {PauseCause.MOVED_TO, PauseCause.MOVING_FROM}


class Shape(StrEnum):
    """One row for every input, or one for every distinct input."""

    ORIGINAL = "original"
    UNIQUE = "unique"


class Part(StrEnum):
    """What an input's column is of its item."""

    PROMPT = "prompt"
    ID = "id"
    METADATA = "metadata"


class Until(StrEnum):
    """When a worker goes home."""

    DONE = "done"
    EMPTY = "empty"
    FOREVER = "forever"


def canonical_json(value: Json) -> bytes:
    """Return the one spelling of a JSON value, for keys and comparisons: UTF-8, sorted keys, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


@value(frozen=True, slots=True)
class Task:
    """What a run asks of every input.

    Exactly one of `model` and `function` is set. `function` is its name, `module:qualname` or what it was found by;
    `version` is its author's, None where none was set; `fingerprint` is set for functions whose name says nothing
    (lambdas, nested ones, methods of objects). `schema` is the JSON schema of the answer, None for free text.
    """

    model: str | None = None
    function: str | None = None
    version: str | None = None
    fingerprint: str | None = None
    instructions: str | None = None
    template: str | None = None
    settings: dict[str, Json] = field(default_factory=dict)
    schema: dict[str, Json] | None = None

    @property
    def answerer(self) -> str:
        """The model's or function's name: what limits are kept by."""
        return self.model or f"function:{self.function}"

    def to_json(self) -> str:
        """Return the task as it is stored: its schema and settings in the order in which they are sent."""
        return orjson.dumps(self._fields()).decode()

    def canonical(self) -> bytes:
        """Return the same for every order of its schema and settings: what keys and comparisons are made of."""
        return canonical_json(self._fields())

    def _fields(self) -> dict[str, Json]:
        """Return the fields that are set; the others are left out, so that new fields keep old keys."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {k: v for k, v in fields.items() if v is not None and v != {}}

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read a stored task; DatabaseError when it is not one."""
        complaint = (
            f"expected a stored task, got: {text[:200]!r}; another version of lbr or another program wrote it"
        )
        try:
            task = cls(**orjson.loads(text))
        except (orjson.JSONDecodeError, TypeError) as error:
            raise DatabaseError(complaint) from error
        words: list[object] = [task.model, task.function, task.version, task.fingerprint]
        words += [task.instructions, task.template]
        objects: list[object] = [task.settings, {} if task.schema is None else task.schema]
        fits = all(word is None or isinstance(word, str) for word in words)
        fits = fits and all(isinstance(one, dict) for one in objects)
        if not fits or (task.model is None) == (task.function is None):
            raise DatabaseError(complaint)
        return task


def differences(old: Task, new: Task) -> list[str]:
    """Name the fields in which two tasks differ, with both values: of long ones what is around the first difference."""
    found = []
    for name in Task.__slots__:
        there, here = getattr(old, name), getattr(new, name)
        if canonical_json(there) != canonical_json(here):
            texts = [one if isinstance(one, str) else canonical_json(one).decode() for one in (there, here)]
            unlike = (n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
            start = max(0, next(unlike, min(map(len, texts))) - BEFORE)
            words = [
                "none" if one is None else _excerpt(text, start, quoted=isinstance(one, str))
                for one, text in zip((there, here), texts, strict=True)
            ]
            found.append(f"{name}: {words[0]} there, {words[1]} here")
    return found


def _excerpt(text: str, start: int, *, quoted: bool) -> str:
    if len(text) > SHOWN:
        end = start + SHOWN
        text = "…" * (start > 0) + text[start:end] + "…" * (end < len(text))
    return repr(text) if quoted else text


@value(frozen=True, slots=True)
class Prompt:
    """One input as the model gets it: `text`, or chat `messages` in the OpenAI form; exactly one is set."""

    text: str | None = None
    messages: tuple[dict[str, Json], ...] | None = None

    def body(self) -> str:
        """Return what the store keeps: the text, or the messages as canonical JSON."""
        if self.messages is None:
            return self.text or ""
        return canonical_json(list(self.messages)).decode()

    @classmethod
    def from_body(cls, body: str, *, chat: bool) -> Prompt:
        """Turn a stored body back into a prompt."""
        if not chat:
            return cls(text=body)
        try:
            messages = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise DatabaseError(f"expected stored messages to be JSON, got: {body[:200]!r}") from error
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DatabaseError(f"expected stored messages to be a list of objects, got: {body[:200]!r}")
        return cls(messages=tuple(messages))


@value(frozen=True, slots=True)
class Item:
    """One input's place in a run, as a reader hands it over.

    `source` and `line` say where it came from, for messages; `metadata` is given back by collect. `columns` are the
    fields of its record in their order, each with the part of the item that it became; None for a plain text.
    """

    prompt: Prompt
    custom_id: str | int | None = None
    metadata: dict[str, Json] | None = None
    source: str | None = None
    line: int | None = None
    columns: dict[str, Part] | None = field(default=None, compare=False)


class KeyMaker:
    """Makes the content keys of one task: 16 bytes of BLAKE2b over the task and the input."""

    def __init__(self, task: Task) -> None:
        prefix = hashlib.blake2b(digest_size=KEY_BYTES)
        head = task.canonical()
        prefix.update(len(head).to_bytes(8, "big"))
        prefix.update(head)
        self._text, self._messages = prefix.copy(), prefix.copy()
        self._text.update(b"t")
        self._messages.update(b"m")

    def key(self, prompt: Prompt) -> bytes:
        """Return the key of one input; equal inputs of one task, and only they, share it."""
        digest = (self._text if prompt.messages is None else self._messages).copy()
        digest.update(prompt.body().encode("utf-8", "surrogatepass"))
        return digest.digest()


@value(frozen=True, slots=True)
class Paused:
    """Why a run is paused. `message` is for people."""

    cause: PauseCause
    message: str


@value(frozen=True, slots=True)
class Move:
    """Where a run was moved to: the `place` of the other database, and the state and pause that the run had before."""

    place: str
    state: str = RunState.ACTIVE
    cause: str | None = None
    message: str | None = None

    def to_json(self) -> str:
        """Return the fields as they are stored."""
        return orjson.dumps(self).decode()

    @property
    def before(self) -> tuple[RunState, Paused | None]:
        """The state and the pause that the run had."""
        pause = None if self.cause is None else Paused(PauseCause(self.cause), self.message or "")
        return RunState(self.state), pause


@value(frozen=True, slots=True)
class Run:
    """A run as stored. `sealed_at` is None while its enqueue has not come to its end.

    `price` is what its user says that its calls cost, None where the provider and the price table are asked;
    `budget_nanos` what it may cost in billionths of a US dollar, None without a limit. `input_columns` is JSON, see
    `Item.columns`; None if no input had any, and for runs of older versions. `move` is set after `lbr move`
    took the run away.
    """

    id: RunId
    name: str
    task: Task
    state: RunState
    pause: Paused | None
    max_attempts: int
    fingerprint: str | None
    created_at: Millis
    enqueued_at: Millis
    sealed_at: Millis | None
    price: Price | None = None
    budget_nanos: int | None = None
    input_columns: str | None = None
    move: Move | None = None

    def is_paused_by(self, *causes: PauseCause) -> bool:
        """Return whether one of these causes is what the run is paused for, or, of REMOVING, cancelled."""
        return self.pause is not None and self.pause.cause in causes


@value(frozen=True, slots=True)
class Reply:
    """One answer. `model` is the name that the provider reported, `finish_reason` its word for why it ended."""

    text: str
    usage: Usage = NO_USAGE
    model: str | None = None
    finish_reason: str | None = None


@value(frozen=True, slots=True)
class BadTry:
    """An earlier answer of a job that did not validate: what it said and what was wrong with it."""

    text: str
    message: str


@value(frozen=True, slots=True)
class History:
    """What a job went through since it was last put back by hand.

    `limited_ms` is how long ago, at the claim, its first rate-limited try ended, 0 where there was none;
    `last_bad` is the newest answer that did not validate, `denied_tries` counts the refusals of access (401, 403) that
    were charged to the job.
    """

    bad_answers: int = 0
    denied_tries: int = 0
    limited_tries: int = 0
    limited_ms: int = 0
    last_bad: BadTry | None = None


NO_HISTORY = History()


@value(frozen=True, slots=True)
class Claim:
    """A job that one worker holds until its lease ends; `claim_seq` is the fence of every later write.

    `tokens` are what it was debited of its answerer's tokens a minute, 0 where none are set; `narrow` tells that
    the answerer was held to fewer calls at a time than the workers have slots.
    `settings` are the job's own, which go over the task's; None where it has none. `probe` is set for the one call
    that finds out whether an outage is over.
    """

    job_id: JobId
    run_id: RunId
    claim_seq: int
    attempts: int
    crashes: int
    prompt: Prompt
    key: bytes
    history: History = NO_HISTORY
    tokens: int = 0
    throttled: bool = False
    settings: dict[str, Json] | None = None
    probe: bool = False


@value(frozen=True, slots=True)
class Failure:
    """How a call failed. `error` is the class name; `text` the raw answer, where there was one.

    `finish_reason` is why that answer ended, None if it is not known.
    `overloaded` says that the answerer has too much to do or took too long, so that fewer calls at a time are better;
    see `lbr.core.retry.is_overload`. `symptom` is what it may say about other calls; see `lbr.core.outage`.
    """

    family: Family
    error: str
    message: str
    retry_after: float | None = None
    text: str | None = None
    usage: Usage = NO_USAGE
    overloaded: bool = False
    finish_reason: str | None = None
    symptom: Symptom | None = None


@value(frozen=True, slots=True)
class Outcome:
    """How one call ended: with a reply or a failure, never both."""

    reply: Reply | None
    failure: Failure | None
    latency_ms: int

    @property
    def usage(self) -> Usage:
        """What the call took."""
        if self.reply is not None:
            return self.reply.usage
        return NO_USAGE if self.failure is None else self.failure.usage

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None without an answer, or if its provider did not say."""
        ended = self.reply or self.failure
        return None if ended is None else ended.finish_reason

    @property
    def is_paid(self) -> bool:
        """Whether the call brought an answer, good or bad, read or not, or anything else that is paid for."""
        failure = self.failure
        return (
            failure is None
            or failure.family is Family.BAD_ANSWER
            or failure.text is not None
            or failure.usage != NO_USAGE
        )

    @property
    def is_unpriced(self) -> bool:
        """Whether nobody knows what the call cost, though it is paid for."""
        return self.usage.cost_nanos is None and self.is_paid


@value(frozen=True, slots=True)
class Settlement:
    """What is to be written about one claim: decided in `lbr.core.retry`, carried out by the store.

    `charge` is what the try adds to the job's attempts, `wait_ms` how long a job that goes back to pending waits
    from now on: the store adds it to the clock that leases are measured by. `pause` is why to pause the
    run; with `cool_down` no worker calls this model again before the wait is over, if it refuses many calls; also
    where the job has failed.
    `evidence` is what the worker has seen of its model, None while that may be the failure of single jobs.
    """

    claim: Claim
    state: JobState
    outcome: Outcome
    charge: int
    wait_ms: int = 0
    pause: Paused | None = None
    cool_down: bool = False
    evidence: Evidence | None = None


@value(frozen=True, slots=True)
class Row:
    """One collected answer.

    `status` is a job state, or "missing" where the caller asked for that word for all that is not done.
    `result` is None unless done; `error` says why a job failed, or what its last failed try said. `cut_off` is True if
    the answer reached its token limit, also if the job failed because of it.
    """

    idx: int
    key: str
    prompt: Prompt
    status: str
    result: str | None = None
    error: str | None = None
    custom_id: str | int | None = None
    metadata: dict[str, Json] | None = None
    cut_off: bool = False

    def missing(self) -> Row:
        """Return the row as that of an answer that is not there; `error` stays."""
        return replace(self, status="missing", result=None, cut_off=False)

    def to_dict(self) -> dict[str, Json]:
        """Return the row as collected JSON: `id` and `metadata` only where the input had them."""
        prompt = self.prompt.text if self.prompt.messages is None else list(self.prompt.messages)
        row: dict[str, Json] = {"idx": self.idx}
        if self.custom_id is not None:
            row["id"] = self.custom_id
        row["key"] = self.key
        row["prompt"] = prompt
        row["status"] = self.status
        row["result"] = self.result
        row["error"] = self.error
        if self.metadata is not None:
            row["metadata"] = self.metadata
        return row
