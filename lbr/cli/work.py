"""`lbr worker`, and `lbr run`, which enqueues, works and collects in one."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import sys
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from lbr.api import operate, work
from lbr.api.collect import collect
from lbr.api.status import one_line, paused_words, unfinished_words
from lbr.cli.app import EXIT_FAILURES, EXIT_UNFINISHED, database_option, log, options
from lbr.cli.collect import cut_off_words, describe, exit_code, output_options
from lbr.cli.enqueue import counting_kept, enqueue_inputs, task_options
from lbr.cli.enqueue import describe as describe_enqueue
from lbr.core import open_files
from lbr.core.config import MAX_PROCESSES, WorkOptions, at_least_one
from lbr.core.errors import UsageError
from lbr.core.text import duration, harmless, pluralize
from lbr.core.types import Until
from lbr.io import writers
from lbr.store.database import file_of
from lbr.worker.processes import handled_signals, run_processes

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from lbr.api.status import RunStatus
    from lbr.worker.calls import WorkReport
    from lbr.worker.worker import Worker

    Progress = tuple[Callable[[RunStatus], None], Callable[[str], None]]
    """What shows a run's status, and what prints a line."""

DEFAULTS = WorkOptions()
LOOK_SECONDS = 0.5
LINE_SECONDS = 10.0


def _seconds(flag: str, meaning: str) -> Any:
    name = flag.removeprefix("--").replace("-", "_")
    return click.option(flag, type=float, default=getattr(DEFAULTS, name), help=meaning)


work_options = options(
    click.option("--concurrency", type=int, default=DEFAULTS.concurrency, help="Calls at a time, per process."),
    _seconds("--lease", "Seconds before a silent worker's jobs are taken over."),
    _seconds("--timeout", "Seconds that one call may take."),
    _seconds("--grace", "Seconds to wait for calls in flight when the worker is stopped."),
    _seconds("--patience", "Seconds to wait for a database that is busy or unreachable."),
    _seconds("--outage-patience", "Seconds to wait for an unreachable model before its runs are paused."),
    click.option("--rpm", type=int, help="Requests per minute, all workers together; `lbr limit` removes the limit."),
    click.option("--tpm", type=int, help="Tokens per minute, all workers together, input and output."),
    click.option(
        "--max-cost",
        type=float,
        metavar="DOLLARS",
        help="What each run may cost in total; then the run is paused.",
    ),
)
processes_option = click.option("--processes", type=int, default=1, help="Number of worker processes to start.")
serving_options = options(
    click.option("--run", metavar="NAME", multiple=True, help="A run to work on; by default all that it can."),
    click.option("--function", metavar="MODULE:NAME", multiple=True, help="A function that it may call."),
    click.option("--result-type", metavar="MODULE:CLASS", multiple=True, help="A class to check answers with."),
    work_options,
    click.option(
        "--until",
        type=click.Choice([str(one) for one in Until]),
        default=str(Until.DONE),
        help="Stop when every job is done, when nothing can be claimed, or never.",
    ),
)


def work_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's flags that WorkOptions has; UsageError for a value out of range."""
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
    """Run a worker that handles signals: the first Ctrl-C, SIGTERM or SIGHUP drains it, the second releases all jobs.

    `parent` is the end of a pipe that is closed when the process that started this one ends; then it drains as well.
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
                return
            stopping = True
            _leave_closed_terminal()
            worker.drain()
            log("lbr: stopping: finishing the calls in flight; press Ctrl-C again to give them back at once")

        def end_with_parent(pipe: int) -> None:
            loop.remove_reader(pipe)
            worker.drain()
            log("lbr: the process that started this one is gone: finishing the calls in flight")

        stack.enter_context(handled_signals(stop))
        if parent is not None:
            loop.add_reader(parent, end_with_parent, parent)
            stack.callback(loop.remove_reader, parent)

    with ExitStack() as stack:
        used: dict[str, Any] = {"functions": function, "result_types": result_type}
        return await work.work(**how, **used, **db, notify=notify, on_start=listen)


def _leave_closed_terminal() -> None:
    """Replace a closed terminal by /dev/null: a function that prints must not fail because of it."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError as error:
            if error.errno != errno.EIO:
                continue
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), number)


