"""`lbr enqueue`, `lbr estimate` and dry runs, and the flags that describe the inputs and the task."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from lbr.api import enqueue as api
from lbr.api import estimate as estimate_api
from lbr.cli import completion
from lbr.cli.app import choice, echo, echo_json, log, option, options, read_settings, switch, with_database
from lbr.core.batches import LANES
from lbr.core.config import MAX_ATTEMPTS, WorkOptions
from lbr.core.errors import InputError, StoppedError
from lbr.core.pricing import CHARACTERS_PER_TOKEN, NANOS, Price, dollars, table_problem
from lbr.core.schema import load_schema
from lbr.core.text import duration, pluralize, read_text
from lbr.core.tiers import TIERS
from lbr.io.readers import InputFormat, is_stream
from lbr.io.sources import expanded
from lbr.models.offline import ECHO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbr.api.estimate import Estimate

SETTING = "A model setting, for example temperature=0.2 or max_tokens=200; may be repeated."
KEEP = "Keep more of each answer: reasoning, logprobs, raw, separated by commas."
ATTEMPTS = click.IntRange(1, 1_000_000)
SHOWN_CHARACTERS = 500
"""Of a prompt on a terminal, in a dry run."""

input_options = options(
    option("--instructions", "TEXT|@FILE", "The system prompt of every call."),
    option("--template", "JINJA|@FILE", "Make each prompt from a row's fields."),
    option("--prompt-column", "NAME", "The field or column that holds the prompt."),
    option("--id-column", "NAME", "The field or column that holds the id, instead of id or custom_id."),
    option("--schema", "FILE", "A JSON schema that every answer must fit."),
    option("--result-type", "MODULE:CLASS", "A pydantic class that every answer must fit."),
    option("--set", "NAME=VALUE", SETTING, multiple=True),
    choice("--tier", TIERS, "flex: slower answers at half the price, of OpenAI, Azure and Gemini."),
    choice("--format", InputFormat, "The input's format; by default what the file name ends with."),
    option("--delimiter", "CHAR", "What separates CSV cells; detected by default."),
    option("--encoding", "NAME", "For example cp1252; by default UTF-8, or what the BOM says."),
    option("--skip-bad", "FILE", "Leave out rows that cannot be used, and write them to FILE, as JSONL."),
    switch("--skip-empty", "Leave out rows whose prompt is empty."),
    option("--limit", "N", "Take only the first N inputs.", type=int),
    option("--pick", "N", "Take N inputs at random, in their order; their run is NAME-pick.", type=int),
    option("--seed", "N", "With --pick: a different number takes different inputs; 0 by default.", type=int),
    option("--samples", "N", "Answers per prompt; a larger number adds some to a run. 1 by default.", type=int),
    choice("--lane", LANES, "Call, or send batches, at half the price, or batches while many jobs are left."),
    option(
        "--price",
        "in=USD,out=USD",
        "US dollars per million tokens, perhaps with cached=USD; by default what the provider or the price table says.",
    ),
    option("--batch-factor", "FACTOR", "What flex and batch cost of --price; 0.5 by default.", type=float),
)
task_options = options(
    option("--run", "NAME", "The run's name; by default the input file's name without ending."),
    option("--model", "NAME", f"The model: openai-chat:gpt-4o-mini, openrouter:…, {ECHO}, …"),
    option("--function", "MODULE:NAME", "A Python function that answers instead of a model."),
    option("--version", "TEXT", "The function's version; with a new one, prompts are answered again."),
    input_options,
    option("--max-attempts", None, "Attempts per job before it fails.", type=ATTEMPTS, default=MAX_ATTEMPTS),
    option("--keep", "KINDS", KEEP, multiple=True),
    switch("--warm-cache", "Let the first call go alone, to fill the provider's cache for the others."),
    switch("--append", "Add the inputs to the end of the run."),
    switch("--fresh", "Do not reuse answers of other runs."),
    switch("--dry-run", "Only show three prompts, counts and the estimate; no key is needed."),
)


inputs_argument = click.argument(
    "inputs",
    nargs=-1,
    required=True,
    shell_complete=completion.files,
    callback=lambda _context, _argument, inputs: tuple(expanded(inputs)),
)


@contextmanager
def interruptible(inputs: tuple[str, ...], *, pick: int | None = None) -> Iterator[None]:
    """Let Ctrl-C end a read of a stream or of a whole pick: asyncio would only cancel the task, which the read ignores."""
    if pick is None and not any(map(is_stream, inputs)):
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def counting_kept(inputs: tuple[str, ...], *, append: bool) -> Iterator[Callable[[int], None]]:
    """Yield a callback for the number of inputs in the run; a Ctrl-C becomes a StoppedError that reports it."""
    counts = [0]
    try:
        yield counts.append
    except KeyboardInterrupt as error:
        kept = counts[-1]  # or more, because a write in progress still completes
        how_far = f"with the first {pluralize(kept, 'input')} in the run" if kept else "at the beginning"
        stream = " with the same input" if any(map(is_stream, inputs)) else ""
        words = f"interrupted {how_far}; run the same command again{stream} to continue"
        if append:
            words = (
                "interrupted; `lbr status` shows how many inputs the run has now. The same command would add those "
                "again: enqueue only the rest"
            )
        raise StoppedError(words) from error


def describe(report: api.EnqueueReport) -> str:
    """Return what an enqueue did, in words."""
    counts = report.counts
    words = [f"run {report.run}: {pluralize(counts.inputs, 'input')}"]
    words += [f"{report.samples} samples each"] * (report.samples > 1)
    words += [f"{getattr(counts, name)} {name}" for name in ("new", "duplicate", "reused", "known")]
    words += [f"{report.skipped_empty} empty skipped"] * bool(report.skipped_empty)
    words += [f"{report.skipped_bad} bad skipped"] * bool(report.skipped_bad)
    return ", ".join(words)


def load_text(text_or_at_file: str, what: str) -> str:
    """Return the argument itself, or the text of the UTF-8 file that `@path` names, without its last line break.

    `what` is the name of the text in messages. A template that starts with the sign is written `{{ '@' }}`.
    """
    is_file = text_or_at_file.startswith("@")
    return read_text(text_or_at_file[1:], what).removesuffix("\n") if is_file else text_or_at_file


def input_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that `input_options` stand for; the others of `flags` stay as they are."""
    for name, what in (("instructions", "instructions"), ("template", "a template")):
        flags[name] = None if flags[name] is None else load_text(flags[name], what)
    flags["schema"] = None if flags["schema"] is None else load_schema(flags["schema"])
    return flags | {"settings": read_settings(flags.pop("set")), "input_format": flags.pop("format")}


