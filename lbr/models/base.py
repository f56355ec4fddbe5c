"""The seam to whoever answers: one protocol, and the reading of names."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from lbr.core.errors import UsageError
from lbr.core.pricing import table_price
from lbr.core.values import value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.pricing import Price
    from lbr.core.types import BadTry, JobId, Json, Prompt, Reply, Task

OFFLINE = "offline:"
OPENROUTER = "openrouter:"


@value(frozen=True, slots=True)
class Request:
    """One call. `seq` counts the job's claims, so a seeded model can tell tries apart.

    `last_bad` is the job's previous answer that did not validate, None where there was none; a model that can
    shows it to the provider together with the validator's words. `settings` are this job's own and go over the
    task's, None where it has none. `timeout` is after how many seconds nobody waits for the answer any more, None
    where there is no such bound; a client of its own must not give up before.
    """

    prompt: Prompt
    task: Task
    job_id: JobId
    seq: int
    last_bad: BadTry | None = None
    settings: Mapping[str, Json] | None = None
    timeout: float | None = None


class Model(Protocol):
    """Something that answers prompts. It makes one plain call per `answer` and never retries by itself."""

    async def answer(self, request: Request) -> Reply:
        """Answer one request.

        Raises `lbr.core.errors.CallError` with the family of the failure; any other exception counts as transient.
        """
        ...

    async def aclose(self) -> None:
        """Close connections; the model is not used again."""
        ...


class Kind(StrEnum):
    """Who serves a task: a user's function, the offline model, or a provider by whichever adapter fits."""

    FUNCTION = "function"
    OFFLINE = "offline"
    PROVIDER = "provider"


def kind_of(task: Task) -> Kind:
    """Tell which kind of answerer a task names."""
    if task.function is not None:
        return Kind.FUNCTION
    return Kind.OFFLINE if (task.model or "").startswith(OFFLINE) else Kind.PROVIDER


def tells_cost(task: Task, price: Price | None) -> bool:
    """Tell whether it will be known what a call costs: by a price of its run, the answerer's word, or the price table."""
    match kind_of(task):
        case Kind.FUNCTION:
            return False  # of its calls not even the tokens are known
        case Kind.OFFLINE:
            return True
    named = task.answerer.startswith(OPENROUTER) or price is not None
    return named or table_price(task.answerer) is not None


def model_string(name: str) -> str:
    """Read a model's name as users write it and return the full string, `provider:model`.

    A name with a provider before its first colon stays as it is; anything else (`google/gemini-flash`,
    `meta-llama/llama-3:free`) is OpenRouter's. Raises UsageError for an empty name.
    """
    name = name.strip()
    provider, colon, rest = name.partition(":")
    if not name or (colon and (not provider or not rest)):
        raise UsageError(f"expected a model like 'openai-chat:gpt-4o-mini' or 'offline:echo', got: {name!r}")
    if colon and "/" not in provider:
        return name
    if "/" in name:
        return OPENROUTER + name
    raise UsageError(
        f"expected a model like 'openai-chat:gpt-4o-mini', 'openrouter:google/gemini-flash' or 'offline:echo', "
        f"got: {name!r}; put its provider and a colon before it"
    )
