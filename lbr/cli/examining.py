"""`lbr doctor`."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import click
import orjson

from lbr.api import doctor as api
from lbr.api.diagnosis import Gravity
from lbr.api.status import printable
from lbr.cli.app import database_option, say, tell

if TYPE_CHECKING:
    from lbr.api.diagnosis import Finding

EXIT_GRAVE = 5


@click.command()
@click.option(
    "--fix", is_flag=True, help="Mend counters that a recount contradicts; nothing else is changed."
)
@click.option("--json", is_flag=True, help="Print JSON, one object for each finding.")
@database_option
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, db: dict[str, Any], /, fix: bool, json: bool) -> None:
    """Look at the database from all sides, and tell what is wrong and what to do; workers need not be stopped.

    The file or the server, its settings, damage, leases, clock, counters, limits, keys, paused runs. Nothing is
    changed without --fix. Ends with 5 where there is a warning or an error.
    """
    found = asyncio.run(api.doctor(fix=fix, **db))
    for one in found:
        tell(orjson.dumps(one.to_dict()) if json else _describe(one))
    counts = Counter(one.gravity for one in found)
    shown = [f"{counts[g]} {g}{'s' * (counts[g] > 1)}" for g in Gravity if g is not Gravity.OK and counts[g]]
    if not json:
        say(f"lbr: {', '.join(shown) or 'all is well'}")
    context.exit(EXIT_GRAVE if any(one.is_grave for one in found) else 0)


def _describe(finding: Finding) -> str:
    lines = [f"{finding.gravity:<7}  {finding.check}: {finding.found}"]
    if finding.do is not None:
        lines.append(f"{'':<9}{finding.do}")
    return "\n".join(map(printable, lines))
