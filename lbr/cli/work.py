"""`lbr worker`, and how a worker listens to signals."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lbr.api import work
from lbr.api.status import paused_words
from lbr.cli.app import EXIT_FAILURES, EXIT_UNFINISHED, database_option, log, with_options
from lbr.cli.collect import cut_off_words
from lbr.core import open_files
from lbr.core.config import MAX_PROCESSES, WorkOptions, at_least_one
from lbr.core.text import pluralize
from lbr.core.types import Until
from lbr.worker.processes import handled_signals, run_processes

if TYPE_CHECKING:
    import signal

    from lbr.worker.calls import WorkReport
    from lbr.worker.worker import Worker

F = TypeVar("F", bound=Callable[..., Any])

DEFAULTS = WorkOptions()


def work_options(command: F) -> F:
    """Add the flags that say how a worker works."""
    options = [
        click.option(
            "--concurrency", type=int, default=DEFAULTS.concurrency, help="Calls at a time, per process."
        ),
        click.option(
            "--lease", type=float, default=DEFAULTS.lease, help="Seconds that a claim holds unrenewed."
        ),
        click.option(
            "--timeout", type=float, default=DEFAULTS.timeout, help="Seconds that one call may take."
        ),
        click.option(
            "--grace", type=float, default=DEFAULTS.grace, help="Seconds that a drain waits for calls."
        ),
        click.option(
            "--patience",
            type=float,
            default=DEFAULTS.patience,
            help="Seconds to wait for a database that is busy or away.",
        ),
        click.option(
            "--outage-patience",
            type=float,
            default=DEFAULTS.outage_patience,
            help="Seconds of waits for a model that no call reaches, until its runs are paused.",
        ),
        click.option(
            "--rpm", type=int, help="Requests a minute of all workers together; `lbr limit` lifts it."
        ),
        click.option("--tpm", type=int, help="Tokens a minute of all workers together, in and out."),
        click.option(
            "--max-cost",
            type=float,
            metavar="DOLLARS",
            help="What each run may cost, in all; when it is spent the run is paused.",
        ),
    ]
    return with_options(command, options)


def processes_option(command: F) -> F:
    """Add the flag that says how many processes work."""
    option = click.option("--processes", type=int, default=1, help="Worker processes to start.")
    return option(command)


def serving_options(command: F) -> F:
    """Add the flags that say what a worker serves, how and until when."""
    what = [
        click.option(
            "--run", metavar="NAME", multiple=True, help="A run to serve; all that it can if unset."
        ),
        click.option("--function", metavar="MODULE:NAME", multiple=True, help="A function that it may call."),
        click.option("--result-type", metavar="MODULE:CLASS", multiple=True, help="Checks answers with it."),
    ]
    until = click.option(
        "--until",
        type=click.Choice([str(one) for one in Until]),
        default=str(Until.DONE),
        help="Stop when every job is done, when nothing can be claimed, or never.",
    )
    return with_options(work_options(until(command)), what)


def work_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's flags that say how a worker works; UsageError for a value out of range."""
    how = {one.name: flags[one.name] for one in fields(WorkOptions) if one.name in flags}
    WorkOptions(**how)
    return how


async def serve(
    db: dict[str, Any],
    notify: Callable[[str], None],
    *,
    function: tuple[str, ...],
    result_type: tuple[str, ...],
    parent: int | None = None,
    **how: Any,
) -> WorkReport:
    """Be a worker that listens to signals: drain on the first Ctrl-C, SIGTERM or SIGHUP, release at once on the second.

    `parent` is the end of a pipe that comes to its own end with the process that started this one; then it drains.
    """
    # A process of our own: modules live as long as it does, and are not worth looking through again and again.
    gc.freeze()
    open_files.raise_limit()
    loop = asyncio.get_running_loop()
    told = False

    def listen(worker: Worker) -> None:
        def stop(_: signal.Signals) -> None:
            nonlocal told
            if told:
                worker.abort()
                return
            told = True
            _leave_closed_terminal()
            worker.drain()
            log("lbr: stopping: finishing the calls in flight; once more to give them back at once")

        def end_with_parent(pipe: int) -> None:
            loop.remove_reader(pipe)
            worker.drain()
            log("lbr: the process that started this one is gone: finishing the calls in flight")

        until_the_end.enter_context(handled_signals(stop))
        if parent is not None:
            loop.add_reader(parent, end_with_parent, parent)
            until_the_end.callback(loop.remove_reader, parent)

    with ExitStack() as until_the_end:
        may: dict[str, Any] = {"functions": function, "result_types": result_type}
        return await work.work(**how, **may, **db, notify=notify, on_start=listen)


