"""The numbers of a queue for Prometheus: runs, tokens, cost and limits; of texts, only the names of runs and models."""

from __future__ import annotations

from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

from lbr.api.status import status_of
from lbr.core.errors import DatabaseError, Family, UsageError
from lbr.core.types import JobState
from lbr.store import counters, reads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiohttp.web import Request, Response

    from lbr.store.database import Database
    from lbr.store.reads import Overview

HOST = "127.0.0.1"
MAX_PORT = 65_535
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MEANINGS = {
    "lbr_workers": "Workers that report.",
    "lbr_run_info": "1 for each run, with its model or function, and its state.",
    "lbr_jobs": "Jobs by state; those in flight are being called.",
    "lbr_answers_total": "Calls that returned an answer, good or bad.",
    "lbr_failed_attempts_total": "Calls that failed, by the family of the failure.",
    "lbr_tokens_total": "Tokens of all calls, by direction.",
    "lbr_cost_dollars": "What all calls have cost, as far as that is known.",
    "lbr_max_cost_dollars": "What the run may cost; absent without a limit.",
    "lbr_jobs_per_second": "How fast the run's jobs finish; 0 if no worker finishes any.",
    "lbr_calls_at_a_time": "Calls at a time that the model gets, fixed or learned; absent if unlimited.",
    "lbr_cooldown_seconds": "Seconds for which no worker calls the model, because it asked to wait.",
    "lbr_outage_seconds": "Seconds since the model was reached; absent if it can be reached.",
}
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def render(view: Overview) -> str:
    """Return what the store reports in Prometheus's text format."""
    lines: dict[str, list[str]] = {name: [] for name in MEANINGS}
    for name, value, labels in _samples(view):
        if value is not None:
            given = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
            lines[name].append(f"{name}{{{given}}} {value}\n")
    kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in MEANINGS}
    heads = {name: f"# HELP {name} {meaning}\n# TYPE {name} {kinds[name]}\n" for name, meaning in MEANINGS.items()}
    return "".join(heads[name] + "".join(found) for name, found in lines.items())


def _samples(view: Overview) -> Iterator[tuple[str, float | None, dict[str, str]]]:
    status = status_of(view)
    yield "lbr_workers", len(status.workers), {}
    for run, counts in zip(status.runs, (one.counts for one in view.runs), strict=True):
        own = {"run": run.run}
        more = {"model": run.answerer, "state": run.word, "pause_cause": run.pause_cause or ""}
        yield "lbr_run_info", 1, own | more
        for state in JobState:
            yield "lbr_jobs", counts[state], own | {"state": state}
        yield "lbr_answers_total", counts[counters.ANSWERED], own
        for family in Family:
            yield "lbr_failed_attempts_total", counts[counters.TRY + family], own | {"family": family}
        yield "lbr_tokens_total", run.input_tokens, own | {"direction": "input"}
        yield "lbr_tokens_total", run.output_tokens, own | {"direction": "output"}
        yield "lbr_cost_dollars", run.cost_usd or 0, own
        yield "lbr_max_cost_dollars", run.max_cost_usd, own
        yield "lbr_jobs_per_second", run.rate or 0, own
    for limit in status.limits:
        yield "lbr_calls_at_a_time", limit["at_a_time"], {"model": limit["answerer"]}
    for cooldown in view.cooldowns:
        yield "lbr_cooldown_seconds", cooldown.seconds, {"model": cooldown.answerer}
    for outage in view.outages:
        yield "lbr_outage_seconds", outage.seconds, {"model": outage.answerer}


@asynccontextmanager
async def served(database: Database, port: int | None, notify: Callable[[str], None]) -> AsyncIterator[None]:
    """Serve the metrics of a queue while the block runs, unless the port is None; 0 takes a free one.

    Raises UsageError for a port that cannot be served.
    """
    if port is None:
        yield
        return
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"expected --metrics to be a port from 0 to {MAX_PORT}, got: {port}")
    from aiohttp import web  # noqa: PLC0415 - it takes a tenth of a second

    async def respond(request: Request) -> Response:
        if not _is_local(request.host):
            return web.Response(status=421, text="call this machine localhost, or by its address\n")
        try:
            found = render(await database.read(reads.overview))
        except DatabaseError as error:
            return web.Response(status=503, text=f"{error}\n")
        return web.Response(body=found.encode(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", respond)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise UsageError(f"cannot serve --metrics at port {port}: {error.strerror}; 0 takes a free port") from error
        notify(f"metrics are at http://{HOST}:{runner.addresses[0][1]}/metrics")
        yield
    finally:
        await runner.cleanup()


def _is_local(host: str) -> bool:
    """Return whether a request names this machine by an address, or as localhost.

    Otherwise a web page whose own name leads to this machine could read the answer.
    """
    name, _, port = host.rpartition(":")
    try:
        name = name if port.isdecimal() else host
        return name == "localhost" or bool(ip_address(name.strip("[]")))
    except ValueError:
        return False
