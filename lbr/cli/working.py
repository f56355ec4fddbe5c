"""`lbr worker`, and how a worker listens to signals."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lbr import api
from lbr.cli.app import database_option, say
from lbr.config import WorkOptions, at_least_one
from lbr.jobs import Until
from lbr.processes import SIGNALS
from lbr.progress import paused_words

if TYPE_CHECKING:
    from lbr.calls import WorkReport
    from lbr.worker import Worker

F = TypeVar("F", bound=Callable[..., Any])

DEFAULTS = WorkOptions()
EXIT_UNFINISHED = 3


def work_options(command: F) -> F:
    """Add the flags that say how a worker works."""
    options = [
        click.option(
            "--concurrency", type=int, default=DEFAULTS.concurrency, help="Calls at a time, per process."
        ),
        click.option("--processes", type=int, default=1, help="Worker processes to start."),
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
    for option in reversed(options):
        command = option(command)
    return command


async def serve(db: dict[str, Any], notify: Callable[[str], None], **how: Any) -> WorkReport:
    """Be a worker that listens to signals: drain on the first Ctrl-C or SIGTERM, release at once on the second."""
    # A process of our own: modules live as long as it does, and are not worth looking through again and again.
    gc.freeze()
    loop = asyncio.get_running_loop()
    told = False

    def listen(worker: Worker) -> None:
        def stop() -> None:
            nonlocal told
            if told:
                worker.abort()
                return
            told = True
            say("lbr: stopping: finishing the calls in flight; once more to give them back at once")
            worker.drain()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop)

    try:
        return await api.work(**how, **db, notify=notify, on_start=listen)
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def work_alone(db: dict[str, Any], **how: Any) -> int:
    """Be one worker process to its end, and return its exit code."""
    report = await serve(db, lambda line: say(f"lbr: {line}"), **how)
    say(f"lbr: worker: {describe_work(report)}")
    for name, reason in report.paused.items():
        say(f"lbr: run {name} is paused: {paused_words(name, reason)}")
    for name in report.interrupted:
        say(f"lbr: the enqueue of run {name} did not come to its end; run the same enqueue again")
    code = EXIT_UNFINISHED if report.paused or report.interrupted else 0
    if report.stuck:
        # Their jobs are released; asyncio would wait for them for ever.
        say(f"lbr: left {report.stuck} calls behind that would not be cancelled")
        os._exit(code)
    return code


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
@click.option(
    "--run", "runs", metavar="NAME", multiple=True, help="A run to serve; all that it can if unset."
)
@click.option(
    "--function", "functions", metavar="MODULE:NAME", multiple=True, help="A function that it may call."
)
@click.option(
    "--result-type", "result_types", metavar="MODULE:CLASS", multiple=True, help="Checks answers with it."
)
@work_options
@click.option(
    "--until",
    type=click.Choice([str(one) for one in Until]),
    default=str(Until.DONE),
    help="Stop when every job is done, when nothing can be claimed, or never.",
)
@click.option("--exclusive", is_flag=True, help="Exit at once, with 0, where another exclusive worker runs.")
@database_option
@click.pass_obj
@click.pass_context
def worker(
    context: click.Context,
    db: dict[str, Any],
    /,
    runs: tuple[str, ...],
    processes: int,
    exclusive: bool,
    **flags: Any,
) -> None:
    """Claim jobs and answer them; start as many as you like, in any number of terminals.

    Ctrl-C or SIGTERM: finish what is in flight, claim no more; a second one gives it back at once. A killed
    worker's jobs are taken up by the others, at the latest when their leases
    run out.
    """
    at_least_one("processes", processes)
    context.exit(asyncio.run(_work(db, exclusive, processes, runs, flags)))


async def _work(
    db: dict[str, Any], exclusive: bool, processes: int, runs: tuple[str, ...], flags: dict[str, Any]
) -> int:
    async with api.exclusive(db["db_url"], wanted=exclusive):
        if processes > 1:
            return await work_in_processes(db, processes, runs=runs, **flags)
        return await work_alone(db, run=runs or None, **flags)


async def work_in_processes(db: dict[str, Any], count: int, **flags: Any) -> int:
    """Run `lbr worker` in several processes; return the worst exit code of those that were not killed."""
    # Checked here once, rather than by every child.
    WorkOptions(
        flags["concurrency"],
        flags["lease"],
        Until(flags["until"]),
        flags["grace"],
        flags["timeout"],
        flags["patience"],
        flags["rpm"],
        flags["tpm"],
        flags["max_cost"],
    )
    # Not as a flag, for a URL may have a password in it, and every user of the machine sees the flags.
    environment = {"LBR_DB": db["db_url"], "LBR_ALLOW_NETWORK_FS": str(int(db["allow_network_fs"]))}
    arguments = ["worker"]
    for flag, value in flags.items():
        name = {
            "runs": "run",
            "functions": "function",
            "result_types": "result-type",
            "max_cost": "max-cost",
        }.get(flag, flag)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            arguments += [f"--{name}", str(one)]
    codes = await api.run_processes(
        arguments, count, environment=environment, notify=lambda line: say(f"lbr: {line}")
    )
    ended = [code for code in codes if code >= 0]
    return max(ended) if ended else 1