def _leave_closed_terminal() -> None:
    """Write to nothing what would go to a terminal that was closed: a function that prints must not fail by that."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError as error:
            if error.errno != errno.EIO:
                continue
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), number)


async def work_alone(db: dict[str, Any], **how: Any) -> int:
    """Be one worker process to its end, and return its exit code."""
    report = await serve(db, lambda line: log(f"lbr: {line}"), **how)
    log(f"lbr: worker: {describe_work(report)}")
    for name, count in report.cut_off.items():
        log(f"lbr: run {name}: {cut_off_words(name, count, limited=name in report.limited)}")
    for name, pause in report.paused.items():
        log(f"lbr: run {name} is paused: {paused_words(name, pause)}")
    for name in report.interrupted:
        log(f"lbr: the enqueue of run {name} did not come to its end; run the same enqueue again")
    code = EXIT_UNFINISHED if report.paused or report.interrupted else 0
    if report.failed and how.get("until") != Until.FOREVER:
        # A service restarts what exits with an error, and would do so for each failed job.
        code = EXIT_FAILURES
    leave_stuck(report, code)
    return code


def leave_stuck(report: WorkReport, code: int) -> None:
    """End the process where calls would not be cancelled, for asyncio would wait for them for ever."""
    if report.stuck:
        # Their jobs are released.
        log(f"lbr: left {pluralize(report.stuck, 'call')} behind that would not be cancelled")
        os._exit(code)


def describe_work(report: WorkReport) -> str:
    """Return the worker's last words."""
    parts = [f"{report.done} done", f"{report.failed} failed"]
    parts += [
        f"{count} {word}"
        for word, count in (
            ("retried", report.retried),
            ("reclaimed", report.reclaimed),
            ("released", report.released),
            ("too late", report.stale),
        )
        if count
    ]
    return ", ".join(parts)


@click.command()
@serving_options
@processes_option
@click.option("--exclusive", is_flag=True, help="Exit at once, with 0, where another exclusive worker runs.")
@database_option
@click.pass_obj
@click.pass_context
def worker(
    context: click.Context, db: dict[str, Any], /, processes: int, exclusive: bool, **flags: Any
) -> None:
    """Claim jobs and answer them; start as many as you like, in any number of terminals.

    Ctrl-C, SIGTERM or a closed terminal (SIGHUP, unless under nohup): finish what is in flight, claim no more; a
    second signal gives it back at once. A killed worker's jobs are taken up by the others, at the latest when their
    leases run out.
    """
    at_least_one("processes", processes, most=MAX_PROCESSES)
    context.exit(asyncio.run(_work(db, exclusive, processes, flags)))


async def _work(db: dict[str, Any], exclusive: bool, processes: int, flags: dict[str, Any]) -> int:
    async with work.exclusive(db["db_url"], wanted=exclusive):
        if processes > 1:
            return await work_in_processes(db, processes, **flags)
        return await work_alone(db, run=flags.pop("run") or None, **flags)


@click.command("worker-process", hidden=True)
@serving_options
@click.option("--parent", type=int)
@click.pass_obj
@click.pass_context
def worker_process(context: click.Context, db: dict[str, Any], /, run: tuple[str, ...], **flags: Any) -> None:
    """Be one of the processes of `lbr worker --processes`.

    A command of its own: what the environment and the config file say of `lbr worker` is for the one who starts
    these, and would have each of them start as many again.
    """
    context.exit(asyncio.run(work_alone(db, run=run or None, **flags)))


async def work_in_processes(db: dict[str, Any], count: int, **flags: Any) -> int:
    """Work in several processes; return the worst exit code of those that were not killed."""
    # Here once, rather than by every child.
    work_flags(flags)
    await work.check_queue(**db, names=flags["run"], patience=flags["patience"])
    # Not as a flag, for a URL may have a password in it, and every user of the machine sees the flags.
    environment = {"LBR_DB": db["db_url"], "LBR_ALLOW_NETWORK_FS": str(int(db["allow_network_fs"]))}
    arguments = ["worker-process"]
    for flag, value in flags.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            arguments += [f"--{flag.replace('_', '-')}", str(one)]
    codes = await run_processes(
        arguments, count, environment=environment, notify=lambda line: log(f"lbr: {line}")
    )
    ended = [code for code in codes if code >= 0]
    return max(ended) if ended else 1
