"""`lbr worker`, `lbr collect`, and `lbr run`, which enqueues, works and collects in one."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import time
from collections import Counter
from contextlib import AsyncExitStack, ExitStack, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbr.api import collect as collect_api
from lbr.api import operate, summary, work
from lbr.api.finish import Hooks, report_end
from lbr.api.metrics import served
from lbr.api.status import printable, unfinished_words
from lbr.cli import completion
from lbr.cli.app import (
    EXIT_FAILURES,
    EXIT_UNFINISHED,
    choice,
    log,
    option,
    options,
    run_argument,
    switch,
    talk,
    talk_options,
    with_database,
)
from lbr.cli.enqueue import counting_kept, enqueue_inputs, inputs_argument, show_dry_run, task_options
from lbr.cli.enqueue import describe as describe_enqueue
from lbr.cli.view import Shown, shown
from lbr.core import open_files
from lbr.core.batches import Lane
from lbr.core.config import MAX_PROCESSES, WorkOptions, at_least_one, some_of
from lbr.core.errors import LbrError, UsageError
from lbr.core.extras import Extra, Include
from lbr.core.text import pluralize
from lbr.core.types import JobState, Order, RunState, Shape, Until
from lbr.io import writers
from lbr.io.table import OWN_COLUMNS
from lbr.store.database import file_of, opened, sole_worker
from lbr.worker.calls import WorkReport
from lbr.worker.processes import handled_signals, run_processes

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping

    from lbr.api.collect import Collected
    from lbr.worker.worker import Worker

SHOWN_REASONS = 3


UNTIL = "Stop when every job is done, when nothing can be claimed, or never."
SAFE = "CSV: put an apostrophe before text that a spreadsheet would run as a formula."


def _of_work(name: str, kind: type, meaning: str, metavar: str | None = None) -> Any:
    default = getattr(WorkOptions(), name.replace("-", "_"))
    return option(f"--{name}", metavar, meaning, type=kind, default=default)


work_options = options(
    _of_work("concurrency", int, "Calls at a time, per process."),
    _of_work("lease", float, "Seconds before a silent worker's jobs are taken over."),
    _of_work("timeout", float, "Seconds that one call may take; 120 by default, 900 for runs of the flex tier."),
    _of_work("grace", float, "Seconds to wait for calls in flight when the worker is stopped."),
    _of_work("patience", float, "Seconds to wait for a database that is busy or unreachable."),
    _of_work("outage-patience", float, "Seconds to wait for an unreachable model before its runs are paused."),
    _of_work("rpm", int, "Requests per minute, all workers together; `lbr limit` removes the limit."),
    _of_work("tpm", int, "Tokens per minute, all workers together, input and output."),
    _of_work("max-cost", float, "What each run may cost in total; then the run is paused.", "DOLLARS"),
)
processes_option = option("--processes", None, "Number of worker processes to start.", type=int, default=1)
_ENDS = "when a run has finished or is paused; of several workers, one does it."
hook_options = options(
    option("--on-finish", "COMMAND", f"A command line to run {_ENDS}"),
    option("--notify", "URL", f"A URL to send JSON to {_ENDS}"),
)
serving_options = options(
    option("--run", "NAME", "A run to work on; by default all that it can.", multiple=True),
    option("--function", "MODULE:NAME", "A function that it may call.", multiple=True),
    option("--result-type", "MODULE:CLASS", "A class to check answers with.", multiple=True),
    work_options,
    hook_options,
    choice("--until", Until, UNTIL, default=str(Until.DONE)),
    choice(
        "--lane", (Lane.ONLINE, Lane.BATCH, Lane.ALL), "What it does: only call, only batches, or all.", default="all"
    ),
)
output_options = options(
    choice("--shape", Shape, "Write a row for every input, or for every distinct one.", default=str(Shape.ORIGINAL)),
    switch("--spreadsheet-safe", SAFE),
    switch("--bom", "CSV: start with a byte order mark, for Excel."),
    choice("--columns", OWN_COLUMNS, "Tables: add all of lbr's own columns.", default="default"),
    switch("--no-unnest", "Tables: one column for the whole answer, not one for each of its fields."),
    option("--with", "WHAT,…", f"Add what a row has beside its answer: {', '.join(Include)}.", multiple=True),
)
OUTPUT = "A .jsonl, .csv, .parquet, .sqlite or .db file"

OUTPUT_OPTION: dict[str, Any] = {"metavar": "FILE", "shell_complete": completion.files}


async def _serve(
    db: dict[str, Any],
    show: Shown | None = None,
    *,
    function: tuple[str, ...],
    result_type: tuple[str, ...],
    notify: str | None = None,
    parent: int | None = None,
    **how: Any,
) -> WorkReport:
    """Run a worker that handles signals: the first Ctrl-C, SIGTERM or SIGHUP drains it, the second releases all jobs.

    `parent` is the end of a pipe that is closed when the process that started this one ends; then it drains as well.
    `show` prints its messages; the parent of several processes does for them.
    """
    gc.freeze()  # modules live as long as this process, and need not be looked through
    open_files.raise_limit()
    loop = asyncio.get_running_loop()
    stopping = False

    def listen(worker: Worker) -> None:
        def stop(_: signal.Signals) -> None:
            nonlocal stopping
            if stopping:
                worker.abort()
                if show is not None:
                    show.stop(0)
                return
            stopping = True
            _leave_closed_terminal()
            worker.drain()
            if show is not None:
                show.stop(how["grace"])

        def end_with_parent(pipe: int) -> None:
            loop.remove_reader(pipe)
            _leave_closed_terminal()
            worker.drain()
            log("the process that started this one is gone: finishing the calls in flight")

        stack.enter_context(handled_signals(stop))
        if parent is not None:
            loop.add_reader(parent, end_with_parent, parent)
            stack.callback(loop.remove_reader, parent)

    with ExitStack() as stack:
        how |= {"notify": log if show is None else show.notify, "verbose": talk.verbose, "on_start": listen}
        how |= {"functions": function, "result_types": result_type, "notify_url": notify}
        return await work.work(**how, **db)


def _leave_closed_terminal() -> None:
    """Replace a closed terminal or pipe by /dev/null: a function that prints must not fail because of it."""
    for number in (1, 2):
        polled = select.poll()
        polled.register(number, 0)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in polled.poll(0)):
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), number)


async def _work_alone(db: dict[str, Any], *, run: tuple[str, ...], **how: Any) -> int:
    """Run one worker in this process, and return its exit code."""
    started = time.monotonic()
    async with shown(db, run) if how.get("parent") is None else nullcontext() as show:
        report = await _serve(db, show, run=run or None, **how)
    if "parent" in how:  # which prints the end of its runs once
        for name, count in report.cut_off.items():
            log(f"run {name}: {summary.cut_off_words(name, count, limited=name in report.limited)}")
    else:
        log(f"worker: {_describe_work(report)}")
        await _log_end(db, report, started)
    for name in report.interrupted:
        log(f"the enqueue of run {name} has not finished; run the same enqueue again", error=True)
    code = EXIT_UNFINISHED if report.paused or report.interrupted else 0
    if report.failed and how.get("until") != Until.FOREVER:
        # A service restarts what exits with an error, and would do so for each failed job.
        code = EXIT_FAILURES
    _leave_stuck(report, code)
    return code


async def _log_end(db: dict[str, Any], report: WorkReport, started: float) -> None:
    if not report.by_run and not report.paused:
        return
    with suppress(LbrError):  # the work is done, even if the queue is gone since
        for line, is_problem in await summary.work_lines(report, time.monotonic() - started, **db):
            log(line, error=is_problem)


def _leave_stuck(report: WorkReport, code: int) -> None:
    """End the process if calls could not be cancelled, because asyncio would wait for them forever."""
    if report.stuck:
        # Their jobs are released.
        log(f"left {pluralize(report.stuck, 'call')} behind that could not be cancelled")
        os._exit(code)


def _describe_work(report: WorkReport) -> str:
    counts = (("retried", report.retried), ("reclaimed", report.reclaimed), ("released", report.released))
    more = [f"{count} {word}" for word, count in (*counts, ("too late", report.stale)) if count]
    return ", ".join([f"{report.done} done", f"{report.failed} failed", *more])


async def _work_in_processes(db: dict[str, Any], count: int, **flags: Any) -> int:
    """Work in several processes; return the worst exit code of those that were not killed."""
    # Check here once, instead of in every child.
    _work_flags(flags)
    Hooks(flags.get("on_finish"), flags.get("notify"), db["db_url"], log)
    await work.check_queue(**db, names=flags["run"], patience=flags["patience"])
    # Not as flags, because these may hold a password, and every user of the machine sees the flags.
    environment = {"LBR_DB": db["db_url"], "LBR_ALLOW_NETWORK_FS": str(int(db["allow_network_fs"]))}
    hooks = {name: value for name in ("on_finish", "notify") if (value := flags.pop(name, None)) is not None}
    environment |= {f"LBR_WORKER_PROCESS_{name.upper()}": value for name, value in hooks.items()}
    arguments = ["worker-process"]
    for flag, value in flags.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            arguments += [f"--{flag.replace('_', '-')}", str(one)]
    arguments += ["--quiet"] * talk.quiet + ["--verbose"] * talk.verbose + ["--log-format", talk.log_format]
    async with shown(db, flags["run"]) as show:
        codes = await run_processes(
            arguments,
            count,
            environment=environment,
            notify=show.notify,
            on_stop=lambda: show.stop(flags["grace"]),
            on_line=None if show.screen is None else show.pass_on,
        )
    return max((code for code in codes if code >= 0), default=1)


def _work_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's flags that WorkOptions has, except the run's own lane; UsageError for a bad value."""
    how = {one.name: flags[one.name] for one in fields(WorkOptions) if one.name in flags and one.name != "lane"}
    WorkOptions(**how)
    return how


