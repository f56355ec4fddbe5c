"""The commands that show and control runs: status, show, retry, cancel, rm, pause, resume."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lbr.api import operate
from lbr.api.status import describe, resumed_words
from lbr.cli.app import database_option, echo, echo_json, log, read_settings
from lbr.core.config import positive
from lbr.core.errors import UsageError
from lbr.core.pricing import dollars
from lbr.core.text import pluralize

if TYPE_CHECKING:
    from lbr.store.reads import Attempt, JobDetail

MAX_IDX = 2**63 - 1
MAX_PAUSE_SECONDS = 86_400.0


@click.command()
@click.argument("run", required=False)
@click.option("--json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Refresh every few seconds, until all runs are finished.")
@click.option("--interval", type=float, default=2.0, help="Seconds between refreshes.")
@database_option
@click.pass_obj
def status(db: dict[str, Any], /, run: str | None, json: bool, watch: bool, interval: float) -> None:
    """Show the progress of one run or all: counts, speed, tokens, cost, failures, workers."""
    pause_seconds = min(max(0.1, positive("interval", interval)), MAX_PAUSE_SECONDS)
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        while True:
            found = asyncio.run(operate.status(run, **db))
            if watch and not json and sys.stdout.isatty():
                click.clear()
            echo_json(found.to_dict()) if json else echo(describe(found))
            if not watch or all(one.finished or one.state == "cancelled" for one in found.runs):
                return
            time.sleep(pause_seconds)


@click.command()
@click.argument("run")
@click.argument("idx", type=click.IntRange(0, MAX_IDX))
@click.option("--json", is_flag=True, help="Print one JSON object.")
@database_option
@click.pass_obj
def show(db: dict[str, Any], /, run: str, idx: int, json: bool) -> None:
    """Show everything about one input: its job, its answer, its failed attempts. IDX counts from 0."""
    detail = asyncio.run(operate.show(run, idx, **db))
    fields = detail.row.to_dict() | {name: value for name, value in asdict(detail).items() if name != "row"}
    echo_json(fields) if json else echo(_describe_job(detail))


def _describe_job(detail: JobDetail) -> str:
    row = detail.row
    lines = [
        f"input {row.idx}: {row.status}, key {row.key}",
        f"prompt: {row.prompt.body()}",
        f"attempts charged {detail.attempts}, claims {detail.claim_seq}, crashes {detail.crashes}",
    ]
    if row.result is not None:
        source = f"{detail.model or 'function'}, {detail.latency_ms} ms"
        if detail.reused:
            source = "reused from another run"
        lines.append(f"answer ({source}{_ending(detail, ', ')}): {row.result}")
        lines += _usage_lines(detail)
    for one in detail.tries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at / 1000))
        lines.append(f"{when} claim {one.claim_seq} {one.what}: {one.family or '-'} {one.error}: {one.message}")
        if one.text:
            ending = _ending(one, " (")
            lines.append(f"  raw answer{ending}{')' * bool(ending)}: {one.text}")
        # Nothing is known of a call that died with its worker.
        lines += _usage_lines(one, estimated=one.what == "crashed")
    return "\n".join(lines)


def _ending(of: JobDetail | Attempt, before: str) -> str:
    return "" if of.finish_reason in {None, "stop"} else f"{before}finish reason {of.finish_reason}"


def _usage_lines(of: JobDetail | Attempt, *, estimated: bool = False) -> list[str]:
    """Return a line with the tokens and the cost of an answer or an attempt, none if neither is known."""
    counts = ((of.input_tokens, "in"), (of.output_tokens, "out"))
    tokens = ", ".join(f"{count} {way}" for count, way in counts if count is not None)
    parts = [f"tokens {tokens}"] if tokens else []
    if of.cost_nanos is not None:
        parts.append(f"cost {'about ' * estimated}{dollars(of.cost_nanos)}{', estimated' * estimated}")
    return [f"  {', '.join(parts)}"] if parts else []


@click.command()
@click.argument("run")
@click.option(
    "--where",
    metavar="CONDITION",
    multiple=True,
    help="Only jobs that meet this: family=FAMILY or error~TEXT of their last failure, finish_reason=WORD of their "
    "last answer, for example length, or status=failed|cancelled|done; may be repeated.",
)
@click.option(
    "--set",
    metavar="NAME=VALUE",
    multiple=True,
    help="A model setting for these jobs only, before the run's, for example max_tokens=900; may be repeated.",
)
@click.option("--reparse", is_flag=True, help="Check the bad answers of failed jobs again, without a call.")
@click.option(
    "--result-type",
    metavar="MODULE:CLASS",
    multiple=True,
    help="With --reparse: the pydantic class of the run's schema, to check with.",
)
@database_option
@click.pass_obj
def retry(
    db: dict[str, Any],
    /,
    run: str,
    where: tuple[str, ...],
    reparse: bool,
    result_type: tuple[str, ...],
    **flags: Any,
) -> None:
    """Put failed and cancelled jobs back to pending, with all their attempts, or the jobs that --where selects.

    The answers of selected jobs leave the results and stay in the history that `lbr show` prints.
    """
    if result_type and not reparse:
        raise UsageError("--result-type needs --reparse; to check new answers, use it with `lbr worker`")
    if not reparse:
        settings = read_settings(flags["set"])
        count = asyncio.run(operate.retry(run, where=where, settings=settings, **db))
        echo(f"run {run}: {pluralize(count, 'job')} back to pending")
        return
    if where or flags["set"]:
        raise UsageError("--reparse checks all bad answers again; use it without --where and --set")
    found = asyncio.run(operate.reparse(run, result_types=result_type, **db))
    accepted = "1 kept answer fits now and is" if found.taken == 1 else f"{found.taken} kept answers fit now and are"
    words = f"run {run}: {accepted} accepted, {found.left} still {'does' if found.left == 1 else 'do'} not fit"
    echo(words if found.problem is None else f"{words}; the first: {found.problem}")


@click.command()
@click.argument("run")
@database_option
@click.pass_obj
def cancel(db: dict[str, Any], /, run: str) -> None:
    """Cancel a run's pending jobs; calls in flight finish and their answers are kept."""
    echo(f"run {run}: {pluralize(asyncio.run(operate.cancel(run, **db)), 'job')} cancelled")