async def enqueue_inputs(
    db: dict[str, Any], inputs: tuple[str, ...], on_progress: Callable[[int], None], **flags: Any
) -> api.EnqueueReport:
    """Call `api.enqueue` with flags, and print its notices; `on_progress` gets the number of inputs in the run."""
    with interruptible(inputs, pick=flags["pick"]):
        report = await api.enqueue(list(map(Path, inputs)), on_kept=on_progress, **input_arguments(flags), **db)
    for notice in report.notices:
        log(notice)
    return report


@click.command()
@inputs_argument
@task_options
@switch("--json", "Print the counts as JSON.")
@with_database
def enqueue(db: dict[str, Any], /, inputs: tuple[str, ...], json: bool, dry_run: bool, **flags: Any) -> None:
    """Add prompts to a run, each distinct prompt once.

    INPUTS are text files (one prompt per line), JSONL, CSV, TSV or Parquet files, patterns like 'data/*.jsonl', or - for
    stdin. Running the same command again adds nothing; after a crash it adds what is missing.
    """
    if dry_run:
        show_dry_run(inputs, json=json, **flags)
        return
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        report = asyncio.run(enqueue_inputs(db, inputs, on_progress, **flags))
    others = {name: getattr(report, name) for name in ("skipped_bad", "skipped_empty", "samples")}
    echo_json({"run": report.run} | asdict(report.counts) | others) if json else echo(describe(report))


