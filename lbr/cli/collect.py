"""`lbr collect`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from lbr.api import collect as api
from lbr.api.status import printable
from lbr.cli.app import EXIT_FAILURES, EXIT_UNFINISHED, database_option, log, options
from lbr.core.text import pluralize
from lbr.core.types import Shape
from lbr.io.writers import OutputFormat

SHOWN_REASONS = 3

output_options = options(
    click.option(
        "--shape",
        type=click.Choice([str(one) for one in Shape]),
        default=str(Shape.ORIGINAL),
        help="Write a row for every input, or for every distinct one.",
    ),
    click.option(
        "--spreadsheet-safe",
        is_flag=True,
        help="CSV: put an apostrophe before text that a spreadsheet would run as a formula.",
    ),
    click.option("--bom", is_flag=True, help="CSV: start with a byte order mark, for Excel."),
)


def describe(collected: api.Collected) -> str:
    """Return what a collect wrote, in words."""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(collected.by_status.items()))
    return f"run {collected.run}: {pluralize(collected.total, 'row')}: {counts or 'none'}"


def cut_off_words(run: str, count: int, *, limited: bool) -> str:
    """Return what to do about answers that reached a token limit; `limited` is True if the settings set it."""
    answers, command = (
        f"{pluralize(count, 'answer')} cut off",
        f"lbr retry {run} --where finish_reason=length",
    )
    if limited:
        return f"{answers} at max_tokens; to redo: `{command} --set max_tokens=NUMBER`"
    advice = "ask for shorter answers or use another model, or redo"
    return f"{answers} at the token limit of the model; {advice}: `{command}`"


def exit_code(collected: api.Collected) -> int:
    """Return 3 if answers may still come, 4 if some never will, else 0; print what to do."""
    if collected.cut_off:
        log(f"lbr: {cut_off_words(collected.run, collected.cut_off, limited=collected.limited)}")
    if not collected.sealed:
        log(f"lbr: the enqueue of run {collected.run} has not finished; run it again if it was interrupted")
    if collected.unfinished or not collected.sealed:
        one = collected.unfinished == 1
        rows, them = ("1 row is", "it") if one else (f"{collected.unfinished} rows are", "them")
        log(f"lbr: {rows} not finished; `lbr worker` finishes {them}")
        return EXIT_UNFINISHED
    if collected.failed:
        one = collected.failed == 1
        rows, jobs = ("1 row has", "its job") if one else (f"{collected.failed} rows have", "their jobs")
        log(f"lbr: {rows} no answer{_reasons(collected)}; `lbr retry {collected.run}` puts {jobs} back")
        return EXIT_FAILURES
    return 0


def _reasons(collected: api.Collected) -> str:
    """Return the most frequent errors of the failed rows, after a colon; empty if none failed."""
    most = sorted(collected.reasons.items(), key=lambda one: -one[1])[:SHOWN_REASONS]
    alone = len(collected.reasons) == 1
    words = "; ".join(
        printable(reason)[:200] + ("" if alone else f" ({pluralize(count, 'row')})") for reason, count in most
    )
    more = len(collected.reasons) - len(most)
    return f": {words}{f'; and {more} other reasons' if more else ''}" if words else ""


@click.command()
@click.argument("run")
@click.option("-o", "--output", metavar="FILE", help="A .jsonl, .csv or .db file; JSONL to stdout by default.")
@click.option(
    "--format",
    type=click.Choice([str(one) for one in OutputFormat]),
    help="The output's format; by default what the file name ends with.",
)
@output_options
@click.option("--wait", is_flag=True, help="Wait until every job is finished.")
@database_option
@click.pass_obj
@click.pass_context
def collect(context: click.Context, db: dict[str, Any], /, run: str, output: str | None, **flags: Any) -> None:
    """Write a run's answers in input order, finished or not.

    A file appears whole or not at all. Exits with 3 if jobs are not finished, with 4 if some failed.
    """
    collected = asyncio.run(api.collect(run, out="-" if output is None else output, **flags, **db))
    log(f"lbr: {describe(collected)}")
    context.exit(exit_code(collected))
