"""What the pages of the dashboard show, as JSON values. Texts are as they are stored: pages show them as text only."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lbr.api.doctor import examine
from lbr.api.failures import kind_of
from lbr.api.status import limit_fields, run_status, status_of
from lbr.api.view import reason_of
from lbr.core.errors import UsageError
from lbr.core.messages import texts_in
from lbr.core.pricing import NANOS
from lbr.core.pulses import MINUTE_MS, Pulse, percentile
from lbr.core.types import JobState, Millis, Prompt
from lbr.store import counters, pages, pulses, reads
from lbr.store.pages import Filter, Place
from lbr.store.redo import read_conditions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lbr.api.status import RunStatus, Status
    from lbr.core.batches import BatchRow
    from lbr.core.types import Json, PathOrUrl, Run
    from lbr.store.database import Database
    from lbr.store.reads import Attempt, Overview, RunCounts

MAX_MINUTES = 48 * 60
"""Older pulses are folded into hours."""
SILENT_SECONDS = (15, 3600)
"""A worker is silent if it has not reported for so long, and forgotten after an hour."""
EMPTY: dict[str, Json] = {"attention": [], "runs": []}
_COMMAND = re.compile("`([^`]+)`")


async def runs(database: Database, now: float) -> dict[str, Json]:
    """Return all runs, the newest first, and what needs attention; `now` is the time of day in seconds."""
    view = await database.read(reads.overview)
    status = status_of(view)
    sparks = await database.read(pages.sparks, [one.run.id for one in view.runs])
    found = [
        _run(status, one, counted, now) | {"spark": sparks[counted.run.id]}
        for one, counted in zip(status.runs, view.runs, strict=True)
    ]
    return {"attention": _attention(view, status, now), "runs": found[::-1]}


def _run(status: Status, one: RunStatus, counted: RunCounts, now: float) -> dict[str, Json]:
    parked = counted.counts[counters.PARKED]
    counts = {state.value: counted.of(state) for state in JobState}
    return {
        "name": one.run,
        "model": one.answerer,
        "state": one.word,
        "reason": reason_of(status, one, now),
        "counts": counts | {"pending": one.pending - parked, "at_provider": parked},
        "inputs": one.inputs,
        "per_minute": one.per_minute,
        "eta_seconds": one.eta_seconds,
        "cost_usd": one.cost_usd,
        "budget_usd": one.max_cost_usd,
    }


def _attention(view: Overview, status: Status, now: float) -> list[dict[str, Json]]:
    away = {one["answerer"] for one in (*status.outages, *status.cooldowns)}
    found = []
    for run in status.runs:
        reason = reason_of(status, run, now)
        if reason is not None and (run.pause is not None or run.answerer in away or not status.workers):
            command = _COMMAND.search(reason)
            found.append({"text": f"{run.run}: {reason}", "command": command[1] if command else None})
    for worker in view.workers:
        if SILENT_SECONDS[0] < worker.seen_seconds_ago < SILENT_SECONDS[1]:
            text = f"worker {worker.host} {worker.pid} has not reported for {worker.seen_seconds_ago:.0f} s"
            found.append({"text": f"{text}; others take its jobs over when its leases end", "command": None})
    return found


async def run(database: Database, name: str, now: float) -> dict[str, Json]:
    """Return one run with its task, and why its jobs failed. Raises RunNotFoundError."""
    view = await database.read(reads.overview, name)
    (one,) = view.runs
    status, found = status_of(view), await database.read(pages.failures, one.run)
    (numbers,), task = status.runs, one.run.task
    return _run(status, numbers, one, now) | {
        "spark": (await database.read(pages.sparks, [one.run.id]))[one.run.id],
        "task": {
            "model": task.answerer,
            "settings": task.settings,
            "instructions": task.instructions,
            "template": task.template,
            "schema": task.schema,
        },
        "errors": _errors(found),
        "errors_are_partial": numbers.failed > len(found),
        "tokens": {"input": numbers.input_tokens, "output": numbers.output_tokens},
        "created_at": one.run.created_at,
    }


def _errors(rows: Sequence[Any]) -> list[dict[str, Json]]:
    groups: dict[tuple[str, str, str], dict[str, Json]] = {}
    for row in rows:
        family, error, message = row.family or "", row.error or "", row.message or ""
        one = {"family": family, "error": error, "message": message, "count": 0, "example": row.id}
        groups.setdefault(kind_of(family, error, message), one)["count"] += 1
    return sorted(groups.values(), key=lambda one: -int(one["count"]))


async def series(database: Database, name: str, minutes: int) -> dict[str, Json]:
    """Return what a run did in each of the latest minutes, in columns; `t` are seconds of the epoch."""
    minutes = max(1, min(MAX_MINUTES, minutes))
    view = await database.read(reads.overview, name)
    (one,) = view.runs
    last = view.now // MINUTE_MS
    first = last - minutes + 1
    found = await database.read(pulses.series, one.run.id, Millis(first * MINUTE_MS))
    by_minute = {pulse.minute: pulse for pulse in found if pulse.minute >= first}
    none = Pulse(one.run.id, 0, Millis(0), Millis(0))
    each = [by_minute.get(minute, none) for minute in range(first, last + 1)]
    status, spent = run_status(one, view.now), sum(pulse.cost_nanos for pulse in each)
    before = max(0, round((status.cost_usd or 0) * NANOS) - spent)
    limits = [limit for limit in view.limits if limit.answerer == one.run.task.answerer]
    return {
        "t": [minute * 60 for minute in range(first, last + 1)],
        **{kind: [getattr(pulse, kind) for pulse in each] for kind in ("done", "failed", "retried", "limited")},
        "p50": [percentile(pulse.histogram, 0.5) for pulse in each],
        "p95": [percentile(pulse.histogram, 0.95) for pulse in each],
        "slowest": [pulse.slowest_ms or None for pulse in each],
        "cost": [(before + cost) / NANOS for cost in accumulate(pulse.cost_nanos for pulse in each)],
        "tokens": [pulse.input_tokens + pulse.output_tokens for pulse in each],
        "slots": [pulse.slots for pulse in each],
        "tpm": limits[0].limit.tpm if limits else None,
        "budget_usd": status.max_cost_usd,
    }


def conditions_in(given: Mapping[str, str]) -> list[str]:
    """Return the conditions of a filter as `lbr retry --where` takes them."""
    forms = (("state", "status="), ("family", "family="), ("error", "error~"), ("finish_reason", "finish_reason="))
    return [f"{form}{given[name]}" for name, form in forms if given.get(name)]


async def jobs(database: Database, name: str, given: Mapping[str, str]) -> dict[str, Json]:
    """Return the next jobs of a run that match a filter, and where to go on. Raises UsageError for a wrong filter."""
    state = given.get("state", "")
    if state not in {"", *JobState}:
        raise UsageError(f"expected a state, got: {state!r}; there are: {', '.join(JobState)}")
    conditions = read_conditions(conditions_in({**given, "state": ""})) if conditions_in({**given, "state": ""}) else []
    found = await database.read(reads.find_run, name)
    page = await database.read(
        pages.page, found, Filter(state, conditions, given.get("text", "")), _place(given.get("after", ""))
    )
    following = page.next
    return {
        "jobs": [_job(row, page.places.get(row.id)) for row in page.rows],
        "next": None if following is None else f"{following.job}.{following.available}",
        "scanned_to": page.looked_to,
        "more": following is not None,
    }


def _place(text: str) -> Place:
    if not text:
        return Place()
    job, _, available = text.partition(".")
    if not (job.isdecimal() and available.isdecimal() and len(text) < 40):
        raise UsageError(f"expected `after` to be the `next` of a page, got: {text[:40]!r}")
    return Place(int(job), int(available))


def _job(row: Any, place: tuple[int, int] | None) -> dict[str, Json]:
    is_done = row.state == JobState.DONE
    error = None if is_done or row.error is None else f"{row.error}: {row.message or ''}"
    return {
        "id": row.id,
        "idx": None if place is None else place[0],
        "sample": None if place is None else place[1],
        "state": row.state,
        "prompt": _short_prompt(row.body or "", row.chat),
        "answer": row.answer if is_done else None,
        "error": error,
        **_used(row),
    }


def _short_prompt(body: str, chat: int) -> str:
    if chat:
        with suppress(Exception):  # it is cut, or another program's
            messages = Prompt.from_body(body, chat=True).messages or ()
            return "\n".join(texts_in(messages[-1].get("content")))[: pages.CUT]
    return body[: pages.CUT]


def _used(row: Any) -> dict[str, Json]:
    tokens = [count for count in (row.input_tokens, row.output_tokens) if count is not None]
    return {
        "tokens": sum(tokens) if tokens else None,
        "cost_usd": None if row.cost_nanos is None else row.cost_nanos / NANOS,
        "latency_ms": row.latency_ms,
    }


async def job(database: Database, job_id: int) -> dict[str, Json]:
    """Return everything about one job. Raises UsageError if there is none."""
    found = await database.read(pages.job, job_id)
    detail, row = found.detail, found.detail.row
    return {
        "id": job_id,
        "run": found.run.name,
        "idx": row.idx,
        "sample": row.sample,
        "custom_id": row.custom_id,
        "state": row.status,
        "model": detail.model,
        "finish_reason": detail.finish_reason,
        "error": row.error,
        "turns": _turns(found.run, row.prompt),
        "answer": row.result,
        "raw": (row.kept or {}).get("raw"),
        "attempts": [_attempt(one) for one in detail.tries],
        "previous": found.previous,
        "next": found.next,
        **_used(detail),
    }


def _turns(run: Run, prompt: Prompt) -> list[dict[str, Json]]:
    turns: list[dict[str, Json]] = []
    if run.task.instructions:
        turns.append({"role": "system", "content": run.task.instructions})
    if prompt.messages is None:
        return [*turns, {"role": "user", "content": prompt.text or ""}]
    return turns + [
        {"role": str(one.get("role")), "content": "\n".join(texts_in(one.get("content")))} for one in prompt.messages
    ]


def _attempt(one: Attempt) -> dict[str, Json]:
    fields = {name: getattr(one, name) for name in ("at", "what", "family", "error", "message", "text")}
    return fields | _used(one)


async def workers(database: Database) -> dict[str, Json]:
    """Return the workers that report, and the limits of models with the command that changes them."""
    view = await database.read(reads.overview)
    held = await database.read(pages.held)
    return {
        "workers": [
            one._asdict() | {"inflight": held.get((one.host, one.pid), 0), "per_minute": one.rate * 60}
            for one in view.workers
            if one.is_live
        ],
        "limits": [limit_fields(one) | {"command": f"lbr limit {one.answerer} --rpm N"} for one in view.limits],
    }


async def batches(database: Database) -> dict[str, Json]:
    """Return the newest batches, with what the provider and lbr say of them."""
    found = await database.read(pages.batches)
    return {"batches": [_batch(row, name) for row, name in found]}


def _batch(row: BatchRow, run: str) -> dict[str, Json]:
    at_provider = row.found
    notes = [row.error] if at_provider is None else [row.error, at_provider.error, at_provider.message]
    return {
        "id": row.nonce,
        "run": run,
        "provider_id": None if at_provider is None else at_provider.provider_id,
        "state": row.state,
        "jobs": row.count,
        "completed": None if at_provider is None else at_provider.completed,
        "created_at": row.created_at,
        "sent_at": row.sent_at,
        "ended_at": row.ended_at,
        "message": "; ".join(dict.fromkeys(note for note in notes if note)) or None,
    }


async def doctor(db_url: PathOrUrl, *, allow_network_fs: bool) -> dict[str, Json]:
    """Return what `lbr doctor` finds without reading all of the queue."""
    found = await examine(db_url, quick=True, allow_network_fs=allow_network_fs)
    return {"findings": [one.to_dict() for one in found]}
