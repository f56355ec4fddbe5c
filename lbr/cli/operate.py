"""The commands that show and control runs: status, list, show, compare, retry, cancel, rm, prune, pause, resume, limit, move, backup, doctor."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import nullcontext, suppress
from typing import Any

import click

from lbr.api import compare as compare_api
from lbr.api import doctor as doctor_api
from lbr.api import move as move_api
from lbr.api import operate
from lbr.api.status import describe, describe_limit, describe_list, printable, resumed_words
from lbr.api.view import is_terminal
from lbr.cli import completion
from lbr.cli.app import echo, echo_json, log, option, read_settings, run_argument, switch, with_database
from lbr.cli.view import watch_status
from lbr.core.config import positive
from lbr.core.errors import StoppedError, UsageError
from lbr.core.text import pluralize

EXIT_PROBLEM = 5
CONDITION = (
    "Only jobs that meet this: family=FAMILY or error~TEXT of their last failure, finish_reason=WORD of their last "
    "answer, for example length, or status=failed|cancelled|done; may be repeated."
)
SETTING = "A model setting for these jobs only, before the run's, for example max_tokens=900; may be repeated."
OTHER_MODEL = "The model that answers these jobs instead of the run's, for example openai-chat:gpt-4o."
CLASS = "With --reparse: the pydantic class of the run's schema, to check with."

as_json = switch("--json", "Print one JSON object.")


@click.command()
@click.argument("run", required=False, shell_complete=completion.run_names)
@as_json
@switch("--watch", "Refresh every few seconds, until all runs are finished.")
@option("--interval", None, "Seconds between refreshes.", default=2.0)
@with_database
def status(db: dict[str, Any], /, run: str | None, json: bool, watch: bool, interval: float) -> None:
    """Show the progress of one run or all.

    Counts, speed, tokens, cost, failed attempts, and the workers.
    """
    pause_seconds = max(0.1, positive("interval", interval))
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        while True:
            found = asyncio.run(operate.status(run, **db))
            over = not watch or all(one.finished or one.state == "cancelled" for one in found.runs)
            if not over and not json and is_terminal(stderr=False):
                asyncio.run(watch_status(db, run, pause_seconds))
                return
            echo_json(found.to_dict()) if json else echo(describe(found))
            if over:
                return
            time.sleep(pause_seconds)


@click.command("list")
@switch("--json", "Print one JSON object per run.")
@with_database
def list_runs(db: dict[str, Any], /, json: bool) -> None:
    """List all runs, one per line.

    The columns are inputs, done, failed, state, age and cost. Done and failed count jobs: one for each distinct input, because equal inputs share an answer, or for each sample.
    """
    found = asyncio.run(operate.status(**db)).runs
    if not json:
        echo(describe_list(found))
        return
    for one in found:
        echo_json(one.to_dict())


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...", shell_complete=completion.run_names)
@option("--rows", "N", "How many of the rows that differ to show.", type=click.IntRange(0), default=10)
@as_json
@with_database
def compare(db: dict[str, Any], /, runs: tuple[str, ...], rows: int, json: bool) -> None:
    """Compare runs with the same inputs.

    Shows how often their answers agree, tokens, cost, latency, and rows that differ.
    """
    found = asyncio.run(compare_api.compare(runs, rows=rows, **db))
    for one in found.runs:
        if one["unfinished"]:
            log(f"run {one['run']} has not finished: {pluralize(one['unfinished'], 'input')} may still be answered")
        if one["unpriced"] and one["cost_usd"] is not None:
            log(f"run {one['run']}: the cost of {pluralize(one['unpriced'], 'answer')} is not known, and not counted")
    echo_json(found.to_dict()) if json else echo(compare_api.describe(found))


@click.command()
@run_argument
@option("--where", "CONDITION", CONDITION, multiple=True)
@option("--set", "NAME=VALUE", SETTING, multiple=True)
@option("--model", "MODEL", OTHER_MODEL)
@switch("--reparse", "Check the bad answers of failed jobs again, without a call.")
@option("--result-type", "MODULE:CLASS", CLASS, multiple=True)
@with_database
def retry(
    db: dict[str, Any], /, run: str, where: tuple[str, ...], reparse: bool, result_type: tuple[str, ...], **flags: Any
) -> None:
    """Put failed jobs, or those that you select, back to pending.

    These are all failed and cancelled jobs, or those that --where selects; each gets all its attempts again. The answers of selected jobs leave the results and stay in the history that `lbr show` prints.
    """
    if result_type and not reparse:
        raise UsageError("--result-type needs --reparse; to check new answers, use it with `lbr worker`")
    if not reparse:
        settings = read_settings(flags["set"])
        model = flags["model"]
        count = asyncio.run(operate.retry(run, where=where, settings=settings, model=model, **db))
        echo(f"run {run}: {pluralize(count, 'job')} back to pending")
        return
    if where or flags["set"] or flags["model"]:
        raise UsageError("--reparse checks all bad answers again; use it without --where, --set and --model")
    found = asyncio.run(operate.reparse(run, result_types=result_type, **db))
    accepted = "1 kept answer fits now and is" if found.taken == 1 else f"{found.taken} kept answers fit now and are"
    words = f"run {run}: {accepted} accepted, {found.left} still {'does' if found.left == 1 else 'do'} not fit"
    echo(words if found.problem is None else f"{words}; the first: {found.problem}")


@click.command()
@run_argument
@with_database
def cancel(db: dict[str, Any], /, run: str) -> None:
    """Cancel a run's pending jobs.

    Calls in flight finish, and their answers are kept.
    """
    echo(f"run {run}: {pluralize(asyncio.run(operate.cancel(run, **db)), 'job')} cancelled")


@click.command()
@run_argument
@switch("--yes", "Do not ask, even if the run has answers.")
@with_database
def rm(db: dict[str, Any], /, run: str, yes: bool) -> None:
    """Remove a run with its inputs and answers.

    Its calls in flight finish first.
    """
    (found,) = asyncio.run(operate.status(run, **db)).runs
    question = f"Remove run {run} with {pluralize(found.done, 'answer')}?"
    if found.done and not yes and not click.confirm(question, err=True):
        raise UsageError(f"run {run} was not removed")
    count = asyncio.run(operate.remove(run, **db, notify=log))
    echo(f"run {run}: removed, with {pluralize(count, 'job')}")


@click.command()
@option("--older", "TIME", "The least age of a run's last change, for example 12h, 30d or 2w.", required=True)
@switch("--yes", "Do not ask.")
@switch("--dry-run", "List the runs, and remove nothing.")
@with_database
def prune(db: dict[str, Any], /, older: str, yes: bool, dry_run: bool) -> None:
    """Remove old runs that are finished or cancelled.

    Their inputs and answers go with them. A run is old if it has not changed for the time of --older.
    """
    found = asyncio.run(operate.prune(older, dry_run=True, **db))
    if found:
        echo(describe_list(found))
    if not found or dry_run:
        log("dry run: nothing was removed" if found else f"no finished or cancelled run is older than {older}")
        return
    answers = pluralize(sum(one.done for one in found), "answer")
    if not yes and not click.confirm(f"Remove {pluralize(len(found), 'run')} with {answers}?", err=True):
        raise UsageError("no run was removed")
    removed = asyncio.run(operate.prune(older, runs=[one.run for one in found], **db, notify=log))
    echo(f"{pluralize(len(removed), 'run')} removed")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@with_database
def backup(db: dict[str, Any], /, file: str) -> None:
    """Copy the queue to a new FILE, while workers go on.

    The copy is of one moment. Only for a SQLite queue; on PostgreSQL, use pg_dump.
    """
    asyncio.run(operate.backup(file, **db))
    echo(f"{db['db_url']}: copied to {file}")


@click.command()
@run_argument
@option("--reason", None, "The reason that `lbr status` shows.", default="by the user")
@with_database
def pause(db: dict[str, Any], /, run: str, reason: str) -> None:
    """Stop all workers from claiming a run's jobs.

    Calls in flight finish. `lbr resume` lets the run go on.
    """
    asyncio.run(operate.pause(run, reason=reason, **db))
    echo(f"run {run}: paused")


@click.command()
@run_argument
@option("--max-cost", "DOLLARS", "What the run may cost in total from now on; inf removes the limit.", type=float)
@with_database
def resume(db: dict[str, Any], /, run: str, max_cost: float | None) -> None:
    """Let workers claim a paused run's jobs again."""
    pause = asyncio.run(operate.resume(run, max_cost=max_cost, **db))
    if words := resumed_words(run, pause):
        log(words)
    echo(f"run {run}: active")