@click.command()
@serving_options
@processes_option
@talk_options
@option("--metrics", "PORT", "Serve numbers for Prometheus at this port of 127.0.0.1; 0 takes a free one.", type=int)
@switch("--exclusive", "Exit at once, with 0, if another exclusive worker is running.")
@with_database
def worker(db: dict[str, Any], /, processes: int, exclusive: bool, **flags: Any) -> None:
    """Process jobs; start as many workers as you like.

    Start them in any number of terminals.

    Ctrl-C, SIGTERM or a closed terminal (SIGHUP, unless under nohup) makes the worker finish its calls in flight and
    claim no more; a second signal gives them back at once. Other workers take over the jobs of a killed worker, at the
    latest when their leases expire.
    """
    at_least_one("processes", processes, most=MAX_PROCESSES)

    async def work_exclusively() -> int:
        async with AsyncExitStack() as stack:
            if exclusive:
                await stack.enter_async_context(sole_worker(db["db_url"]))
            if processes == 1:
                return await _work_alone(db, **flags)
            if (port := flags.pop("metrics")) is not None:
                how = {"allow_network_fs": db["allow_network_fs"], "patience": flags["patience"]}
                database = await stack.enter_async_context(opened(db["db_url"], **how))
                await stack.enter_async_context(served(database, port, log))
            started, before = time.monotonic(), (await operate.status(**db)).runs
            code = await _work_in_processes(db, processes, **flags)
            names = flags["run"] or [one.run for one in before if one.word == RunState.ACTIVE]
            await _log_end(db, WorkReport(by_run=Counter(names), failed=1), started)
            return code

    click.get_current_context().exit(asyncio.run(work_exclusively()))


