"""`lbr enqueue`, and the flags that say what is asked of the inputs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson

from lbr.api import enqueue as api
from lbr.cli.app import database_option, echo, log, read_setting, with_options
from lbr.core.config import MAX_ATTEMPTS
from lbr.core.errors import StoppedError
from lbr.core.schema import load_schema
from lbr.core.text import pluralize
from lbr.io.readers import InputFormat, is_stream, load_text
from lbr.models.offline import ECHO

F = TypeVar("F", bound=Callable[..., Any])

ATTEMPTS_LIMIT = 1_000_000


def input_options(command: F) -> F:
    """Add the flags that say how the inputs are written and what is asked of them, and what that costs."""
    options = [
        click.option("--instructions", metavar="TEXT|@FILE", help="The system prompt of every call."),
        click.option("--template", metavar="JINJA|@FILE", help="Makes each prompt from a row's fields."),
        click.option("--prompt-column", metavar="NAME", help="The field or column that holds the prompt."),
        click.option("--schema", metavar="FILE", help="A JSON schema that every answer must fit."),
        click.option(
            "--result-type", metavar="MODULE:CLASS", help="A pydantic class that every answer must fit."
        ),
        click.option(
            "--set",
            metavar="NAME=VALUE",
            multiple=True,
            help="A model setting, such as temperature=0.2 or max_tokens=200; may be repeated.",
        ),
        click.option(
            "--format",
            type=click.Choice([str(one) for one in InputFormat]),
            help="How the input is written; by its file ending if unset.",
        ),
        click.option("--delimiter", metavar="CHAR", help="What separates CSV cells; found out if unset."),
        click.option("--encoding", metavar="NAME", help="Such as cp1252; UTF-8, or by the BOM, if unset."),
        click.option(
            "--skip-bad", metavar="FILE", help="Leave out rows that are bad, and write them to FILE."
        ),
        click.option("--skip-empty", is_flag=True, help="Leave out rows whose prompt is empty."),
        click.option(
            "--price",
            metavar="in=USD,out=USD",
            help="Dollars for a million tokens; as the provider or the price table says if unset.",
        ),
    ]
    return with_options(command, options)


def task_options(command: F) -> F:
    """Add the flags that make a task and choose its inputs."""
    keeping = [
        click.option(
            "--max-attempts",
            type=click.IntRange(1, ATTEMPTS_LIMIT),
            default=MAX_ATTEMPTS,
            help="Charged tries of a job before it fails.",
        ),
        click.option("--append", is_flag=True, help="Add the inputs behind those the run holds."),
        click.option("--fresh", is_flag=True, help="Call again for what other runs have already answered."),
    ]
    naming = [
        click.option("--run", metavar="NAME", help="The run's name; the input file's stem if unset."),
        click.option(
            "--model", metavar="NAME", help=f"Who answers: openai-chat:gpt-4o-mini, openrouter:…, {ECHO}, …"
        ),
        click.option(
            "--function", metavar="MODULE:NAME", help="A Python function that answers instead of a model."
        ),
        click.option(
            "--version", "version", metavar="TEXT", help="The function's version: another one is other work."
        ),
    ]
    return with_options(input_options(with_options(command, keeping)), naming)


@contextmanager
def interruptible(inputs: tuple[str, ...]) -> Iterator[None]:
    """Let Ctrl-C end a read that waits for a stream: asyncio cancels a task, of which a read hears nothing."""
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
    """Yield what wants to hear how many inputs are in the run; a Ctrl-C becomes a StoppedError that tells it."""
    kept = 0

    def on_progress(count: int) -> None:
        nonlocal kept
        kept = count

    try:
        yield on_progress
    except KeyboardInterrupt as error:
        raise StoppedError(_interrupted_words(inputs, kept, append=append)) from error


def _interrupted_words(inputs: tuple[str, ...], kept: int, *, append: bool) -> str:
    """Return what to do after an interrupted enqueue. More than `kept` may be in: what is being written still gets there."""
    if append:
        return (
            "interrupted; `lbr status` tells how many inputs the run holds by now. The same command would add those "
            "again: enqueue the rest alone"
        )
    begun = (
        f"interrupted with the first {pluralize(kept, 'input')} in the run"
        if kept
        else "interrupted at the beginning"
    )
    same = (
        "the same command again with the same input"
        if any(map(is_stream, inputs))
        else "the same command again"
    )
    return f"{begun}; run {same} to go on"


def describe(report: api.EnqueueReport) -> str:
    """Return what an enqueue did, in words."""
    counts = report.counts
    skipped = "".join(
        f", {count} {kind} skipped"
        for kind, count in (("empty", report.skipped_empty), ("bad", report.skipped_bad))
        if count
    )
    return (
        f"run {report.run}: {pluralize(counts.inputs, 'input')}, {counts.new} new, {counts.duplicate} duplicate, "
        f"{counts.reused} reused, {counts.known} known{skipped}"
    )


async def enqueue_inputs(
    db: dict[str, Any], inputs: tuple[str, ...], on_progress: Callable[[int], None], **flags: Any
) -> api.EnqueueReport:
    """Turn flags into a call of `api.enqueue` and tell what it did; `hear` is told how many inputs are kept."""
    template, schema, instructions = flags.pop("template"), flags.pop("schema"), flags.pop("instructions")
    settings = dict(read_setting(one) for one in flags.pop("set"))
    with interruptible(inputs):
        report = await api.enqueue(
            [Path(name) for name in inputs],
            instructions=None if instructions is None else load_text(instructions, "instructions"),
            template=None if template is None else load_text(template, "a template"),
            schema=None if schema is None else load_schema(schema),
            settings=settings,
            input_format=flags.pop("format"),
            on_kept=on_progress,
            **flags,
            **db,
        )
    for notice in report.notices:
        log(f"lbr: {notice}")
    return report


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@task_options
@click.option("--json", is_flag=True, help="Print the counts as JSON.")
@database_option
@click.pass_obj
def enqueue(db: dict[str, Any], /, inputs: tuple[str, ...], json: bool, **flags: Any) -> None:
    """Put prompts into a run, each distinct one once.

    INPUTS are text files (a prompt a line), JSONL, CSV or TSV, or - for stdin. Running the same command again adds
    nothing; after a crash it completes what is missing.
    """
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        report = asyncio.run(enqueue_inputs(db, inputs, on_progress, **flags))
    if json:
        fields = {name: getattr(report.counts, name) for name in report.counts.__slots__}
        fields |= {"skipped_bad": report.skipped_bad, "skipped_empty": report.skipped_empty}
        echo(orjson.dumps({"run": report.run} | fields))
        return
    echo(describe(report))