@click.command()
@click.argument("scope", required=False, shell_complete=completion.models)
@option("--rpm", "N|none", "Requests per minute, all workers together.")
@option("--tpm", "N|none", "Tokens per minute, all workers together, input and output.")
@option("--concurrency", "N|auto", "Calls at a time, all workers together; auto learns it.")
@switch("--json", "Print one JSON object per model.")
@with_database
def limit(db: dict[str, Any], /, scope: str | None, json: bool, **flags: str | None) -> None:
    """Show or change a model's rate limits.

    Running workers pick up changes immediately. SCOPE is a model or function as `lbr status` names it, for example openai-chat:gpt-4o-mini; all its runs share the
    limits, in every worker of the queue. Without a SCOPE, the limits of all models are shown.
    """
    values: dict[str, int | None] = {}
    for name, unset in (("rpm", "none"), ("tpm", "none"), ("concurrency", "auto")):
        if (text := flags[name]) is not None:
            if text != unset and not text.isdecimal():
                raise UsageError(f"expected --{name} to be a whole number or '{unset}', got: {text[:50]!r}")
            values[name] = None if text == unset else int(text)
    if values and scope is None:
        raise UsageError("name the SCOPE to limit; `lbr status` shows the names")
    found = asyncio.run(operate.limit(scope, values, **db))
    for one in found:
        echo_json(one) if json else echo(describe_limit(one))
        if values and not one["runs"]:
            log(f"no run of this queue uses {one['answerer']}; the limit is kept for later runs")
    if not found and not json:
        echo("no limits are set or learned")


