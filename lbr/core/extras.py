"""What can come with an answer if it is asked for: what the call took, and what the run keeps of each reply."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

import orjson

from lbr.core import value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lbr.core.types import Json


class Include(StrEnum):
    """What a collected row can have beside its answer, if it is asked for."""

    USAGE = "usage"
    REASONING = "reasoning"
    LOGPROBS = "logprobs"
    RAW = "raw"


class Extra(StrEnum):
    """What a run may keep besides its answers."""

    REASONING = "reasoning"
    LOGPROBS = "logprobs"
    RAW = "raw"


@value(frozen=True, slots=True)
class Extras:
    """What came with an answer, by `Extra`: None if it is not kept, "" if none came. `logprobs` is JSON."""

    reasoning: str | None = None
    logprobs: str | None = None
    raw: str | None = None

    def to_dict(self, kinds: Iterable[Extra]) -> dict[str, Json]:
        """Return these kinds as they are collected, None for what did not come or is not kept."""
        found: dict[str, Json] = {str(kind): getattr(self, kind) or None for kind in kinds}
        if found.get(Extra.LOGPROBS):
            with suppress(ValueError):  # another program wrote it
                found[Extra.LOGPROBS] = orjson.loads(found[Extra.LOGPROBS])
        return found


@value(frozen=True, slots=True)
class RowUsage:
    """What the call took that ended a job: that of its answer, or of its last failed try.

    `model` is the name that the provider reported. What is not known is None. `attempts` are those charged to the job.
    `lane` of an answer is "online" or "batch".
    """

    model: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    latency_ms: int | None = None
    attempts: int = 0
    lane: str | None = None
