"""The values of lbr: tasks, inputs, runs, claims, replies and outcomes. Times are integer milliseconds since 1970."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NewType

import orjson

from lbr.core import value
from lbr.core.errors import NO_USAGE, DatabaseError, Family, Symptom, Usage
from lbr.core.extras import Extra, Extras, RowUsage

if TYPE_CHECKING:
    from lbr.core.outages import Evidence
    from lbr.core.pricing import Price

RunId = NewType("RunId", int)
JobId = NewType("JobId", int)
WorkerId = NewType("WorkerId", int)
Millis = NewType("Millis", int)
Json = Any
"""Anything that orjson reads: None, bool, int, float, str, list or dict of these."""
PathOrUrl = str | os.PathLike[str]
KEY_BYTES = 16
MAX_SAMPLES = 10_000


class JobState(StrEnum):
    """Where a job is; `docs/explanation/states.md` draws the transitions."""

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
    """What paused a run. A cancelled run has REMOVING while `lbr rm` deletes it."""

    USER = "user"
    ACCOUNT = "account"  # no call can succeed until the user fixes something: credit, or a rejected key
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
    """One row for each input, or one for each distinct input."""

    ORIGINAL = "original"
    UNIQUE = "unique"


class Order(StrEnum):
    """In which order finished rows are followed."""

    INPUT = "input"
    FINISHED = "finished"


class Part(StrEnum):
    """The part of an item that an input column holds."""

    PROMPT = "prompt"
    ID = "id"
    METADATA = "metadata"


class Until(StrEnum):
    """When a worker ends by itself."""

    DONE = "done"
    EMPTY = "empty"
    FOREVER = "forever"


def canonical_json(value: Json) -> bytes:
    """Return the one spelling of a JSON value for keys and comparisons: UTF-8, sorted keys, no spaces."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


@dataclass(frozen=True, slots=True)
class Report:
    """What a public function returns, with fields that JSON can hold."""

    def to_dict(self) -> dict[str, Json]:
        """Return the fields as JSON."""
        return asdict(self)