@click.command("worker-process", hidden=True)
@serving_options
@talk_options
@click.option("--parent", type=int)
@click.pass_obj
def worker_process(db: dict[str, Any], /, **flags: Any) -> None:
    """Run one of the processes of `lbr worker --processes`.

    A command of its own, so that settings of `lbr worker` in the environment and the config file do not make each
    process start as many again.
    """
    click.get_current_context().exit(asyncio.run(_work_alone(db, **flags)))


@click.command()
@run_argument
@click.option("-o", "--output", help=f"{OUTPUT}; JSONL to stdout by default.", **OUTPUT_OPTION)
@choice("--format", writers.OutputFormat, "The output's format; by default what the file name ends with.")
@output_options
@switch("--failed", "Write failed rows only: short for --status failed.")
@choice("--status", JobState, "Write rows in this state only.", multiple=True)
@switch("--wait", "Wait until every job is finished.")
@switch("--follow", "Write JSONL rows as their jobs finish, behind those in the file; end when all have.")
@choice("--order", Order, "With --follow: in input order, or as jobs finish.", default=str(Order.INPUT))
@with_database
def collect(db: dict[str, Any], /, run: str, output: str | None, **flags: Any) -> None:
    """Write a run's answers in input order, finished or not.

    A file appears whole or not at all, unless --follow appends to it. Exits with 3 if jobs are not finished, with 4 if some failed.
    """
    how = _output_arguments(flags)
    collected = asyncio.run(collect_api.collect(run, out="-" if output is None else output, **how, **flags, **db))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(collected.by_status.items()))
    log(f"run {collected.run}: {pluralize(collected.total, 'row')}: {counts or 'none'}")
    _report_collected(collected)
    click.get_current_context().exit(_collected_code(collected))


