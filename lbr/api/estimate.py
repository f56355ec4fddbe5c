"""What a batch would take, before anything is spent: rows, tokens, dollars, and the time at the limits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import Frame, Inputs, checked
from lbr.api.task import model_task, resolve_task
from lbr.core.batches import AUTO_REQUESTS, TAIL, Lane
from lbr.core.config import CONCURRENCY, at_least_one, load_environment, positive
from lbr.core.errors import UsageError
from lbr.core.pricing import (
    ASSUMED_OUTPUT_TOKENS,
    NANOS,
    estimate_tokens,
    max_output_tokens,
    price_of,
    processing_of,
    read_price,
)
from lbr.core.tiers import sent_settings
from lbr.core.types import MAX_SAMPLES, KeyMaker, Report
from lbr.io.samples import Sample
from lbr.io.sources import Source
from lbr.models.batches import check_lane

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike

    from lbr.core.types import Item, Json, Task

SECONDS_PER_CALL = 3.0
EXAMPLES = 3
DAY_SECONDS = 86_400.0
"""The longest that a provider takes for a batch."""


@dataclass(frozen=True, slots=True)
class Estimate(Report):
    """What calling every distinct prompt `samples` times would take; retries and existing answers do not count.

    `empty` and `bad` count the rows without a usable prompt, `refusal` is what `lbr enqueue` would say about them, None if
    they are skipped. `examples` are the first distinct prompts, texts or lists of messages.
    `output_tokens_from` is the source of an answer's length: "given", "max_tokens", "assumed", or for a function
    "unknown". `price` is for a million tokens, `price_from` its source: "given" or "table"; both and `cost_usd` are None if
    no price is known. `bound_by` is what limits the speed: "rpm", "tpm", "concurrency", or "batch" for a provider's batches.
    """

    model: str
    inputs: int
    samples: int
    prompts: int
    duplicates: int
    empty: int
    bad: int
    refusal: str | None
    examples: list[Json]
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


@checked
async def estimate(
    inputs: Inputs | Frame,
    *,
    model: str | None = None,
    function: Callable[..., Any] | str | None = None,
    instructions: str | None = None,
    template: str | None = None,
    schema: dict[str, Json] | None = None,
    result_type: Any = None,
    settings: dict[str, Json] | None = None,
    tier: str | None = None,
    prompt_column: str | None = None,
    id_column: str | None = None,
    input_format: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    skip_bad: PathLike[str] | str | None = None,
    skip_empty: bool = False,
    limit: int | None = None,
    pick: int | None = None,
    seed: int | None = None,
    samples: int | None = None,
    lane: str | None = None,
    count_bad: bool = False,
    price: str | None = None,
    batch_factor: float | None = None,
    output_tokens: int | None = None,
    rpm: float | None = None,
    tpm: float | None = None,
    concurrency: int = CONCURRENCY,
    seconds_per_call: float = SECONDS_PER_CALL,
) -> Estimate:
    """Return what a batch would take. Inputs are read as by `enqueue`; nothing is called or written.

    No key and no database is needed. Input tokens are estimated from the number of characters. Limits that OpenAI batch
    lines set for themselves do not count.
    `function`: count and show its prompts; its output and cost are unknown. `samples`: answers per prompt; None is 1.
    `lane`: "batch", or "auto" with many prompts, estimates the provider's batches, which take up to a day.
    `count_bad`: count the rows that an enqueue would refuse, instead of raising InputError.
    `output_tokens` is the length of an answer; None is the setting max_tokens, or else an assumption.
    `price`, for example "in=0.15,out=0.60" in US dollars per million tokens; None is that of the price table.
    `tier`: "flex" for its prices. `batch_factor`: what flex and batch cost of `price`; None is 0.5.
    The time is the longest of three: `rpm` calls a minute, `tpm` tokens a minute (None: no limit), and `concurrency`
    calls at a time of `seconds_per_call` each.

    Raises UsageError, or InputError with file and line.
    """
    given_price = read_price(price, batch_factor)
    source = Source(
        inputs,
        input_format=input_format,
        template=template,
        prompt_column=prompt_column,
        id_column=id_column,
        delimiter=delimiter,
        encoding=encoding,
        skip_bad=skip_bad,
        skip_empty=skip_empty,
        sample=Sample(limit, pick, seed),
    )
    fields = {"instructions": instructions, "template": template, "settings": settings, "schema": schema, "tier": tier}
    task = _task(model, function, source=source, result_type=result_type, **fields)
    limits: dict[str, Any] = {"rpm": rpm, "tpm": tpm, "concurrency": concurrency, "seconds_per_call": seconds_per_call}
    samples = 1 if samples is None else at_least_one("samples", samples, most=MAX_SAMPLES)
    at_least_one("concurrency", concurrency)
    positive("seconds_per_call", seconds_per_call)
    for name in [name for name in ("rpm", "tpm") if limits[name] is not None]:
        positive(name, limits[name])
    per_call, length_from = answer_length(task, output_tokens)
    count, prompts, input_tokens, examples = count_inputs(source.read(dry=True), task)
    refusal = source.bad.refusal()
    if not count or (refusal and not count_bad):
        raise refusal or source.nothing()
    input_tokens, output = input_tokens * samples, prompts * samples * per_call
    check_lane(lane, task, os.environ.get("OPENAI_BASE_URL"))
    calls = prompts * samples
    batched = lane in {Lane.BATCH, Lane.AUTO} and calls >= (AUTO_REQUESTS if lane == Lane.AUTO else TAIL + 1)
    processing = "batch" if batched else processing_of(sent_settings(task))
    known = None if length_from == "unknown" else price_of(task.answerer, given_price, processing)
    limited = time_at_limits(calls, input_tokens + output, limits)
    seconds, bound_by = (DAY_SECONDS, "batch") if batched else limited
    return Estimate(
        model=task.answerer,
        inputs=count,
        samples=samples,
        prompts=prompts,
        duplicates=count - prompts,
        empty=source.bad.empty + source.bad.blank,
        bad=source.bad.count - source.bad.blank,
        refusal=None if refusal is None else str(refusal),
        examples=examples,
        input_tokens=input_tokens,
        output_tokens=output,
        output_tokens_per_call=per_call,
        output_tokens_from=length_from,
        price=None if known is None else known.to_dict(),
        price_from=None if known is None else "table" if given_price is None else "given",
        cost_usd=None if known is None else known.cost_nanos(input_tokens, output) / NANOS,
        seconds=seconds,
        bound_by=bound_by,
        **limits,
    )


def _task(model: str | None, function: Callable[..., Any] | str | None, **fields: Any) -> Task:
    env = load_environment(Path.cwd())
    if function is None:
        return model_task(model, env=env, **fields)
    return resolve_task(model=model, function=function, env=env, **fields).task


def count_inputs(items: Iterable[Item], task: Task) -> tuple[int, int, int, list[Json]]:
    """Return the numbers of inputs, distinct prompts and input tokens, and the first prompts; keys are held in memory."""
    maker = KeyMaker(task)
    seen: set[bytes] = set()
    examples: list[Json] = []
    inputs = tokens = 0
    for item in items:
        inputs += 1
        key = maker.key(item.prompt)
        if key not in seen:
            seen.add(key)
            tokens += estimate_tokens(item.prompt, task)
            if len(examples) < EXAMPLES:
                examples.append(item.prompt.text if item.prompt.messages is None else list(item.prompt.messages))
    return inputs, len(seen), tokens, examples


def answer_length(task: Task, given: int | None) -> tuple[int, str]:
    """Return the tokens of an answer and the source of that number; UsageError for one out of range."""
    most = max_output_tokens(task.settings)
    if given is None and task.model is None:
        return 0, "unknown"
    if given is None:
        return (ASSUMED_OUTPUT_TOKENS, "assumed") if most is None else (most, "max_tokens")
    at_least_one("output_tokens", given)
    if most is not None and given > most:
        raise UsageError(f"expected output_tokens of at most max_tokens, {most}, got: {given}")
    return given, "given"


def time_at_limits(calls: int, tokens: int, limits: Mapping[str, Any]) -> tuple[float, str]:
    """Return the least seconds that these calls take, and the limit that causes them."""
    rpm, tpm = limits["rpm"], limits["tpm"]
    times = {
        # However many slots there are, no call is faster than one call.
        "concurrency": max(calls / limits["concurrency"], min(calls, 1)) * limits["seconds_per_call"],
        "rpm": 0.0 if rpm is None else 60 * calls / rpm,
        "tpm": 0.0 if tpm is None else 60 * tokens / tpm,
    }
    bound_by = max(times, key=times.__getitem__)
    return times[bound_by], bound_by


def rounded(nanos: float) -> int:
    """Return an amount with the few digits that an estimate deserves."""
    return round(float(f"{nanos:.4g}"))