@click.command()
@click.argument("from_url", metavar="FROM_URL", shell_complete=completion.files)
@click.argument("to_url", metavar="TO_URL", shell_complete=completion.files)
@run_argument
@switch("--restart", "Copy everything again, instead of continuing an interrupted copy.")
@as_json
@click.pass_obj
def move(db: dict[str, Any], /, from_url: str, to_url: str, run: str, restart: bool, json: bool) -> None:
    """Copy a run into another database, to continue there.

    The run must be paused, finished or cancelled, and no worker may hold a job of it. Everything is copied and
    compared; a paused copy stays in the old database. If the command is interrupted, run it again.
    """
    where = db | {"db_url": from_url, "to_url": to_url}
    try:
        moved = asyncio.run(move_api.move(run, restart=restart, notify=log, **where))
    except KeyboardInterrupt as error:
        raise StoppedError("the move has not finished; run the same command again to continue") from error
    if json:
        echo_json(moved.to_dict())
        return
    counts = ", ".join(pluralize(getattr(moved, f"{one}s"), one) for one in ("input", "job", "answer"))
    done = "was moved before to" if moved.known else "moved to"
    echo(f"run {moved.run}: {counts} {done} {moved.target}")
    if not moved.known:
        echo(f"hash {moved.hash}: the same in both")
        log(
            f"continue with --db or LBR_DB for {moved.target}: `lbr resume {moved.run}` if the run was paused, "
            f"then `lbr worker`. Do not resume the paused copy here, or you pay twice for what is left"
        )


@click.command()
@switch("--fix", "Fix counters that differ from a recount; nothing else is changed.")
@switch("--json", "Print one JSON object per finding.")
@with_database
def doctor(db: dict[str, Any], /, fix: bool, json: bool) -> None:
    """Check the database, and print what is wrong and what to do.

    Workers can continue. Checks the file or server, its settings, damage, leases, counters, keys, paused runs and kept answers. Nothing is
    changed without --fix. Exits with 5 if there is a warning or an error.
    """
    found = asyncio.run(doctor_api.doctor(fix=fix, **db))
    for one in found:
        advice = "" if one.do is None else f"\n{'':<9}{printable(one.do)}"
        echo_json(one.to_dict()) if json else echo(printable(f"{one.gravity:<7}  {one.check}: {one.found}") + advice)
    if not json:
        counts = Counter(one.gravity for one in found if one.gravity != "ok")
        log(", ".join(pluralize(n, gravity) for gravity, n in counts.items()) or "no problem found")
    click.get_current_context().exit(EXIT_PROBLEM if any(one.is_grave for one in found) else 0)