@click.command()
@click.argument("run")
@click.option("--yes", is_flag=True, help="Do not ask, even if the run has answers.")
@database_option
@click.pass_obj
def rm(db: dict[str, Any], /, run: str, yes: bool) -> None:
    """Remove a run with its inputs and answers, after its calls in flight have finished."""
    (found,) = asyncio.run(operate.status(run, **db)).runs
    question = f"Remove run {run} with {pluralize(found.done, 'answer')}?"
    if found.done and not yes and not click.confirm(question, err=True):
        raise UsageError(f"run {run} was not removed")
    count = asyncio.run(operate.remove(run, **db, notify=lambda words: log(f"lbr: {words}")))
    echo(f"run {run}: removed, with {pluralize(count, 'job')}")


@click.command()
@click.argument("run")
@click.option("--reason", default="by the user", help="The reason that `lbr status` shows.")
@database_option
@click.pass_obj
def pause(db: dict[str, Any], /, run: str, reason: str) -> None:
    """Stop all workers from claiming a run's jobs, until `lbr resume`."""
    asyncio.run(operate.pause(run, reason=reason, **db))
    echo(f"run {run}: paused")


@click.command()
@click.argument("run")
@click.option(
    "--max-cost",
    type=float,
    metavar="DOLLARS",
    help="What the run may cost in total from now on; inf removes the limit.",
)
@database_option
@click.pass_obj
def resume(db: dict[str, Any], /, run: str, max_cost: float | None) -> None:
    """Let workers claim a paused run's jobs again."""
    pause = asyncio.run(operate.resume(run, max_cost=max_cost, **db))
    if words := resumed_words(run, pause):
        log(f"lbr: {words}")
    echo(f"run {run}: active")
