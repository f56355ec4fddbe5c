"""`lbr batches`: what is at the provider."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from lbr.api import batches as api
from lbr.cli import completion
from lbr.cli.app import echo, echo_json, log, option, switch, with_database
from lbr.core.errors import UsageError
from lbr.core.text import pluralize


@click.command()
@click.argument("run", required=False, shell_complete=completion.run_names)
@option("--forget", "BATCH", "Give a batch up: its jobs are due again, and what the provider answers is lost.")
@switch("--json", "Print one JSON object per batch.")
@with_database
def batches(db: dict[str, Any], /, run: str | None, forget: str | None, json: bool) -> None:
    """Show batches: state, size, age and next look.

    A worker takes each step when it is due; `lbr worker --until empty` takes those of now.
    """
    if forget is None:
        found = asyncio.run(api.batches(run, **db))
        for one in found if json else ():
            echo_json(one.to_dict())
        if not json:
            echo(api.describe(found))
        return
    if run is not None or json:
        raise UsageError("--forget takes the name of one batch; leave RUN and --json out")
    count = asyncio.run(api.forget_batch(forget, **db))
    log(
        f"batch {forget} is given up: {pluralize(count, 'job')} due again; if the provider has it, it is paid for twice"
    )