async def work_alone(db: dict[str, Any], *, run: tuple[str, ...], **how: Any) -> int:
    """Run one worker in this process, and return its exit code."""
    report = await serve(db, lambda line: log(f"lbr: {line}"), run=run or None, **how)
    log(f"lbr: worker: {describe_work(report)}")
    for name, count in report.cut_off.items():
        log(f"lbr: run {name}: {cut_off_words(name, count, limited=name in report.limited)}")
    for name, pause in report.paused.items():
        log(f"lbr: run {name} is paused: {paused_words(name, pause)}")
    for name in report.interrupted:
        log(f"lbr: the enqueue of run {name} has not finished; run the same enqueue again")
    code = EXIT_UNFINISHED if report.paused or report.interrupted else 0
    if report.failed and how.get("until") != Until.FOREVER:
        # A service restarts what exits with an error, and would do so for each failed job.
        code = EXIT_FAILURES
    leave_stuck(report, code)
    return code


def leave_stuck(report: WorkReport, code: int) -> None:
    """End the process if calls could not be cancelled, because asyncio would wait for them forever."""
    if report.stuck:
        # Their jobs are released.
        log(f"lbr: left {pluralize(report.stuck, 'call')} behind that could not be cancelled")
        os._exit(code)


def describe_work(report: WorkReport) -> str:
    """Return what a worker did, in words."""
    counts = [("retried", report.retried), ("reclaimed", report.reclaimed)]
    counts += [("released", report.released), ("too late", report.stale)]
    parts = [f"{report.done} done", f"{report.failed} failed"]
    return ", ".join(parts + [f"{count} {word}" for word, count in counts if count])


async def work_in_processes(db: dict[str, Any], count: int, **flags: Any) -> int:
    """Work in several processes; return the worst exit code of those that were not killed."""
    # Check here once, instead of in every child.
    work_flags(flags)
    await work.check_queue(**db, names=flags["run"], patience=flags["patience"])
    # Not as a flag, because a URL may have a password in it, and every user of the machine sees the flags.
    environment = {"LBR_DB": db["db_url"], "LBR_ALLOW_NETWORK_FS": str(int(db["allow_network_fs"]))}
    arguments = ["worker-process"]
    for flag, value in flags.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            arguments += [f"--{flag.replace('_', '-')}", str(one)]
    codes = await run_processes(arguments, count, environment=environment, notify=lambda line: log(f"lbr: {line}"))
    return max((code for code in codes if code >= 0), default=1)


@click.command()
@serving_options
@processes_option
@click.option("--exclusive", is_flag=True, help="Exit at once, with 0, if another exclusive worker is running.")
@database_option
@click.pass_obj
@click.pass_context
def worker(context: click.Context, db: dict[str, Any], /, processes: int, exclusive: bool, **flags: Any) -> None:
    """Process jobs; start as many workers as you like, in any number of terminals.

    Ctrl-C, SIGTERM or a closed terminal (SIGHUP, unless under nohup) makes the worker finish its calls in flight and
    claim no more; a second signal gives them back at once. Other workers take over the jobs of a killed worker, at the
    latest when their leases expire.
    """
    at_least_one("processes", processes, most=MAX_PROCESSES)

    async def work_exclusively() -> int:
        async with work.exclusive(db["db_url"], wanted=exclusive):
            if processes > 1:
                return await work_in_processes(db, processes, **flags)
            return await work_alone(db, **flags)

    context.exit(asyncio.run(work_exclusively()))


