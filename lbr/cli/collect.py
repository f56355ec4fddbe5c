"""`lbr collect`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import click

from lbr.api import collect as api
from lbr.api.status import printable
from lbr.cli.app import EXIT_FAILURES, EXIT_UNFINISHED, database_option, log, with_options
from lbr.core.text import pluralize
from lbr.core.types import Shape
from lbr.io.writers import OutputFormat

F = TypeVar("F", bound=Callable[..., Any])

SHOWN_REASONS = 3


def csv_options(command: F) -> F:
    """Add the flags that say how CSV is written."""
    options = [
        click.option(
            "--spreadsheet-safe",
            is_flag=True,
            help="CSV: put an apostrophe before a text that a spreadsheet would run as a formula.",
        ),
        click.option("--bom", is_flag=True, help="CSV: begin with a byte order mark, for Excel."),
    ]
    return with_options(command, options)


def describe(collected: api.Collected) -> str:
    """Return what a collect wrote, in words."""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(collected.by_status.items()))
    return f"run {collected.run}: {pluralize(collected.total, 'row')}: {counts or 'none'}"


def cut_off_words(run: str, count: int, *, limited: bool) -> str:
    """Return what to do about answers that reached a token limit; `limited` is True if the settings set it."""
    command = f"lbr retry {run} --where finish_reason=length"
    if limited:
        return f"{pluralize(count, 'answer')} cut off at max_tokens; to redo: `{command} --set max_tokens=NUMBER`"
    return (
        f"{pluralize(count, 'answer')} cut off at the token limit of the model; ask for shorter answers or use another "
        f"model, or redo: `{command}`"
    )


def exit_code(collected: api.Collected) -> int:
    """Return 3 where answers may still come, 4 where some never will, else 0; say what to do."""
    if collected.cut_off:
        log(f"lbr: {cut_off_words(collected.run, collected.cut_off, limited=collected.limited)}")
    if not collected.sealed:
        log(
            f"lbr: the enqueue of run {collected.run} has not come to its end; run it again if it was interrupted"
        )
    if collected.unfinished or not collected.sealed:
        rows, them = (
            ("1 row is", "it") if collected.unfinished == 1 else (f"{collected.unfinished} rows are", "them")
        )
        log(f"lbr: {rows} not finished; `lbr worker` finishes {them}")
        return EXIT_UNFINISHED
    if collected.failed:
        rows, jobs = (
            ("1 row has", "its job")
            if collected.failed == 1
            else (f"{collected.failed} rows have", "their jobs")
        )
        log(f"lbr: {rows} no answer{_reasons(collected)}; `lbr retry {collected.run}` puts {jobs} back")
        return EXIT_FAILURES
    return 0


def _reasons(collected: api.Collected) -> str:
    """Return what most of the failed rows said, behind a colon; empty if none failed."""
    most = sorted(collected.reasons.items(), key=lambda one: -one[1])[:SHOWN_REASONS]
    alone = len(collected.reasons) == 1
    words = "; ".join(
        printable(reason)[:200] + ("" if alone else f" ({pluralize(count, 'row')})") for reason, count in most
    )
    more = len(collected.reasons) - len(most)
    return f": {words}{f'; and {more} other reasons' if more else ''}" if words else ""


@click.command()
@click.argument("run")
@click.option("-o", "--output", metavar="FILE", help="A .jsonl, .csv or .db file; JSONL to stdout if unset.")
@click.option(
    "--shape",
    type=click.Choice([str(one) for one in Shape]),
    default=str(Shape.ORIGINAL),
    help="A row for every input, or for every distinct one.",
)
@click.option(
    "--format",
    type=click.Choice([str(one) for one in OutputFormat]),
    help="How to write; by the file's ending if unset.",
)
@csv_options
@click.option("--wait", is_flag=True, help="Wait until every job has come to its end.")
@database_option
@click.pass_obj
@click.pass_context
def collect(
    context: click.Context, db: dict[str, Any], /, run: str, output: str | None, **flags: Any
) -> None:
    """Write a run's answers in input order, finished or not.

    A file appears whole or not at all. Exits with 3 where jobs are not finished, with 4 where some failed.
    """
    collected = asyncio.run(api.collect(run, out="-" if output is None else output, **flags, **db))
    log(f"lbr: {describe(collected)}")
    context.exit(exit_code(collected))
