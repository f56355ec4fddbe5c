"""The commands around runs: estimate, limit, move, doctor."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbr.api import doctor as doctor_api
from lbr.api import estimate as estimate_api
from lbr.api import move as move_api
from lbr.api import operate
from lbr.api.status import describe_limit, printable
from lbr.cli.app import database_option, echo, echo_json, log
from lbr.cli.enqueue import input_arguments, input_options, interruptible
from lbr.core.config import WorkOptions, a_minute, at_least_one
from lbr.core.errors import StoppedError, UsageError
from lbr.core.pricing import CHARACTERS_PER_TOKEN, NANOS, Price, dollars, table_problem
from lbr.core.text import duration, pluralize

if TYPE_CHECKING:
    from lbr.api.doctor import Finding
    from lbr.api.estimate import Estimate

EXIT_PROBLEM = 5


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("--model", metavar="NAME", help="The model, as for `lbr enqueue`.")
@input_options
@click.option(
    "--output-tokens",
    type=int,
    metavar="N",
    help="Tokens per answer; by default max_tokens, or an assumption.",
)
@click.option("--rpm", type=float, metavar="N", help="Requests per minute that the provider allows.")
@click.option("--tpm", type=float, metavar="N", help="Tokens per minute that the provider allows.")
@click.option(
    "--concurrency",
    type=int,
    default=WorkOptions().concurrency,
    help="Calls at a time, all workers together.",
)
@click.option(
    "--seconds-per-call",
    type=float,
    default=estimate_api.SECONDS_PER_CALL,
    help="Seconds that one call takes.",
)
@click.option("--json", is_flag=True, help="Print one JSON object.")
def estimate(inputs: tuple[str, ...], json: bool, **flags: Any) -> None:
    """Estimate a batch before you spend anything: rows, tokens, cost, time.

    INPUTS are read as by `lbr enqueue`. Only models are estimated, not functions. Nothing is called or written; you
    need neither a key nor a database.
    """

    async def reading() -> Estimate:
        with interruptible(inputs):
            return await estimate_api.estimate(list(map(Path, inputs)), **input_arguments(flags))

    found = asyncio.run(reading())
    echo_json(found.to_dict()) if json else echo(_describe_estimate(found))


def _describe_estimate(found: Estimate) -> str:
    inputs, tokens = pluralize(found.inputs, "input"), pluralize(found.input_tokens, "token")
    return "\n".join(
        (
            f"{found.model}: {inputs}, {found.prompts} distinct, {found.duplicates} duplicate",
            f"input: about {tokens}, estimated at {CHARACTERS_PER_TOKEN} characters per token",
            f"output: {_output_words(found)}",
            f"cost: {_cost_words(found)}",
            f"time: {_time_words(found)}",
        )
    )


def _output_words(found: Estimate) -> str:
    tokens, each = pluralize(found.output_tokens, "token"), found.output_tokens_per_call
    match found.output_tokens_from:
        case "max_tokens":
            return f"at most {tokens}, max_tokens={each} per answer"
        case "given":
            return f"about {tokens}, {each} per answer"
    return f"about {tokens}, assumed to be {each} per answer: set --output-tokens or --set max_tokens=…"


def _cost_words(found: Estimate) -> str:
    if found.price is None or found.cost_usd is None:
        problem = table_problem()
        why = "" if problem is None else f", because the price table cannot be loaded ({problem})"
        return f"price unknown{why}: set --price in=…,out=…"
    price = Price(found.price["in"], found.price["out"]).words()
    source = ", by the price table" if found.price_from == "table" else ""
    cost = dollars(estimate_api.rounded(found.cost_usd * NANOS))
    return f"about {cost} at {price} per million tokens{source}"


def _time_words(found: Estimate) -> str:
    calls = pluralize(found.prompts, "call")
    match found.bound_by:
        case "rpm":
            why = f"{calls} at {found.rpm:g} per minute"
        case "tpm":
            why = f"{found.input_tokens + found.output_tokens} tokens at {found.tpm:g} per minute"
        case _:
            why = f"{calls} of {found.seconds_per_call:g} s, {found.concurrency} at a time"
    return f"about {duration(found.seconds)}: {why}"


def _limit_value(name: str, text: str | None, unset: str) -> dict[str, int | None]:
    """Read a flag of `lbr limit`: a number, or the word that removes the limit; nothing if it was not given."""
    if text is None:
        return {}
    if text == unset:
        return {name: None}
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"expected --{name} to be a whole number or '{unset}', got: {text[:50]!r}") from None
    return {name: at_least_one(name, value) if name == "concurrency" else a_minute(name, value)}


@click.command()
@click.argument("scope", required=False)
@click.option("--rpm", metavar="N|none", help="Requests per minute, all workers together.")
@click.option("--tpm", metavar="N|none", help="Tokens per minute, all workers together, input and output.")
@click.option("--concurrency", metavar="N|auto", help="Calls at a time, all workers together; auto learns it.")
@click.option("--json", is_flag=True, help="Print one JSON object per model.")
@database_option
@click.pass_obj
def limit(db: dict[str, Any], /, scope: str | None, json: bool, **flags: str | None) -> None:
    """Show or change a model's rate limits. Running workers pick up changes immediately.

    SCOPE is a model or function as `lbr status` names it, for example openai-chat:gpt-4o-mini; all its runs share the
    limits, in every worker of the queue. Without a SCOPE, the limits of all models are shown.
    """
    unset = {"rpm": "none", "tpm": "none", "concurrency": "auto"}
    values: dict[str, int | None] = {}
    for name, word in unset.items():
        values |= _limit_value(name, flags[name], word)
    if values and scope is None:
        raise UsageError("name the SCOPE to limit; `lbr status` shows the names")
    found = asyncio.run(operate.limit(scope, values, **db))
    for one in found:
        echo_json(one) if json else echo(describe_limit(one))
        if values and not one["runs"]:
            log(f"lbr: no run of this queue uses {one['answerer']}; the limit is kept for later runs")
    if not found and not json:
        echo("no limits are set or learned")


@click.command()
@click.argument("from_url", metavar="FROM_URL")
@click.argument("to_url", metavar="TO_URL")
@click.argument("run")
@click.option("--restart", is_flag=True, help="Copy everything again, instead of continuing an interrupted copy.")
@click.option("--json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def move(db: dict[str, Any], /, from_url: str, to_url: str, run: str, restart: bool, json: bool) -> None:
    """Copy a run with its answers into another database, to continue there.

    The run must be paused, finished or cancelled, and no worker may hold a job of it. Everything is copied and
    compared; a paused copy stays in the old database. If the command is interrupted, run it again.
    """
    moving = move_api.move(
        run,
        db_url=from_url,
        to_url=to_url,
        restart=restart,
        allow_network_fs=db["allow_network_fs"],
        notify=lambda line: log(f"lbr: {line}"),
    )
    try:
        moved = asyncio.run(moving)
    except KeyboardInterrupt as error:
        raise StoppedError("the move has not finished; run the same command again to continue") from error
    if json:
        echo_json(moved.to_dict())
        return
    counts = ", ".join(pluralize(getattr(moved, f"{one}s"), one) for one in ("input", "job", "answer"))
    done = "was moved before to" if moved.known else "moved to"
    echo(f"run {moved.run}: {counts} {done} {moved.target}")
    if not moved.known:
        echo(f"hash {moved.hash}: the same in both")
        log(
            f"lbr: continue with --db or LBR_DB for {moved.target}: `lbr resume {moved.run}` if the run was paused, "
            f"then `lbr worker`. Do not resume the paused copy here, or you pay twice for what is left"
        )


@click.command()
@click.option("--fix", is_flag=True, help="Fix counters that differ from a recount; nothing else is changed.")
@click.option("--json", is_flag=True, help="Print one JSON object per finding.")
@database_option
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, db: dict[str, Any], /, fix: bool, json: bool) -> None:
    """Check the database, and print what is wrong and what to do; workers can continue.

    Checks the file or server, its settings, damage, leases, counters, keys, paused runs and kept answers. Nothing is
    changed without --fix. Exits with 5 if there is a warning or an error.
    """
    found = asyncio.run(doctor_api.doctor(fix=fix, **db))
    for one in found:
        echo_json(one.to_dict()) if json else echo(_describe_finding(one))
    if not json:
        counts = Counter(one.gravity for one in found if one.gravity != "ok")
        log(f"lbr: {', '.join(pluralize(n, gravity) for gravity, n in counts.items()) or 'no problem found'}")
    context.exit(EXIT_PROBLEM if any(one.is_grave for one in found) else 0)


def _describe_finding(finding: Finding) -> str:
    lines = [f"{finding.gravity:<7}  {finding.check}: {finding.found}"]
    if finding.do is not None:
        lines.append(f"{'':<9}{finding.do}")
    return "\n".join(map(printable, lines))
