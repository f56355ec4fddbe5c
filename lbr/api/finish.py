"""What happens when a run ends: the user's command runs, and the user's server gets a message."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import orjson
import stamina

from lbr.api.status import printable, run_status
from lbr.api.summary import Ending
from lbr.core.errors import CallError, DatabaseError, Permanent, UsageError
from lbr.models.http import Connections
from lbr.store import endings, reads
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from lbr.api.status import RunStatus
    from lbr.core.types import Json, PathOrUrl, RunId
    from lbr.store.database import Database

LOOK_SECONDS = 1.0
COMMAND_SECONDS = 600.0
"""A command that runs for longer is ended, because a worker waits for it."""
OUTPUT_BYTES = 4_000
POST_SECONDS = 20.0
POST_TRIES = 4
FIRST_WAIT_SECONDS = 1.0
TRY_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
VARIABLES = "run state pause_cause pause_message jobs done failed cancelled input_tokens output_tokens cost_usd file"


@dataclass(frozen=True, slots=True)
class Hooks:
    """What to do when a run ends. Raises UsageError for what cannot be done.

    `command` is a line for /bin/sh, `url` gets a POST of JSON. `db_url` is the queue, which the command finds in its
    environment, and `notify` is called with each message for the user.
    """

    command: str | None
    url: str | None
    db_url: PathOrUrl
    notify: Callable[[str], None]

    def __post_init__(self) -> None:
        if self.command is not None and (not self.command.strip() or "\0" in self.command):
            raise UsageError("expected --on-finish to be a command line, got: an empty one")
        if self.url is not None and not _is_url(self.url):
            what = "an http:// or https:// URL with a host and no password before it"
            raise UsageError(f"expected --notify to be {what}, got: one that is not shown, because it may hold a token")

    async def report(self, ended: RunStatus, file: str | None = None) -> None:
        """Do it for a run; failures are only reported. `file` has the answers, None if none was written."""
        report = ended.to_dict() | {"state": ended.word, "file": file, "text": Ending(ended).all_in_one()}
        await asyncio.gather(self._run(report), self._post(report))

    async def _run(self, report: dict[str, Json]) -> None:
        if self.command is None:
            return
        values = {f"LBR_{name.upper()}": report[name] for name in VARIABLES.split()}
        texts = {name: "" if value is None else printable(str(value)) for name, value in values.items()}
        try:
            # Not a pipe: what the command leaves in the background would keep it open.
            with tempfile.TemporaryFile() as output:
                problem = await _run_command(self.command, texts | {"LBR_DB": os.fspath(self.db_url)}, output)
                output.seek(0)
                for line in output.read(OUTPUT_BYTES).decode(errors="replace").splitlines():
                    self.notify(f"--on-finish: {printable(line)}")
        except OSError as error:
            problem = f"cannot be started: {error.strerror}"
        if problem is not None:
            self.notify(f"run {report['run']}: the command of --on-finish {problem}")

    async def _post(self, report: dict[str, Json]) -> None:
        if self.url is None:
            return
        try:
            async for attempt in stamina.retry_context(
                on=_may_pass, attempts=POST_TRIES, timeout=None, wait_initial=FIRST_WAIT_SECONDS, wait_max=30
            ):
                with attempt:
                    await _post(self.url, orjson.dumps(report))
        except CallError as error:
            self.notify(printable(f"run {report['run']}: --notify failed: {error}"))


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and "@" not in parts.netloc and url.isascii() and url.isprintable() and " " not in url


async def _run_command(command: str, variables: dict[str, str], output: IO[bytes]) -> str | None:
    """Run a command line to its end; return what went wrong, None for nothing. Raises OSError if it cannot start."""
    process = await asyncio.create_subprocess_shell(
        command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | variables
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            code = await process.wait()
    except TimeoutError:
        return f"was ended, because it took more than {COMMAND_SECONDS:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else None


def _may_pass(error: Exception) -> bool:
    return isinstance(error, CallError) and not isinstance(error, Permanent)


async def _post(url: str, data: bytes) -> None:
    """Send JSON. Raises CallError, Permanent if another try cannot help; of the URL, messages show the host alone."""
    from aiohttp import ClientTimeout  # noqa: PLC0415 - it takes a tenth of a second

    connections, place = Connections(), urlsplit(url).netloc
    waits = ClientTimeout(total=None, connect=POST_SECONDS, sock_read=POST_SECONDS)
    try:
        async with asyncio.timeout(2 * POST_SECONDS):
            sent = (("Content-Type", "application/json"), ("User-Agent", "lbr"))
            head, _ = await connections.fetch("POST", url, timeout=waits, headers=sent, data=data)
    except TimeoutError as error:
        raise CallError(f"{place} did not answer in time") from error
    finally:
        await connections.aclose()
    if head.code >= 300:
        raise (CallError if head.code in TRY_AGAIN else Permanent)(f"{place} answered with status {head.code}")


@asynccontextmanager
async def reported(database: Database, served: Collection[RunId], hooks: Hooks) -> AsyncIterator[None]:
    """Report the ends of runs while the block, a worker, runs, and those that it leaves. `served` may grow."""
    if hooks.command is None and hooks.url is None:
        yield
        return
    over = asyncio.Event()
    watching = asyncio.create_task(_watch(database, served, hooks, over))
    try:
        yield
    except asyncio.CancelledError:
        watching.cancel()
        raise
    finally:
        over.set()
        await asyncio.gather(watching, return_exceptions=watching.cancelling() > 0)


async def _watch(database: Database, served: Collection[RunId], hooks: Hooks, over: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as reports:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await over.wait()
            is_last = over.is_set()
            try:
                for one in await _take_ended(database, list(served)):
                    reports.create_task(hooks.report(one))
            except DatabaseError as error:
                if is_last:  # else the worker reports it
                    hooks.notify(f"cannot look which runs have ended, for --on-finish and --notify: {error}")


async def _take_ended(database: Database, run_ids: list[RunId]) -> list[RunStatus]:
    if not (found := await database.quick_read(endings.unreported, run_ids)):
        return []
    now, taken = await database.write(endings.take, found)
    return [run_status(one, now) for one in taken]


async def report_end(run: str, hooks: Hooks, *, file: str | None, allow_network_fs: bool = False) -> None:
    """Report the end of a run, unless it was reported; `file` has its answers, None if none was written."""
    if hooks.command is None and hooks.url is None:
        return
    async with opened(hooks.db_url, allow_network_fs=allow_network_fs) as database:
        found = await database.read(reads.find_run, run)
        for one in await _take_ended(database, [found.id]):
            await hooks.report(one, file)
