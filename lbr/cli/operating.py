"""The commands that look at runs and steer them: status, show, retry, cancel, pause, resume."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import orjson

from lbr import api
from lbr.cli.app import database_option, tell
from lbr.config import positive
from lbr.progress import describe

if TYPE_CHECKING:
    from lbr.store.reads import Story

LARGEST_IDX = 2**63 - 1
LONGEST_PAUSE_SECONDS = 86_400.0


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")
@click.option("--watch", is_flag=True, help="Print again every few seconds, until all is finished.")
@click.option("--interval", type=float, default=2.0, help="Seconds between two looks.")
@database_option
@click.pass_obj
def status(db: dict[str, Any], /, run: str | None, as_json: bool, watch: bool, interval: float) -> None:
    """Tell how one run stands, or all of them: counts, speed, tokens, cost, failures, workers."""
    pause_seconds = min(max(0.1, positive("interval", interval)), LONGEST_PAUSE_SECONDS)
    with suppress(KeyboardInterrupt) if watch else nullcontext():
        _print_status(db, run, as_json=as_json, watch=watch, pause_seconds=pause_seconds)


def _print_status(
    db: dict[str, Any], run: str | None, *, as_json: bool, watch: bool, pause_seconds: float
) -> None:
    while True:
        found = asyncio.run(api.status(run, **db))
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        tell(orjson.dumps(found.to_dict()) if as_json else describe(found))
        if not watch or all(one.finished or one.state == "cancelled" for one in found.runs):
            return
        time.sleep(pause_seconds)


@click.command()
@click.argument("run")
@click.argument("idx", type=click.IntRange(0, LARGEST_IDX))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")
@database_option
@click.pass_obj
def show(db: dict[str, Any], /, run: str, idx: int, as_json: bool) -> None:
    """Tell everything about the input at place IDX, counted from 0: its job, its answer, its failed tries."""
    story = asyncio.run(api.show(run, idx, **db))
    fields = story.row.to_dict() | {k: v for k, v in asdict(story).items() if k != "row"}
    tell(orjson.dumps(fields) if as_json else _describe_story(story))


def _describe_story(story: Story) -> str:
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
    for one in story.tries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at / 1000))
        lines.append(
            f"{when} claim {one.claim_seq} {one.what}: {one.family or '-'} {one.error}: {one.message}"
        )
        if one.text:
            lines.append(f"  raw answer: {one.text}")
    return "\n".join(lines)


@click.command()
@click.argument("run")
@database_option
@click.pass_obj
def retry(db: dict[str, Any], /, run: str) -> None:
    """Put a run's failed and cancelled jobs back to pending, with all their tries."""
    tell(f"run {run}: {asyncio.run(api.retry(run, **db))} jobs back to pending")


@click.command()
@click.argument("run")
@database_option
@click.pass_obj
def cancel(db: dict[str, Any], /, run: str) -> None:
    """Cancel a run's pending jobs; calls in flight end and their answers are kept."""
    tell(f"run {run}: {asyncio.run(api.cancel(run, **db))} jobs cancelled")


@click.command()
@click.argument("run")
@click.option("--reason", default="by hand", help="What `lbr status` says about it.")
@database_option
@click.pass_obj
def pause(db: dict[str, Any], /, run: str, reason: str) -> None:
    """Stop the claiming of a run's jobs, in every worker, until `lbr resume`."""
    asyncio.run(api.pause(run, reason=reason, **db))
    tell(f"run {run}: paused")


@click.command()
@click.argument("run")
@database_option
@click.pass_obj
def resume(db: dict[str, Any], /, run: str) -> None:
    """Let a paused run's jobs be claimed again."""
    asyncio.run(api.resume(run, **db))
    tell(f"run {run}: active")
