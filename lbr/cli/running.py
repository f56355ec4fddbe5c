"""`lbr run`: enqueue, work and collect in one, with a progress bar."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from lbr.api import operate
from lbr.api.collect import collect
from lbr.api.status import RunStatus, one_line, unfinished_words
from lbr.cli.app import EXIT_UNFINISHED, database_option, log
from lbr.cli.collect import csv_options, describe, exit_code
from lbr.cli.enqueue import counting_kept, enqueue_inputs, task_options
from lbr.cli.enqueue import describe as describe_enqueue
from lbr.cli.work import leave_stuck, processes_option, serve, work_flags, work_in_processes, work_options
from lbr.core.config import MAX_PROCESSES, at_least_one
from lbr.core.errors import UsageError
from lbr.core.text import duration, harmless
from lbr.core.types import Shape
from lbr.io import writers
from lbr.store.database import file_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lbr.worker.calls import WorkReport

LOOK_SECONDS = 0.5
LINE_SECONDS = 10.0


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", required=True, help="A .jsonl, .csv or .db file.")
@click.option(
    "--shape",
    type=click.Choice([str(one) for one in Shape]),
    default=str(Shape.ORIGINAL),
    help="A row for every input, or for every distinct one.",
)
@csv_options
@task_options
@work_options
@processes_option
@database_option
@click.pass_obj
@click.pass_context
def run(
    context: click.Context,
    db: dict[str, Any],
    /,
    inputs: tuple[str, ...],
    output: str,
    shape: str,
    **flags: Any,
) -> None:
    """Enqueue, work and collect in one command; run it again to resume.

    Other workers may help. The output is written when every job has come to its end.
    """
    writers.check_output(output)
    csv = {name: flags.pop(name) for name in ("spreadsheet_safe", "bom")}
    writers.CsvStyle(**csv).check(writers.format_of(output))
    _check_overwriting((*inputs, *_one(flags["skip_bad"])), output, db["db_url"])
    at_least_one("processes", flags["processes"], most=MAX_PROCESSES)
    work_flags(flags)
    with counting_kept(inputs, append=flags["append"]) as on_progress:
        code = asyncio.run(_run(db, inputs, output, {"shape": shape, **csv}, on_progress, flags))
    context.exit(code)


def _check_overwriting(inputs: tuple[str, ...], out: str, db_url: str) -> None:
    """Raise UsageError where the answers would replace what they come from."""
    target, queue = Path(out).resolve(), file_of(db_url)
    if queue is not None and target == queue.resolve():
        raise UsageError(f"expected another file for the answers than the queue, got: {out}; name a new one")
    if any(target == Path(source).resolve() for source in inputs):
        raise UsageError(
            f"expected another file for the answers than the input and the bad rows, got: {out}; name a new one"
        )


async def _run(
    db: dict[str, Any],
    inputs: tuple[str, ...],
    out: str,
    how_written: dict[str, Any],
    on_progress: Callable[[int], None],
    flags: dict[str, Any],
) -> int:
    started = time.monotonic()
    processes, how = flags.pop("processes"), work_flags(flags)
    flags = {name: value for name, value in flags.items() if name not in how}
    may: dict[str, Any] = {name: _one(flags[name]) for name in ("function", "result_type")}
    enqueued = await enqueue_inputs(db, inputs, on_progress, servable=True, **flags)
    log(f"lbr: {describe_enqueue(enqueued)}")
    worked: WorkReport | None = None
    async with _progress(db, enqueued.run) as line:
        if processes > 1:
            await work_in_processes(db, processes, run=(enqueued.run,), until="done", **how, **may)
        else:
            worked = await serve(db, line, run=enqueued.run, **how, **may)
    code = await _collect(db, enqueued.run, out, how_written, started)
    if worked is not None:
        leave_stuck(worked, code)
    return code


async def _collect(
    db: dict[str, Any], run: str, out: str, how_written: dict[str, Any], started: float
) -> int:
    """Write the answers of a run that has come to its end, or say why it has not; return the exit code."""
    (now,) = (await operate.status(run, **db)).runs
    if not now.finished:
        way_out = unfinished_words(now.run, now.pause)
        log(f"lbr: {one_line(now)}; unfinished, nothing was written; {way_out}")
        return EXIT_UNFINISHED
    collected = await collect(run, out=out, **how_written, **db)
    log(f"lbr: {describe(collected)}, in {out}, after {duration(time.monotonic() - started)}")
    return exit_code(collected)


def _one(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


@asynccontextmanager
async def _progress(db: dict[str, Any], /, run: str) -> AsyncIterator[Callable[[str], None]]:
    """Show how the run goes: a bar on a terminal, else a line now and then. Yields where to put lines."""
    show = _bar if sys.stderr.isatty() else _lines
    async with show(db, run) as line:
        yield line


class _Terminal:
    """The terminal behind stderr, which may be closed before the work is done: then nobody looks any more."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@asynccontextmanager
async def _bar(db: dict[str, Any], /, run: str) -> AsyncIterator[Callable[[str], None]]:
    from rich.console import Console  # noqa: PLC0415 - only where somebody looks
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(file=cast("IO[str]", _Terminal()))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(run, total=None, left="")

        def look(status: RunStatus) -> None:
            ended = status.done + status.failed + status.cancelled
            failed = f" ({status.failed} failed)" if status.failed else ""
            left = "" if status.eta_seconds is None else f"{duration(status.eta_seconds)} left"
            bar.update(task, total=status.jobs, completed=ended, description=f"{run}{failed}", left=left)

        async with _looking(db, run, look):
            yield lambda text: console.print(harmless(f"lbr: {text}"), markup=False, highlight=False)


@asynccontextmanager
async def _lines(db: dict[str, Any], /, run: str) -> AsyncIterator[Callable[[str], None]]:
    last = time.monotonic()

    def look(status: RunStatus) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            log(f"lbr: {one_line(status)}")

    async with _looking(db, run, look):
        yield lambda text: log(f"lbr: {text}")


@asynccontextmanager
async def _looking(db: dict[str, Any], run: str, look: Callable[[RunStatus], None]) -> AsyncIterator[None]:
    async def watch() -> None:
        async for status in operate.follow(run, seconds=LOOK_SECONDS, **db):
            look(status)

    watching = asyncio.create_task(watch())
    try:
        yield
        (last,) = (await operate.status(run, **db)).runs
        look(last)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