@value(frozen=True, slots=True)
class Task:
    """What a run asks of each input. Exactly one of `model` and `function` is set.

    `function` is `module:qualname` or the name that it was found by, `version` what its author set. `fingerprint` is
    set for functions that their name does not identify (lambdas, nested functions, methods of objects). `schema` is
    the JSON schema of the answer, None for free text. `tier` is not part of keys; see `lbr.core.tiers`.
    """

    model: str | None = None
    function: str | None = None
    version: str | None = None
    fingerprint: str | None = None
    instructions: str | None = None
    template: str | None = None
    settings: dict[str, Json] = field(default_factory=dict)
    schema: dict[str, Json] | None = None
    tier: str | None = None

    @property
    def answerer(self) -> str:
        """The name of the model or function, which limits are stored under."""
        return self.model or f"function:{self.function}"

    def to_json(self) -> str:
        """Return the task as it is stored, with schema and settings in the order in which they are sent."""
        return orjson.dumps(self._fields()).decode()

    def canonical(self) -> bytes:
        """Return the task for keys and comparisons, which do not depend on the order of schema and settings."""
        return canonical_json({name: one for name, one in self._fields().items() if name != "tier"})

    def _fields(self) -> dict[str, Json]:
        # Unset fields are left out, so that a new field keeps the keys of old tasks.
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {k: v for k, v in fields.items() if v is not None and v != {}}

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read a stored task. Raises DatabaseError if it is not one."""
        try:
            task = cls(**{name: value for name, value in orjson.loads(text).items() if value is not None})
        except (orjson.JSONDecodeError, TypeError, AttributeError):
            task = cls()
        types = {"settings": dict, "schema": dict}
        fits = all(isinstance(value, types.get(name, str)) for name, value in task._fields().items())
        if not fits or (task.model is None) == (task.function is None):
            raise DatabaseError(
                f"expected a stored task, got: {text[:200]!r}; another version of lbr or another program wrote it"
            )
        return task


@value(frozen=True, slots=True)
class Prompt:
    """One input as the model gets it: `text`, or chat `messages` in the OpenAI form; exactly one is set.

    `settings` are the input's own. They override the run's, and are part of the key.
    """

    text: str | None = None
    messages: tuple[dict[str, Json], ...] | None = None
    settings: dict[str, Json] | None = None

    @property
    def form(self) -> int:
        """What the body holds: 0 a text, 1 messages, 2 either of them with settings."""
        return 2 if self.settings is not None else int(self.messages is not None)

    def body(self) -> str:
        """Return what is stored: the text, canonical messages, or an object with settings, in the order they are sent."""
        if self.settings is not None:
            prompt = {"text": self.text} if self.messages is None else {"messages": list(self.messages)}
            return orjson.dumps({**prompt, "settings": self.settings}).decode()
        return (self.text or "") if self.messages is None else canonical_json(list(self.messages)).decode()

    @classmethod
    def from_body(cls, body: str, *, chat: bool) -> Prompt:
        """Return the prompt of a stored body. Raises DatabaseError if it is not one."""
        if not chat:
            return cls(text=body)
        try:
            messages: Json = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise DatabaseError(f"expected stored messages to be JSON, got: {body[:200]!r}") from error
        settings: Json = None
        match messages:
            case {"text": str(text), "settings": dict(settings)}:
                return cls(text, settings=settings)
            case {"messages": messages, "settings": dict(settings)}:
                pass
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DatabaseError(f"expected stored messages to be a list of objects, got: {body[:200]!r}")
        return cls(messages=tuple(messages), settings=settings)


@value(frozen=True, slots=True)
class Item:
    """One input of a run, as a reader returns it.

    `source` and `line` are where it was read, for messages; collect returns `metadata`. `columns` are the fields of its
    record in their order, each with the part of the item that it became; None for a plain text.
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
        head = task.canonical()
        prefix = hashlib.blake2b(len(head).to_bytes(8, "big") + head, digest_size=KEY_BYTES)
        self._text, self._messages, self._own = prefix.copy(), prefix.copy(), prefix.copy()
        self._text.update(b"t")
        self._messages.update(b"m")
        self._own.update(b"s")

    def key(self, prompt: Prompt) -> bytes:
        """Return the key of one input; only equal inputs of one task share it."""
        if prompt.settings is not None:
            digest = self._own.copy()
            digest.update(canonical_json(orjson.loads(prompt.body())))  # their order does not count
            return digest.digest()
        digest = (self._text if prompt.messages is None else self._messages).copy()
        digest.update(prompt.body().encode("utf-8", "surrogatepass"))
        return digest.digest()


def sample_key(key: bytes, sample: int) -> bytes:
    """Return the key of one sample of an input, given the input's key, which is that of the first sample, 0."""
    if sample == 0:
        return key
    return hashlib.blake2b(key + sample.to_bytes(8, "big"), digest_size=KEY_BYTES, person=b"sample").digest()


@value(frozen=True, slots=True)
class Paused:
    """Why a run is paused. Only people read `message`."""

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
    """A run as stored. `sealed_at` is None until its enqueue finishes; `move` is set after `lbr move` took it away.

    `price` is what the user says that calls cost, None to ask the provider and the price table. `budget_nanos` is the
    most that the run may cost, in billionths of a US dollar, None without a limit. `input_columns` is `Item.columns` as
    JSON, None without columns and for runs of older versions. `keep` is what is kept besides its answers. `samples` is
    the number of answers per input.
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
    keep: tuple[Extra, ...] = ()
    samples: int = 1
    lane: str | None = None

    def is_paused_by(self, *causes: PauseCause) -> bool:
        """Return whether one of these causes paused the run or, if REMOVING, cancelled it."""
        return self.pause is not None and self.pause.cause in causes


@value(frozen=True, slots=True)
class Reply:
    """One answer. `model` is the name that the provider reported, `finish_reason` its word for why it ended.

    `extras` are what the run keeps besides the text, None if that is nothing.
    """

    text: str
    usage: Usage = NO_USAGE
    model: str | None = None
    finish_reason: str | None = None
    extras: Extras | None = None


@value(frozen=True, slots=True)
class BadTry:
    """An earlier answer of a job that did not validate, and the validator's message."""

    text: str
    message: str