@click.command("worker-process", hidden=True)
@serving_options
@click.option("--parent", type=int)
@click.pass_obj
@click.pass_context
def worker_process(context: click.Context, db: dict[str, Any], /, **flags: Any) -> None:
    """Run one of the processes of `lbr worker --processes`.

    A command of its own, so that settings of `lbr worker` in the environment and the config file do not make each
    process start as many again.
    """
    context.exit(asyncio.run(work_alone(db, **flags)))


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", required=True, help="A .jsonl, .csv or .db file.")
@output_options
@task_options
@work_options
@processes_option
@database_option
@click.pass_obj
@click.pass_context
def run(context: click.Context, db: dict[str, Any], /, inputs: tuple[str, ...], output: str, **flags: Any) -> None:
    """Enqueue, work and collect in one command; run it again to resume.

    Other workers may help. The output is written when every job is finished.
    """
    writers.check_output(output)
    style = {name: flags.pop(name) for name in ("shape", "spreadsheet_safe", "bom")}
    writers.CsvStyle(style["spreadsheet_safe"], style["bom"]).check(writers.format_of(output))
    target, queue = Path(output).resolve(), file_of(db["db_url"])
    if queue is not None and target == queue.resolve():
        raise UsageError(f"{output} is the queue; name a new file for the answers")
    if any(target == Path(one).resolve() for one in (*inputs, *_list(flags["skip_bad"]))):
        raise UsageError(f"{output} is an input, or the file for bad rows; name a new file for the answers")
    at_least_one("processes", flags["processes"], most=MAX_PROCESSES)
    how = work_flags(flags)
    rest = {name: value for name, value in flags.items() if name not in how}
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        code = asyncio.run(_run(db, inputs, {"out": output} | style, on_progress, how, **rest))
    context.exit(code)


async def _run(
    db: dict[str, Any],
    inputs: tuple[str, ...],
    output: dict[str, Any],
    on_progress: Callable[[int], None],
    how: dict[str, Any],
    processes: int,
    **flags: Any,
) -> int:
    started = time.monotonic()
    enqueued = await enqueue_inputs(db, inputs, on_progress, servable=True, **flags)
    log(f"lbr: {describe_enqueue(enqueued)}")
    how |= {name: _list(flags[name]) for name in ("function", "result_type")}
    worked: WorkReport | None = None
    async with _progress(db, enqueued.run) as line:
        if processes > 1:
            await work_in_processes(db, processes, run=(enqueued.run,), until="done", **how)
        else:
            worked = await serve(db, line, run=enqueued.run, **how)
    (now,) = (await operate.status(enqueued.run, **db)).runs
    if now.finished:
        collected = await collect(now.run, **output, **db)
        log(f"lbr: {describe(collected)}, in {output['out']}, after {duration(time.monotonic() - started)}")
        code = exit_code(collected)
    else:
        log(f"lbr: {one_line(now)}; unfinished, nothing was written; {unfinished_words(now.run, now.pause)}")
        code = EXIT_UNFINISHED
    if worked is not None:
        leave_stuck(worked, code)
    return code


def _list(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


@asynccontextmanager
async def _progress(db: dict[str, Any], /, run: str) -> AsyncIterator[Callable[[str], None]]:
    """Show a run's progress: a bar on a terminal, else a line from time to time. Yields what prints lines."""
    with (_bar if sys.stderr.isatty() else _lines)(run) as (show, line):

        async def watch() -> None:
            async for status in operate.follow(run, seconds=LOOK_SECONDS, **db):
                show(status)

        watching = asyncio.create_task(watch())
        try:
            yield line
            (last,) = (await operate.status(run, **db)).runs
            show(last)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


class _Terminal:
    """The terminal behind stderr; errors are ignored, because it may be closed before the work is done."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def _bar(run: str) -> Iterator[Progress]:
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(file=cast("IO[str]", _Terminal()))
    words, left_words = "{task.description}", "{task.fields[left]}"
    columns = (
        TextColumn(words, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(left_words, markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(run, total=None, left="")

        def show(status: RunStatus) -> None:
            ended = status.done + status.failed + status.cancelled
            failed = f" ({status.failed} failed)" if status.failed else ""
            left = "" if status.eta_seconds is None else f"{duration(status.eta_seconds)} left"
            bar.update(task, total=status.jobs, completed=ended, description=f"{run}{failed}", left=left)

        yield show, lambda text: console.print(harmless(f"lbr: {text}"), markup=False, highlight=False)


@contextmanager
def _lines(_: str) -> Iterator[Progress]:
    last = time.monotonic()

    def show(status: RunStatus) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            log(f"lbr: {one_line(status)}")

    yield show, lambda text: log(f"lbr: {text}")
