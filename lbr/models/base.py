"""The protocol of models, their names, and a request as chat messages."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from lbr.core import value
from lbr.core.errors import InputError, Permanent, UsageError
from lbr.core.messages import check_messages
from lbr.core.pricing import table_price

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.extras import Extra
    from lbr.core.pricing import Price
    from lbr.core.types import BadTry, JobId, Json, Prompt, Reply, Task

OFFLINE = "offline:"
OPENROUTER = "openrouter:"


@value(frozen=True, slots=True)
class Request:
    """One call. `seq` counts the job's claims, so that a seeded model answers each attempt differently.

    `last_bad`: the job's previous answer that did not validate, to be shown to the provider with the validator's
    message. `settings`: the job's own, which override the task's. `timeout`: seconds until the caller gives up; a
    client must not give up before. None for no such value. `keep`: which `Extras` the reply must have.
    """

    prompt: Prompt
    task: Task
    job_id: JobId
    seq: int
    last_bad: BadTry | None = None
    settings: Mapping[str, Json] | None = None
    timeout: float | None = None
    keep: tuple[Extra, ...] = ()


class Model(Protocol):
    """Answers prompts. It makes one plain call per `answer`, and never retries."""

    async def answer(self, request: Request) -> Reply:
        """Answer one request.

        Raises `lbr.core.errors.CallError` with the family of the failure; any other exception counts as transient.
        """
        ...

    async def aclose(self) -> None:
        """Close connections; the model is not used again."""
        ...


class Kind(StrEnum):
    """What serves a task: a user's function, the offline model, or a provider."""

    FUNCTION = "function"
    OFFLINE = "offline"
    PROVIDER = "provider"


def kind_of(task: Task) -> Kind:
    """Return what serves a task."""
    if task.function is not None:
        return Kind.FUNCTION
    return Kind.OFFLINE if (task.model or "").startswith(OFFLINE) else Kind.PROVIDER


def tells_cost(task: Task, price: Price | None) -> bool:
    """Return whether the cost of a call may be known: by its run's price, the price table, or a report with the answer."""
    is_reported = task.function is not None or task.answerer.startswith((OFFLINE, OPENROUTER))
    return is_reported or price is not None or table_price(task.answerer) is not None


def model_string(name: str) -> str:
    """Return the full name, `provider:model`, of a model as users write it.

    A name without a provider but with a slash (`google/gemini-flash`, `meta-llama/llama-3:free`) is OpenRouter's.
    Raises UsageError for any other name without a provider.
    """
    name = name.strip()
    provider, colon, rest = name.partition(":")
    if "/" in provider:
        return OPENROUTER + name
    if not provider or not rest:
        hint = "" if not name or colon else "; put its provider and a colon before it"
        raise UsageError(f"expected a model like 'openai-chat:gpt-4o-mini' or 'offline:echo', got: {name!r}{hint}")
    return name


# --- messages ---------------------------------------------------------------------------------------------------------


def messages_of(request: Request) -> list[dict[str, Any]]:
    """Return a request in OpenAI's form: its prompt, and its answer that did not validate, if any. No instructions.

    Raises Permanent for messages of which a part would not be sent.
    """
    prompt, last_bad = request.prompt, request.last_bad
    if prompt.messages is None:
        messages = [{"role": "user", "content": prompt.text or ""}]
    else:
        try:  # again: an older version may have enqueued them
            messages = check_messages(prompt.messages)
        except InputError as error:
            raise Permanent(str(error)) from error
    if last_bad is not None:
        if last_bad.text.strip():
            messages.append({"role": "assistant", "content": last_bad.text})
        words = f"That answer does not fit what was asked for: {last_bad.message}\nGive a corrected answer."
        messages.append({"role": "user", "content": words})
    return messages