@value(frozen=True, slots=True)
class History:
    """What happened to a job since the user last put it back.

    `limited_ms` is how long before the claim its first rate-limited try ended, 0 if there was none. `last_bad` is the
    newest answer that did not validate. `denied_tries` counts the 401s and 403s that were charged to the job.
    """

    bad_answers: int = 0
    denied_tries: int = 0
    limited_tries: int = 0
    limited_ms: int = 0
    last_bad: BadTry | None = None


NO_HISTORY = History()


@value(frozen=True, slots=True)
class Claim:
    """A job that one worker holds until its lease ends; `claim_seq` fences every later write.

    `tokens` were taken from its model's tokens a minute, 0 without that limit. `throttled` means that the model is
    limited to fewer calls at a time than the workers have slots. `settings` are the job's own and override the task's:
    those of its prompt, and over them those of a retry; None if it has none. `model` among them is the model that
    answers instead of the run's. `probe` is set for the one call that checks whether an outage is over. `sample` is the
    number of the answer among those to the same input, from 0.
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
    sample: int = 0

    @property
    def model(self) -> str | None:
        """The job's own model; None if the run's answers."""
        return None if self.settings is None else self.settings.get("model")


@value(frozen=True, slots=True)
class Failure:
    """How a call failed: `error` is the class name, `text` the raw answer and `finish_reason` why it ended, if known.

    `overloaded` means that the model is too slow or too busy, so that fewer calls at a time may help; see
    `lbr.core.retry.is_overload`. `symptom` is what it may mean for other calls; see `lbr.core.outages`.
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
        """The tokens and cost of the call."""
        ended = self.reply or self.failure
        return NO_USAGE if ended is None else ended.usage

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; None without an answer, or if the provider did not say."""
        ended = self.reply or self.failure
        return None if ended is None else ended.finish_reason

    @property
    def is_paid(self) -> bool:
        """Whether the call cost something: it returned an answer, good or bad, or reported usage."""
        failure = self.failure
        if failure is None:
            return True
        return failure.family is Family.BAD_ANSWER or failure.text is not None or failure.usage != NO_USAGE

    @property
    def is_unpriced(self) -> bool:
        """Whether the call is paid for, at an unknown cost."""
        return self.usage.cost_nanos is None and self.is_paid


@value(frozen=True, slots=True)
class Settlement:
    """What to write about one claim: decided in `lbr.core.retry`, carried out by the store.

    `charge` is added to the job's attempts. A job that becomes pending again waits `wait_ms` from the time of the
    commit. `pause` is why to pause the run. With `cool_down`, no worker calls the model before that wait is over if
    many of its calls are refused, even if this job has failed. `evidence` is what the worker has seen of the model,
    None while the cause may be single jobs.
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
class AnswerRow:
    """One collected answer.

    `status` is a job state, or "missing" if the caller wants that for each job that is not done. `result` is None
    unless done; `error` is why the job failed, or the message of its last failed try. `cut_off` is True if the answer
    reached its token limit, even if the job failed because of it. `usage` and `kept`, None unless they were asked for,
    are what its call took and what was kept of it beside the answer. `sample` is None if the run has one answer per
    input.
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
    usage: RowUsage | None = None
    kept: dict[str, Json] | None = None
    sample: int | None = None

    def missing(self) -> AnswerRow:
        """Return the row of a missing answer; `error` stays."""
        return replace(self, status="missing", result=None, cut_off=False)

    def to_dict(self) -> dict[str, Json]:
        """Return the row as collected JSON: `id` and `metadata` only if the input had them; usage and what was kept last."""
        fields: dict[str, Json] = {"idx": self.idx}
        if self.sample is not None:
            fields["sample"] = self.sample
        if self.custom_id is not None:
            fields["id"] = self.custom_id
        prompt = self.prompt.text if self.prompt.messages is None else list(self.prompt.messages)
        fields |= {"key": self.key, "prompt": prompt, "status": self.status, "result": self.result, "error": self.error}
        if self.metadata is not None:
            fields["metadata"] = self.metadata
        if self.usage is not None:
            fields |= {name: getattr(self.usage, name) for name in RowUsage.__slots__}
        return fields if self.kept is None else fields | self.kept
