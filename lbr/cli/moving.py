"""`lbr move`."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import orjson

from lbr.api import move as api
from lbr.cli.app import echo, log
from lbr.core.errors import StoppedError
from lbr.core.text import pluralize


@click.command()
@click.argument("from_url", metavar="FROM_URL")
@click.argument("to_url", metavar="TO_URL")
@click.argument("run")
@click.option(
    "--restart", is_flag=True, help="Copy everything again, instead of going on with an interrupted copy."
)
@click.option("--json", is_flag=True, help="Print JSON, one object.")
@click.pass_obj
def move(db: dict[str, Any], /, from_url: str, to_url: str, run: str, restart: bool, json: bool) -> None:
    """Copy a run with its answers into another database, and go on there.

    The run must be paused, finished or cancelled, and no worker may hold a job of it. Everything that it holds is
    copied and compared. It stays where it was as a paused copy. Interrupted, run the same command again.
    """
    try:
        moved = asyncio.run(
            api.move(
                run,
                db_url=from_url,
                to_url=to_url,
                restart=restart,
                allow_network_fs=db["allow_network_fs"],
                notify=lambda line: log(f"lbr: {line}"),
            )
        )
    except KeyboardInterrupt as error:
        raise StoppedError("the move has not finished; run the same command again to go on") from error
    if json:
        echo(orjson.dumps(moved.to_dict()))
        return
    done = "was moved before to" if moved.known else "moved to"
    echo(
        f"run {moved.run}: {pluralize(moved.inputs, 'input')}, {pluralize(moved.jobs, 'job')}, {pluralize(moved.answers, 'answer')} {done} {moved.target}"
    )
    if moved.known:
        return
    echo(f"hash {moved.hash}: the same in both")
    log(
        f"lbr: go on with --db or LBR_DB for {moved.target}: `lbr resume {moved.run}` if the run was paused, then "
        f"`lbr worker`. A paused copy stays here; resuming that would call twice for what is left"
    )
