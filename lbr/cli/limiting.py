"""`lbr limit`: what all workers share about an answerer, to be seen and set while they run."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import orjson

from lbr.api import operate
from lbr.api.status import describe_limit
from lbr.cli.app import database_option, echo, log
from lbr.core.config import a_minute, at_least_one
from lbr.core.errors import UsageError


def _number(name: str, text: str | None, lifted: str) -> dict[str, int | None]:
    """Read a flag: a number, or the word that lifts what is set; nothing where it was not given."""
    if text is None:
        return {}
    if text == lifted:
        return {name: None}
    try:
        value = int(text)
    except ValueError:
        raise UsageError(
            f"expected --{name} to be a whole number or '{lifted}', got: {text[:50]!r}"
        ) from None
    return {name: at_least_one(name, value) if name == "concurrency" else a_minute(name, value)}


@click.command()
@click.argument("scope", required=False)
@click.option("--rpm", metavar="N|none", help="Requests a minute of all workers together.")
@click.option("--tpm", metavar="N|none", help="Tokens a minute of all workers together, in and out.")
@click.option(
    "--concurrency", metavar="N|auto", help="Calls at a time of all workers together; auto learns it."
)
@click.option("--json", is_flag=True, help="Print JSON, one object for each scope.")
@database_option
@click.pass_obj
def limit(
    db: dict[str, Any],
    /,
    scope: str | None,
    rpm: str | None,
    tpm: str | None,
    concurrency: str | None,
    json: bool,
) -> None:
    """Set what workers keep to for a SCOPE, or tell it; it holds at once, without a restart.

    A scope is a model or function as `lbr status` names it, openai-chat:gpt-4o-mini say: all runs that it
    answers share it, in every worker of the queue. Without a scope, all of them are told.
    """
    values = (
        _number("rpm", rpm, "none")
        | _number("tpm", tpm, "none")
        | _number("concurrency", concurrency, "auto")
    )
    if values and scope is None:
        raise UsageError("expected a SCOPE to set limits of, got: none; `lbr status` names them")
    found = asyncio.run(operate.limit(scope, values, **db))
    for one in found:
        echo(orjson.dumps(one) if json else describe_limit(one))
        if values and not one["runs"]:
            log(f"no run of this queue is answered by {one['answerer']}: that holds for those to come")
    if not found and not json:
        echo("no limits are set, and none were learned")
