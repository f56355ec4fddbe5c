"""The commands that look at runs and steer them: status, show, retry, cancel, pause, resume, doctor."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import orjson

from lbr.api import doctor as examination
from lbr.api import operate
from lbr.api.status import describe, printable, resumed_words
from lbr.cli.app import database_option, echo, log, read_setting
from lbr.core.config import positive
from lbr.core.errors import UsageError
from lbr.core.pricing import dollars
from lbr.core.text import pluralize

if TYPE_CHECKING:
    from lbr.api.doctor import Finding
    from lbr.store.reads import Attempt, JobDetail
    from lbr.store.redo import Reparsed

MAX_IDX = 2**63 - 1
MAX_PAUSE_SECONDS = 86_400.0
EXIT_GRAVE = 5


@click.command()
@click.argument("run", required=False)
@click.option("--json", is_flag=True, help="Print JSON, one object.")
@click.option("--watch", is_flag=True, help="Print again every few seconds, until all is finished.")
@click.option("--interval", type=float, default=2.0, help="Seconds between two looks.")
@database_option
@click.pass_obj
def status(db: dict[str, Any], /, run: str | None, json: bool, watch: bool, interval: float) -> None:
    """Tell how one run stands, or all of them: counts, speed, tokens, cost, failures, workers."""
    pause_seconds = min(max(0.1, positive("interval", interval)), MAX_PAUSE_SECONDS)
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        _print_status(db, run, json=json, watch=watch, pause_seconds=pause_seconds)


def _print_status(
    db: dict[str, Any], run: str | None, *, json: bool, watch: bool, pause_seconds: float
) -> None:
    while True:
        found = asyncio.run(operate.status(run, **db))
        if watch and not json and sys.stdout.isatty():
            click.clear()
        echo(orjson.dumps(found.to_dict()) if json else describe(found))
        if not watch or all(one.finished or one.state == "cancelled" for one in found.runs):
            return
        time.sleep(pause_seconds)


@click.command()
@click.argument("run")
@click.argument("idx", type=click.IntRange(0, MAX_IDX))
@click.option("--json", is_flag=True, help="Print JSON, one object.")
@database_option
@click.pass_obj
def show(db: dict[str, Any], /, run: str, idx: int, json: bool) -> None:
    """Tell everything about the input at place IDX, counted from 0: its job, its answer, its failed tries."""
    story = asyncio.run(operate.show(run, idx, **db))
    fields = story.row.to_dict() | {k: v for k, v in asdict(story).items() if k != "row"}
    echo(orjson.dumps(fields) if json else _describe_story(story))


def _describe_story(story: JobDetail) -> str:
    row = story.row
    lines = [
        f"input {row.idx}: {row.status}, key {row.key}",
        f"prompt: {row.prompt.body()}",
        f"tries charged {story.attempts}, claims {story.claim_seq}, crashes {story.crashes}",
    ]
    if row.result is not None:
        source = (
            "reused from another run"
            if story.reused
            else f"{story.model or 'function'}, {story.latency_ms} ms"
        )
        if story.finish_reason not in {None, "stop"}:
            source += f", finish reason {story.finish_reason}"
        lines.append(f"answer ({source}): {row.result}")
        lines += _usage_lines(story)
    for one in story.tries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at / 1000))
        lines.append(
            f"{when} claim {one.claim_seq} {one.what}: {one.family or '-'} {one.error}: {one.message}"
        )
        if one.text:
            ending = "" if one.finish_reason in {None, "stop"} else f" (finish reason {one.finish_reason})"
            lines.append(f"  raw answer{ending}: {one.text}")
        # Nothing was heard of a call that died with its worker.
        lines += _usage_lines(one, estimated=one.what == "crashed")
    return "\n".join(lines)


def _usage_lines(of: JobDetail | Attempt, *, estimated: bool = False) -> list[str]:
    """Return a line of the tokens and the cost of an answer or of a try, none where neither is known."""
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
    help="Only jobs of which this holds: family=FAMILY or error~TEXT of their last failure, finish_reason=WORD of "
    "their last answer, such as length, or status=failed|cancelled|done; may be repeated.",
)
@click.option(
    "--set",
    metavar="NAME=VALUE",
    multiple=True,
    help="A model setting for these jobs alone, over the run's, such as max_tokens=900; may be repeated.",
)
@click.option(
    "--reparse", is_flag=True, help="Make no call: validate again the bad answers that jobs failed with."
)
@click.option(
    "--result-type",
    metavar="MODULE:CLASS",
    multiple=True,
    help="With --reparse: the pydantic class of the run's schema, to check by.",
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
    """Put a run's failed and cancelled jobs back to pending, with all their tries, or those that --where chooses.

    Answers that are chosen leave the results, and stay in the history that `lbr show` tells.
    """
    if reparse:
        if where or flags["set"]:
            raise UsageError(
                "expected --reparse alone or with --result-type, got: --where or --set beside it"
            )
        echo(_describe_reparsed(run, asyncio.run(operate.reparse(run, result_types=result_type, **db))))
        return
    if result_type:
        raise UsageError(
            "expected --result-type beside --reparse, got: it alone; name it to `lbr worker` instead"
        )
    own = dict(read_setting(one) for one in flags["set"])
    count = asyncio.run(operate.retry(run, where=where, settings=own, **db))
    echo(f"run {run}: {pluralize(count, 'job')} back to pending")


def _describe_reparsed(run: str, reparsed: Reparsed) -> str:
    kept = (
        "1 kept answer fits now and is"
        if reparsed.taken == 1
        else f"{reparsed.taken} kept answers fit now and are"
    )
    words = f"run {run}: {kept} taken, {reparsed.left} still {'does' if reparsed.left == 1 else 'do'} not"
    return words if reparsed.problem is None else f"{words}; the first: {reparsed.problem}"


@click.command()
@click.argument("run")
@database_option
@click.pass_obj
def cancel(db: dict[str, Any], /, run: str) -> None:
    """Cancel a run's pending jobs; calls in flight end and their answers are kept."""
    echo(f"run {run}: {pluralize(asyncio.run(operate.cancel(run, **db)), 'job')} cancelled")


