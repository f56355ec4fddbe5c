"""What a batch would take, before anything is spent: rows, tokens, money, and the time at the limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.task import model_task
from lbr.core.config import at_least_one, load_environment, positive
from lbr.core.errors import UsageError
from lbr.core.pricing import (
    ASSUMED_OUTPUT_TOKENS,
    NANOS,
    estimate_tokens,
    max_output_tokens,
    read_price,
    table_price,
)
from lbr.core.types import KeyMaker
from lbr.io.sources import Source

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from lbr.core.pricing import Price
    from lbr.core.types import Item, Json, Task

SECONDS_PER_CALL = 3.0
"""How long a call is assumed to take where nobody said."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted in the inputs: all of them, the distinct prompts, and what the calls of those read."""

    inputs: int
    prompts: int
    input_tokens: int


@dataclass(frozen=True, slots=True)
class Pace:
    """What bounds the speed: calls and tokens a minute (None: nothing), calls at a time, seconds of one call.

    Raises UsageError for a value out of range.
    """

    rpm: float | None = None
    tpm: float | None = None
    concurrency: int = 32
    seconds_per_call: float = SECONDS_PER_CALL

    def __post_init__(self) -> None:
        """Check what comes from flags."""
        for name, value in (("rpm", self.rpm), ("tpm", self.tpm)):
            if value is not None:
                positive(name, value)
        positive("seconds_per_call", self.seconds_per_call)
        at_least_one("concurrency", self.concurrency)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What calling every distinct prompt once would take; failed tries and answers that are there do not count.

    `output_tokens_from` tells where the length of an answer comes from: "given", "max_tokens" or "assumed";
    `price_from` whence the `price` for a million tokens: "given" or "table". Price and `cost_usd` are None where
    no price is known. `bound_by` is what the `seconds` are set by: "rpm", "tpm" or "concurrency".
    """

    model: str
    inputs: int
    prompts: int
    duplicates: int
    input_tokens: int
    output_tokens: int
    output_tokens_per_call: int
    output_tokens_from: str
    price: dict[str, float] | None
    price_from: str | None
    cost_usd: float | None
    seconds: float
    bound_by: str
    rpm: float | None
    tpm: float | None
    concurrency: int
    seconds_per_call: float

    def to_dict(self) -> dict[str, Json]:
        """Return the numbers as JSON."""
        return asdict(self)


@checked
async def estimate(
    inputs: PathLike[str] | Iterable[PathLike[str] | str | dict[str, Json]],
    *,
    model: str | None = None,
    instructions: str | None = None,
    template: str | None = None,
    schema: dict[str, Json] | None = None,
    result_type: Any = None,
    settings: dict[str, Json] | None = None,
    prompt_column: str | None = None,
    input_format: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    skip_bad: PathLike[str] | str | None = None,
    skip_empty: bool = False,
    price: str | None = None,
    output_tokens: int | None = None,
    rpm: float | None = None,
    tpm: float | None = None,
    concurrency: int = 32,
    seconds_per_call: float = SECONDS_PER_CALL,
) -> Estimate:
    """Return what a batch would take: it is read as by `enqueue`, nothing is called and nothing is written.

    No key and no database is needed. Tokens of input are estimated from the number of characters. `output_tokens`
    is the length of an answer: unset, it is the setting max_tokens, the most that one may have, else an assumption.
    `price` unset is that of the price table. The time is the longest that the limits make of it: `rpm` calls and
    `tpm` tokens a minute, `concurrency` calls at a time of `seconds_per_call` each.

    Raises UsageError, or InputError with file and line.
    """
    task = model_task(
        model,
        instructions=instructions,
        template=template,
        settings=settings,
        schema=schema,
        result_type=result_type,
        env=load_environment(Path.cwd()),
    )
    pace = Pace(rpm, tpm, concurrency, seconds_per_call)
    length = answer_length(task, output_tokens)
    known = read_price(price) if price is not None else None
    source = Source.of(
        inputs,
        input_format=input_format,
        template=template,
        prompt_column=prompt_column,
        delimiter=delimiter,
        encoding=encoding,
        skip_bad=skip_bad,
        skip_empty=skip_empty,
    )
    counted = count(source.read(at_once=False), task)
    if not counted.inputs:
        raise source.nothing()
    found = known or table_price(task.answerer)
    origin = None if found is None else "table" if known is None else "given"
    return estimate_of(task.answerer, counted, pace, length=length, price=found, price_from=origin)


def count(items: Iterable[Item], task: Task) -> Counted:
    """Count inputs, distinct prompts and the tokens that their calls read; the keys are held in memory."""
    maker = KeyMaker(task)
    seen: set[bytes] = set()
    inputs = tokens = 0
    for item in items:
        inputs += 1
        key = maker.key(item.prompt)
        if key not in seen:
            seen.add(key)
            tokens += estimate_tokens(item.prompt, task)
    return Counted(inputs, len(seen), tokens)


def answer_length(task: Task, given: int | None) -> tuple[int, str]:
    """Return how many tokens an answer has, and whence that is known; UsageError for rubbish."""
    most = max_output_tokens(task.settings)
    if given is not None:
        if most is not None and at_least_one("output_tokens", given) > most:
            raise UsageError(f"expected output_tokens of at most max_tokens, {most}, got: {given}")
        return at_least_one("output_tokens", given), "given"
    return (ASSUMED_OUTPUT_TOKENS, "assumed") if most is None else (most, "max_tokens")


def estimate_of(
    model: str,
    counted: Counted,
    pace: Pace,
    *,
    length: tuple[int, str],
    price: Price | None,
    price_from: str | None = None,
) -> Estimate:
    """Do the arithmetic; `length` is the tokens of an answer and whence they are known."""
    per_call, output_from = length
    output_tokens = counted.prompts * per_call
    seconds, bound_by = time_at_limits(counted.prompts, counted.input_tokens + output_tokens, pace)
    cost = None if price is None else price.cost_nanos(counted.input_tokens, output_tokens)
    return Estimate(
        model=model,
        inputs=counted.inputs,
        prompts=counted.prompts,
        duplicates=counted.inputs - counted.prompts,
        input_tokens=counted.input_tokens,
        output_tokens=output_tokens,
        output_tokens_per_call=per_call,
        output_tokens_from=output_from,
        price=None if price is None else price.to_dict(),
        price_from=price_from,
        cost_usd=None if cost is None else cost / NANOS,
        seconds=seconds,
        bound_by=bound_by,
        rpm=pace.rpm,
        tpm=pace.tpm,
        concurrency=pace.concurrency,
        seconds_per_call=pace.seconds_per_call,
    )


def time_at_limits(calls: int, tokens: int, pace: Pace) -> tuple[float, str]:
    """Return the seconds that so many calls take at least, and which of the limits makes them."""
    # However many slots there are, no call is faster than one call.
    beside = max(calls / pace.concurrency, min(calls, 1)) * pace.seconds_per_call
    times = {
        "concurrency": beside,
        "rpm": 0.0 if pace.rpm is None else 60 * calls / pace.rpm,
        "tpm": 0.0 if pace.tpm is None else 60 * tokens / pace.tpm,
    }
    bound_by = max(times, key=lambda name: times[name])
    return times[bound_by], bound_by


def rounded(nanos: float, digits: int = 4) -> int:
    """Return an amount with no more digits than an estimate deserves."""
    whole = round(nanos)
    return whole if whole == 0 else round(whole, digits - 1 - math.floor(math.log10(abs(whole))))