@click.command()
@inputs_argument
@option("--model", "NAME", "The model, as for `lbr enqueue`.")
@input_options
@option("--output-tokens", "N", "Tokens per answer; by default max_tokens, or an assumption.", type=int)
@option("--rpm", "N", "Requests per minute that the provider allows.", type=float)
@option("--tpm", "N", "Tokens per minute that the provider allows.", type=float)
@option("--concurrency", None, "Calls at a time, all workers together.", default=WorkOptions().concurrency)
@option("--seconds-per-call", None, "Seconds that one call takes.", default=estimate_api.SECONDS_PER_CALL)
@switch("--json", "Print one JSON object.")
def estimate(inputs: tuple[str, ...], json: bool, **flags: Any) -> None:
    """Estimate tokens, cost and time before you spend anything.

    INPUTS are read as by `lbr enqueue`. Only models are estimated, not functions. Nothing is called or written; you
    need neither a key nor a database.
    """
    found = estimate_inputs(inputs, **input_arguments(flags))
    echo_json(found.to_dict()) if json else echo(_describe_estimate(found))


def show_dry_run(inputs: tuple[str, ...], *, json: bool = False, **flags: Any) -> None:
    """Print what an enqueue with these flags would do: prompts, counts and the estimate. Raises InputError for bad rows."""
    known = signature(estimate_api.estimate).parameters
    arguments = {name: value for name, value in input_arguments(flags).items() if name in known}
    found = estimate_inputs(inputs, count_bad=True, **arguments)
    if json:
        echo_json(found.to_dict())
    else:
        for number, example in enumerate(found.examples, start=1):
            text = example if isinstance(example, str) else orjson.dumps(example).decode()
            is_long = sys.stdout.isatty() and len(text) > SHOWN_CHARACTERS
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)" if is_long else text
            echo(f"--- prompt {number} of {found.prompts}\n{text}")
        echo(f"---\n{_describe_estimate(found)}")
    log("dry run: nothing was written and no model was called")
    if found.refusal:
        raise InputError(found.refusal)


def estimate_inputs(inputs: tuple[str, ...], **arguments: Any) -> Estimate:
    """Call `api.estimate`."""

    async def reading() -> Estimate:
        with interruptible(inputs):
            return await estimate_api.estimate(list(map(Path, inputs)), **arguments)

    return asyncio.run(reading())


def _describe_estimate(found: Estimate) -> str:
    tokens, each = pluralize(found.output_tokens, "token"), found.output_tokens_per_call
    output = {
        "max_tokens": f"at most {tokens}, max_tokens={each} per answer",
        "given": f"about {tokens}, {each} per answer",
        "unknown": "",
        "assumed": f"about {tokens}, assumed to be {each} per answer: set --output-tokens or --set max_tokens=…",
    }[found.output_tokens_from]
    calls, all_tokens = pluralize(found.prompts * found.samples, "call"), found.input_tokens + found.output_tokens
    why = {
        "rpm": f"{calls} at {found.rpm or 0:g} per minute",
        "tpm": f"{all_tokens} tokens at {found.tpm or 0:g} per minute",
        "batch": "the provider's batches take up to a day, and often less",
        "concurrency": f"{calls} of {found.seconds_per_call:g} s, {found.concurrency} at a time",
    }[found.bound_by]
    counts = f"{found.duplicates} duplicate, {found.empty} empty, {found.bad} bad"
    samples = f"; {found.samples} samples each" if found.samples > 1 else ""
    lines = [
        f"{found.model}: {pluralize(found.inputs, 'input')}, {found.prompts} distinct, {counts}{samples}",
        f"input: about {pluralize(found.input_tokens, 'token')}, estimated at {CHARACTERS_PER_TOKEN} characters per token",
        f"output: {output}",
        f"cost: {_cost_words(found)}",
        f"time: about {duration(found.seconds)}: {why}",
    ]
    return "\n".join(lines[:2] if found.output_tokens_from == "unknown" else lines)


def _cost_words(found: Estimate) -> str:
    if found.price is None or found.cost_usd is None:
        problem = table_problem()
        why = "" if problem is None else f", because the price table cannot be loaded ({problem})"
        return f"price unknown{why}: set --price in=…,out=…"
    price = Price(found.price["in"], found.price["out"], cached_per_million=found.price.get("cached")).words()
    source = ", by the price table" if found.price_from == "table" else ""
    cost = dollars(estimate_api.rounded(found.cost_usd * NANOS))
    batched = ", in batches" if found.bound_by == "batch" else ""
    return f"about {cost} at {price} per million tokens{source}{batched}"
