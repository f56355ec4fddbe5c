"""`lbr failures` and `lbr show`: why jobs failed, and everything about one of them."""

from __future__ import annotations

import asyncio
import json as json_format
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import orjson

from lbr.api import failures as api
from lbr.api import operate
from lbr.api.status import printable
from lbr.cli.app import echo, echo_json, log, option, run_argument, switch, with_database
from lbr.core.messages import texts_in
from lbr.core.pricing import dollars
from lbr.core.text import parse_json, pluralize

if TYPE_CHECKING:
    from lbr.core.types import Prompt
    from lbr.store.reads import Attempt, JobDetail


@click.command()
@run_argument
@switch("--rows", "Show each failed job, in input order.")
@switch("--json", "Print one JSON object per group, or per job.")
@with_database
def failures(db: dict[str, Any], /, run: str, rows: bool, json: bool) -> None:
    """Show why jobs failed: groups, counts, examples.

    A group has failed jobs with the same kind of error, whose messages begin alike. The largest comes first.
    """
    if rows:
        asyncio.run(_print_failed(db, run, json))
        return
    groups = asyncio.run(api.failures(run, **db))
    if json:
        for one in groups:
            echo_json(one.to_dict())
        return
    echo(api.describe(run, groups))
    if groups:
        some = f"; add --where family={groups[0].family} for one family" * (len({one.family for one in groups}) > 1)
        log(f"`lbr retry {run}` puts these jobs back{some}")


async def _print_failed(db: dict[str, Any], run: str, json: bool) -> None:
    async for one in api.failed_jobs(run, **db):
        echo_json(one._asdict()) if json else echo(api.describe_job(one))


@click.command()
@run_argument
@click.argument("idx", type=click.IntRange(0, 2**63 - 1), required=False)
@option("--id", "ID", "The input's id, instead of IDX.")
@option("--sample", "N", "Which of its answers, counted from 0, if it has several.", type=int, default=0)
@switch("--json", "Print one JSON object.")
@with_database
def show(db: dict[str, Any], /, run: str, idx: int | None, id: str | None, sample: int, json: bool) -> None:  # noqa: A002
    """Show one input: its prompt, answer and attempts.

    IDX counts from 0. Attempts are those that failed, came too late or were redone.
    """
    detail = asyncio.run(operate.show(run, idx, custom_id=id, sample=sample, **db))
    fields = asdict(detail)
    del fields["row"]
    echo_json(detail.row.to_dict() | fields) if json else echo("\n".join(_describe_job(run, detail)))


def _describe_job(run: str, detail: JobDetail) -> list[str]:
    row = detail.row
    own_id = "" if row.custom_id is None else f", id {row.custom_id}"
    sample = "" if row.sample is None else f", sample {row.sample}"
    counts = [f"attempts charged {detail.attempts}", f"claims {detail.claim_seq}"]
    counts += [f"crashes {detail.crashes}"] * bool(detail.crashes)
    lines = [f"run {run}, input {row.idx}{own_id}{sample}: {row.status}", f"key {row.key}", ", ".join(counts)]
    if detail.settings:
        lines.append("its own: " + ", ".join(f"{name}={value}" for name, value in detail.settings.items()))
    lines = [*map(printable, lines), "", "prompt", *_prompt_lines(row.prompt)]
    if row.result is not None:
        called = f"{detail.model or 'function'}, {detail.latency_ms} ms"
        facts = ["reused from another run" if detail.reused else called, *_facts(detail)]
        lines += ["", printable(f"answer: {', '.join(facts)}"), *_indented(_readable(row.result))]
    for kind, one in (row.kept or {}).items():
        if one:
            lines += ["", kind, *_indented(one if isinstance(one, str) else orjson.dumps(one).decode())]
    for one in detail.tries:
        lines += ["", *_attempt_lines(one)]
    return lines


def _prompt_lines(prompt: Prompt) -> list[str]:
    lines = _indented(prompt.text or "") if prompt.messages is None else []
    for message in prompt.messages or ():
        content = message.get("content")
        rest = {name: value for name, value in message.items() if name not in {"role", "content"} and value}
        others = len(content) - len(texts_in(content)) if isinstance(content, list) else 0
        lines += [f"  {printable(str(message.get('role')))}", *_indented("\n".join(texts_in(content)), 4)]
        lines += [f"    [{pluralize(others, 'part')} without text]"] * bool(others)
        lines += _indented(orjson.dumps(rest).decode(), 4) if rest else []
    return lines + ([f"  settings {orjson.dumps(prompt.settings).decode()}"] if prompt.settings else [])


def _readable(text: str) -> str:
    """Return an answer; the fields of a JSON object are on lines of their own."""
    with suppress(ValueError, RecursionError):
        if isinstance(value := parse_json(text), dict | list):
            return json_format.dumps(value, ensure_ascii=False, indent=2)
    return text


def _indented(text: str, by: int = 2) -> list[str]:
    return [f"{'':<{by}}{line}" for line in text.split("\n")]


def _attempt_lines(one: Attempt) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at / 1000))
    # Nothing is known of a call that died with its worker.
    facts = _facts(one, estimated=one.what == "crashed")
    head = printable(", ".join([f"attempt of claim {one.claim_seq}, {when}: {one.what}", *facts]))
    error = _indented(f"{one.family or '-'} {one.error}: {one.message}")
    return [head, *error, *(["  raw answer", *_indented(one.text, 4)] if one.text else [])]


def _facts(of: JobDetail | Attempt, *, estimated: bool = False) -> list[str]:
    """Return the finish reason, the tokens and the cost of an answer or an attempt, as far as they are known."""
    facts = [] if of.finish_reason in {None, "stop"} else [f"finish reason {of.finish_reason}"]
    counts = ((of.input_tokens, "in"), (of.cached_tokens, "cached"), (of.output_tokens, "out"))
    tokens = ", ".join(f"{count} {way}" for count, way in counts if count is not None)
    facts += [f"tokens {tokens}"] if tokens else []
    if of.cost_nanos is not None:
        facts.append(f"cost {'about ' * estimated}{dollars(of.cost_nanos)}{', estimated' * estimated}")
    return facts