def _output_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of how rows are written; return them as arguments of `collect`."""
    how = {name: flags.pop(name) for name in ("shape", "spreadsheet_safe", "bom", "columns")}
    return how | {"unnest": not flags.pop("no_unnest"), "include": flags.pop("with")}


def _collected_code(collected: Collected) -> int:
    """Return 3 if answers may still come, 4 if some never will, else 0."""
    if collected.unfinished or not collected.sealed:
        return EXIT_UNFINISHED
    return EXIT_FAILURES if collected.failed else 0


def _report_collected(collected: Collected) -> None:
    """Print what is wrong with the rows, and what to do."""
    _report_left_out(collected)
    if collected.cut_off:
        log(summary.cut_off_words(collected.run, collected.cut_off, limited=collected.limited))
    if not collected.sealed:
        log(f"the enqueue of run {collected.run} has not finished; run it again if it was interrupted")
    if collected.unfinished or not collected.sealed:
        one = collected.unfinished == 1
        rows, them = ("1 row is", "it") if one else (f"{collected.unfinished} rows are", "them")
        log(f"{rows} not finished; `lbr worker` finishes {them}")
    elif collected.failed:
        one = collected.failed == 1
        rows, jobs = ("1 row has", "its job") if one else (f"{collected.failed} rows have", "their jobs")
        log(f"{rows} no answer{_reasons(collected)}; `lbr retry {collected.run}` puts {jobs} back")


def _report_left_out(collected: Collected) -> None:
    if collected.left_out:
        names = ", ".join(map(repr, collected.left_out[:5])) + ", …" * (len(collected.left_out) > 5)
        log(f"fields that the schema does not name have no column: {names}; --no-unnest and JSONL keep them")


def _reasons(collected: Collected) -> str:
    """Return the most frequent errors of the failed rows, after a colon; empty if none failed."""
    most = sorted(collected.reasons.items(), key=lambda one: -one[1])[:SHOWN_REASONS]
    alone = len(collected.reasons) == 1
    words = [printable(reason)[:200] + ("" if alone else f" ({pluralize(count, 'row')})") for reason, count in most]
    more = len(collected.reasons) - len(most)
    words += [f"and {more} other reasons"] * bool(more)
    return f": {'; '.join(words)}" if words else ""


@click.command()
@inputs_argument
@click.option("-o", "--output", required=True, help=f"{OUTPUT}; - is stdout.", **OUTPUT_OPTION)
@output_options
@task_options
@work_options
@hook_options
@processes_option
@talk_options
@with_database
def run(db: dict[str, Any], /, inputs: tuple[str, ...], output: str, dry_run: bool, **flags: Any) -> None:
    """Enqueue, work and collect; run it again to resume.

    Other workers may help. The output is written when every job is finished.
    """
    style = _output_arguments(flags)
    written = collect_api.Output(output, **{name: style[name] for name in style if name != "shape"})
    target, queue = Path(output).resolve(), file_of(db["db_url"])
    if written.path is not None and queue is not None and target == queue.resolve():
        raise UsageError(f"{output} is the queue; name a new file for the answers")
    if written.path is not None and any(target == Path(one).resolve() for one in (*inputs, *_list(flags["skip_bad"]))):
        raise UsageError(f"{output} is an input, or the file for bad rows; name a new file for the answers")
    collect_api.check_kept(written.read, some_of("--keep", flags["keep"], tuple(Extra)))
    at_least_one("processes", flags["processes"], most=MAX_PROCESSES)
    how = _work_flags(flags)
    hooks = Hooks(flags.pop("on_finish"), flags.pop("notify"), db["db_url"], log)
    if dry_run:
        show_dry_run(inputs, **flags | {"concurrency": flags["concurrency"] * flags["processes"]})
        return
    rest = {name: value for name, value in flags.items() if name not in how}
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        code = asyncio.run(_run(db, inputs, {"out": output} | style, on_progress, how, hooks, **rest))
    click.get_current_context().exit(code)


async def _run(
    db: dict[str, Any],
    inputs: tuple[str, ...],
    output: dict[str, Any],
    on_progress: Callable[[int], None],
    how: dict[str, Any],
    hooks: Hooks,
    processes: int,
    **flags: Any,
) -> int:
    started = time.monotonic()
    enqueued = await enqueue_inputs(db, inputs, on_progress, servable=True, **flags)
    log(describe_enqueue(enqueued))
    how |= {name: _list(flags[name]) for name in ("function", "result_type")}
    worked: WorkReport | None = None
    if processes > 1:
        await _work_in_processes(db, processes, run=(enqueued.run,), until="done", **how)
    else:
        async with shown(db, (enqueued.run,)) as show:
            worked = await _serve(db, show, run=enqueued.run, **how)
    ending = await summary.run_ending(enqueued.run, **db)
    now = ending.status
    if now.finished:
        collected = await collect_api.collect(now.run, **output, **db)
        where = "stdout" if output["out"] == "-" else output["out"]
        _report_left_out(collected)
        problems = ending.problems(collected.cut_off, limited=collected.limited)
        file, code = [f"{pluralize(collected.total, 'row')} in {where}"], _collected_code(collected)
    else:
        problems = ending.problems()[: bool(now.failed)]  # why it is paused, the next line says
        problems.append(f"unfinished, nothing was written; {unfinished_words(now.run, now.pause)}")
        file, code = [], EXIT_UNFINISHED
    log(ending.line(time.monotonic() - started))
    for line in problems:
        log(line, error=True)
    for line in file:
        log(line)
    written = output["out"] if now.finished and output["out"] != "-" else None
    await report_end(now.run, hooks, file=written, allow_network_fs=db["allow_network_fs"])
    if worked is not None:
        _leave_stuck(worked, code)
    return code


def _list(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)
