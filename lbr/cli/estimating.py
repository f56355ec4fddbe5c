"""`lbr estimate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
import orjson

from lbr.api.estimate import SECONDS_PER_CALL, Estimate, rounded
from lbr.api.estimate import estimate as estimate_inputs
from lbr.cli.app import echo, read_setting
from lbr.cli.enqueue import input_options, interruptible
from lbr.core.config import WorkOptions
from lbr.core.pricing import CHARACTERS_PER_TOKEN, NANOS, Price, dollars, table_problem
from lbr.core.schema import load_schema
from lbr.core.text import duration, pluralize
from lbr.io.readers import load_text


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("--model", metavar="NAME", help="Who would answer, as for enqueue.")
@input_options
@click.option(
    "--output-tokens",
    type=int,
    metavar="N",
    help="Tokens of an answer; max_tokens or an assumption if unset.",
)
@click.option("--rpm", type=float, metavar="N", help="Calls a minute that the provider allows.")
@click.option("--tpm", type=float, metavar="N", help="Tokens a minute that the provider allows.")
@click.option(
    "--concurrency", type=int, default=WorkOptions().concurrency, help="Calls at a time, of all workers."
)
@click.option("--seconds-per-call", type=float, default=SECONDS_PER_CALL, help="How long one call takes.")
@click.option("--json", is_flag=True, help="Print JSON, one object.")
def estimate(inputs: tuple[str, ...], json: bool, **flags: Any) -> None:
    """Tell what a batch would take, before anything is spent: rows, tokens, money, time.

    INPUTS are read as by enqueue. Models only are estimated. Nothing is called and nothing is written; no key and
    no database is needed.
    """
    found = asyncio.run(_estimate(inputs, flags))
    echo(orjson.dumps(found.to_dict()) if json else describe(found))


async def _estimate(inputs: tuple[str, ...], flags: dict[str, Any]) -> Estimate:
    template, schema, instructions = flags.pop("template"), flags.pop("schema"), flags.pop("instructions")
    settings = dict(read_setting(one) for one in flags.pop("set"))
    with interruptible(inputs):
        return await estimate_inputs(
            [Path(name) for name in inputs],
            instructions=None if instructions is None else load_text(instructions, "instructions"),
            template=None if template is None else load_text(template, "a template"),
            schema=None if schema is None else load_schema(schema),
            settings=settings,
            input_format=flags.pop("format"),
            **flags,
        )


def describe(found: Estimate) -> str:
    """Return what `lbr estimate` prints."""
    return "\n".join(
        (
            f"{found.model}: {pluralize(found.inputs, 'input')}, {found.prompts} distinct, {found.duplicates} duplicate",
            f"input: about {pluralize(found.input_tokens, 'token')}, estimated at {CHARACTERS_PER_TOKEN} characters a token",
            f"output: {_output_words(found)}",
            f"money: {_money_words(found)}",
            f"time: {_time_words(found)}",
        )
    )


def _output_words(found: Estimate) -> str:
    each = found.output_tokens_per_call
    match found.output_tokens_from:
        case "max_tokens":
            return f"at most {pluralize(found.output_tokens, 'token')}, max_tokens={each} an answer"
        case "given":
            return f"about {pluralize(found.output_tokens, 'token')}, {each} an answer"
    return f"about {pluralize(found.output_tokens, 'token')}, assumed to be {each} an answer: give --output-tokens or --set max_tokens=…"


def _money_words(found: Estimate) -> str:
    if found.price is None or found.cost_usd is None:
        problem = table_problem()
        why = "" if problem is None else f", for the price table cannot be loaded ({problem})"
        return f"price unknown{why}: give --price in=…,out=…"
    price = Price(found.price["in"], found.price["out"]).words()
    source = ", by the price table" if found.price_from == "table" else ""
    return f"about {dollars(rounded(found.cost_usd * NANOS))} at {price} a million tokens{source}"


def _time_words(found: Estimate) -> str:
    match found.bound_by:
        case "rpm":
            why = f"{pluralize(found.prompts, 'call')} at {found.rpm:g} a minute"
        case "tpm":
            why = f"{found.input_tokens + found.output_tokens} tokens at {found.tpm:g} a minute"
        case _:
            why = f"{pluralize(found.prompts, 'call')} of {found.seconds_per_call:g} s, {found.concurrency} at a time"
    return f"about {duration(found.seconds)}: {why}"
