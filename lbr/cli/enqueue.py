"""`lbr enqueue`, and the flags that describe the inputs and the task."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbr.api import enqueue as api
from lbr.cli.app import choice, echo, echo_json, log, option, options, read_settings, switch, with_database
from lbr.core.config import MAX_ATTEMPTS
from lbr.core.errors import StoppedError
from lbr.core.schema import load_schema
from lbr.core.text import pluralize, read_text
from lbr.io.readers import InputFormat, is_stream
from lbr.models.offline import ECHO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTING = "A model setting, for example temperature=0.2 or max_tokens=200; may be repeated."
ATTEMPTS = click.IntRange(1, 1_000_000)

input_options = options(
    option("--instructions", "TEXT|@FILE", "The system prompt of every call."),
    option("--template", "JINJA|@FILE", "Make each prompt from a row's fields."),
    option("--prompt-column", "NAME", "The field or column that holds the prompt."),
    option("--schema", "FILE", "A JSON schema that every answer must fit."),
    option("--result-type", "MODULE:CLASS", "A pydantic class that every answer must fit."),
    option("--set", "NAME=VALUE", SETTING, multiple=True),
    choice("--format", InputFormat, "The input's format; by default what the file name ends with."),
    option("--delimiter", "CHAR", "What separates CSV cells; detected by default."),
    option("--encoding", "NAME", "For example cp1252; by default UTF-8, or what the BOM says."),
    option("--skip-bad", "FILE", "Leave out rows that cannot be used, and write them to FILE, as JSONL."),
    switch("--skip-empty", "Leave out rows whose prompt is empty."),
    option(
        "--price",
        "in=USD,out=USD",
        "US dollars per million tokens; by default what the provider or the price table says.",
    ),
)
task_options = options(
    option("--run", "NAME", "The run's name; by default the input file's name without ending."),
    option("--model", "NAME", f"The model: openai-chat:gpt-4o-mini, openrouter:…, {ECHO}, …"),
    option("--function", "MODULE:NAME", "A Python function that answers instead of a model."),
    option("--version", "TEXT", "The function's version; with a new one, prompts are answered again."),
    input_options,
    option("--max-attempts", None, "Attempts per job before it fails.", type=ATTEMPTS, default=MAX_ATTEMPTS),
    switch("--append", "Add the inputs to the end of the run."),
    switch("--fresh", "Do not reuse answers of other runs."),
)


@contextmanager
def interruptible(inputs: tuple[str, ...]) -> Iterator[None]:
    """Let Ctrl-C end a read that waits for a stream: asyncio would only cancel the task, which the read ignores."""
    if not any(map(is_stream, inputs)):
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
    with interruptible(inputs):
        report = await api.enqueue(list(map(Path, inputs)), on_kept=on_progress, **input_arguments(flags), **db)
    for notice in report.notices:
        log(notice)
    return report


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@task_options
@switch("--json", "Print the counts as JSON.")
@with_database
def enqueue(db: dict[str, Any], /, inputs: tuple[str, ...], json: bool, **flags: Any) -> None:
    """Add prompts to a run, each distinct prompt once.

    INPUTS are text files (one prompt per line), JSONL, CSV or TSV files, or - for stdin. Running the same command
    again adds nothing; after a crash it adds what is missing.
    """
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        report = asyncio.run(enqueue_inputs(db, inputs, on_progress, **flags))
    skipped = {"skipped_bad": report.skipped_bad, "skipped_empty": report.skipped_empty}
    echo_json({"run": report.run} | asdict(report.counts) | skipped) if json else echo(describe(report))