@click.command()
@click.argument("run")
@click.option("--yes", is_flag=True, help="Do not ask, even if the run has answers.")
@database_option
@click.pass_obj
def rm(db: dict[str, Any], /, run: str, yes: bool) -> None:
    """Remove a run with its inputs and answers, once its calls in flight have ended; no more begin meanwhile."""
    (found,) = asyncio.run(operate.status(run, **db)).runs
    if (
        found.done
        and not yes
        and not click.confirm(f"Remove run {run} with {pluralize(found.done, 'answer')}?", err=True)
    ):
        raise UsageError(f"run {run} stays")
    count = asyncio.run(operate.remove(run, **db, notify=lambda words: log(f"lbr: {words}")))
    echo(f"run {run}: removed, with {pluralize(count, 'job')}")


@click.command()
@click.argument("run")
@click.option("--reason", default="by hand", help="What `lbr status` says about it.")
@database_option
@click.pass_obj
def pause(db: dict[str, Any], /, run: str, reason: str) -> None:
    """Stop the claiming of a run's jobs, in every worker, until `lbr resume`."""
    asyncio.run(operate.pause(run, reason=reason, **db))
    echo(f"run {run}: paused")


@click.command()
@click.argument("run")
@click.option(
    "--max-cost",
    type=float,
    metavar="DOLLARS",
    help="What it may cost from now on, in all; inf for any amount.",
)
@database_option
@click.pass_obj
def resume(db: dict[str, Any], /, run: str, max_cost: float | None) -> None:
    """Let a paused run's jobs be claimed again."""
    pause = asyncio.run(operate.resume(run, max_cost=max_cost, **db))
    if words := resumed_words(run, pause):
        log(f"lbr: {words}")
    echo(f"run {run}: active")


@click.command()
@click.option("--fix", is_flag=True, help="Fix counters that differ from a recount; nothing else is changed.")
@click.option("--json", is_flag=True, help="Print JSON, one object for each finding.")
@database_option
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, db: dict[str, Any], /, fix: bool, json: bool) -> None:
    """Check the database from all sides, and print what is wrong and what to do; workers can go on.

    The file or the server, its settings, damage, leases, counters, keys, paused runs, kept answers. Nothing is
    changed without --fix. The exit code is 5 if there is a warning or an error.
    """
    found = asyncio.run(examination.doctor(fix=fix, **db))
    for one in found:
        echo(orjson.dumps(one.to_dict()) if json else _describe_finding(one))
    if not json:
        counts = Counter(one.gravity for one in found if one.gravity != "ok")
        log(f"lbr: {', '.join(pluralize(n, gravity) for gravity, n in counts.items()) or 'all is well'}")
    context.exit(EXIT_GRAVE if any(one.is_grave for one in found) else 0)


def _describe_finding(finding: Finding) -> str:
    lines = [f"{finding.gravity:<7}  {finding.check}: {finding.found}"]
    if finding.do is not None:
        lines.append(f"{'':<9}{finding.do}")
    return "\n".join(map(printable, lines))
