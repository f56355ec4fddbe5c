"""The batch lane of a worker: one step of one batch at a time, beside the loop that calls.

Each step is a short transaction or one call to the provider, and the next worker continues wherever this one dies. Only
the creation of a batch may not be repeated: its intent is recorded first, and a lost reply makes the batch unsure.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lbr.core.batches import (
    MAX_BATCHES,
    MAX_REQUESTS,
    TOKEN_LIMIT,
    BatchError,
    BatchState,
    Lane,
    Refused,
    WrongKey,
    custom_id,
    read_custom_id,
)
from lbr.core.errors import CallError, DatabaseError, Family, LbrError
from lbr.core.retry import MESSAGE_LIMIT, decide, storable
from lbr.core.text import pluralize
from lbr.core.types import Claim, JobState, Millis, PauseCause, Paused, Prompt, RunState
from lbr.store import batches, reads
from lbr.store.batches import LostBatchError, PlanRequest
from lbr.worker.attempt import checked, priced, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from random import Random

    from lbr.core.batches import BatchProvider, BatchRow, Found
    from lbr.core.retry import RetryPolicy
    from lbr.core.schema import Validator
    from lbr.core.types import JobId, Outcome, Run, RunId, Settlement, WorkerId
    from lbr.store.database import Database
    from lbr.worker.calls import WorkReport
    from lbr.worker.runs import ServableRuns

POLL_SECONDS = 1.0
"""How often the database is asked for steps that are due."""
FIRST_POLL_MS, MAX_POLL_MS = 30_000, 600_000
RETRY_MS = 60_000
"""How long to wait after a failed call to the provider."""
LEASE = 60.0
"""Seconds that a step holds a batch without renewal; much less than what counts as the time of a wrong clock."""
MAX_DELAY = 15.0
"""If so many seconds have passed since the intent, the machine has slept, and the batch may be another worker's."""
SINCE_MS = 24 * 3600 * 1000
"""How much earlier than its intent an unsure batch is looked for: clocks differ."""
LINES = 500
"""Lines of the results in one transaction."""
LINES_BYTES = 8_000_000
_HARMLESS = frozenset({None, "expired", "cancelled"})
"""How a batch ends whose requests were not wrong: what has no answer goes online."""


class Batches:
    """Takes steps until `stop`. `idle` is set while nothing was due at the last look.

    `changed` is called when jobs may have become due.
    """

    def __init__(
        self,
        database: Database,
        runs: ServableRuns,
        *,
        policy: RetryPolicy,
        rng: Random,
        report: WorkReport,
        notify: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self._database = database
        self._runs = runs
        self._policy = policy
        self._rng = rng
        self._report = report
        self._notify = notify
        self._changed = changed
        self._providers: dict[RunId, tuple[BatchProvider, Validator | None]] = {}
        self._refused: set[RunId] = set()
        self._warned: set[str] = set()
        self._stopped = asyncio.Event()
        self.idle = False

    def stop(self) -> None:
        """End `run` after the step that is under way."""
        self._stopped.set()

    async def run(self, worker: WorkerId, runs: Callable[[], Collection[Run]], *, named: bool) -> None:
        """Take steps of all open batches, or of those of `runs` if the user `named` them."""
        try:
            while not self._stopped.is_set():
                if await self._take_step(worker, runs(), named=named):
                    self.idle = False
                    self._changed()
                else:
                    self.idle = True
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_SECONDS):
                            await self._stopped.wait()
        finally:
            for provider, _ in self._providers.values():
                await provider.aclose()

    async def _take_step(self, worker: WorkerId, runs: Collection[Run], *, named: bool) -> bool:
        """Do the step that is due; return whether there was one."""
        open_ = await self._database.quick_read(batches.runs_of_open)
        ids = (open_ & {run.id for run in runs} if named else open_) - self._refused
        row, due = None, False
        if ids:
            due = await self._database.quick_read(batches.is_due, ids)
        if due:
            row = await self._database.write(batches.take, worker, ids, LEASE)
        if row is None:
            row = await self._plan(worker, runs)
        if row is None:
            return False
        keeping = asyncio.create_task(self._keep(row))
        try:
            await self._step(row)
        except LostBatchError:
            pass  # whoever has it now goes on
        finally:
            keeping.cancel()
        return True

    async def _keep(self, row: BatchRow) -> None:
        with suppress(DatabaseError):  # without its lease, a step changes nothing
            while True:
                await asyncio.sleep(LEASE / 3)
                await self._database.write(batches.renew, row, LEASE)

    async def _plan(self, worker: WorkerId, runs: Collection[Run]) -> BatchRow | None:
        for run in runs:
            served = self._runs.served.get(run.id)
            if served is None or run.lane not in {Lane.BATCH, Lane.AUTO} or not self._provider(run):
                continue
            most, bound = min(MAX_REQUESTS, self._providers[run.id][0].max_requests), served.bound
            if bound is not None:
                bound = replace(bound, price=bound.price.at("batch"))
            request = PlanRequest(worker, LEASE, run.id, most, MAX_BATCHES, bound)
            if await self._database.quick_read(batches.can_plan, request):
                return await self._database.write(batches.plan, request)
        return None

    def _provider(self, run: Run) -> bool:
        """Return whether this process can reach the run's provider."""
        if run.id not in self._providers and run.id not in self._refused:
            try:
                self._providers[run.id] = self._runs.batches_of(run)
            except LbrError as error:
                self._refused.add(run.id)
                self._warn(f"run {run.name}: its batches are not served: {error}")
        return run.id in self._providers

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._notify(message)

    async def _step(self, row: BatchRow) -> None:
        [counted] = await self._database.quick_read(reads.counts, [row.run_id])
        run = counted.run
        if not self._provider(run):
            return await self._put_back(row, 0, None)
        provider, validator = self._providers[row.run_id]
        if run.state is RunState.CANCELLED and not row.state.may_be_out:
            await self._database.write(batches.release, row, "cancelled")
            return None
        try:
            match row.state:
                case BatchState.PLANNED:
                    await self._upload(run, row, provider)
                case BatchState.UPLOADED:
                    await self._send(run, row, provider)
                case BatchState.UNSURE:
                    await self._look(run, row, provider)
                case BatchState.SENT:
                    await self._poll(run, row, provider)
                case BatchState.ENDED:
                    await self._settle(run, row, provider, validator)
        except WrongKey as error:
            self._warn(f"run {run.name}: batch {row.nonce} was made with another key: {error}; {_other_key(row)}")
            await self._put_back(row, MAX_POLL_MS, "not visible with this key")
        except (CallError, BatchError, OSError) as error:
            await self._failed(run, row, error)
        return None

    async def _put_back(self, row: BatchRow, wait_ms: int, error: str | None) -> None:
        await self._database.write(batches.put_back, row, wait_ms, error)

    async def _failed(self, run: Run, row: BatchRow, error: Exception) -> None:
        """Wait after a failed call. If the user must fix something before the batch is sent, the run pauses."""
        family = error.family if isinstance(error, CallError) else Family.TRANSIENT
        self._warn(f"run {run.name}: batch {row.nonce}, {row.state}: {error}")
        if not row.state.may_be_out and family in {Family.PERMANENT, Family.ACCOUNT}:
            cause = PauseCause.ACCOUNT if family is Family.ACCOUNT else PauseCause.SET_UP
            await self._release(run, row, error, Paused(cause, f"its batch was refused: {_words(error)}"))
        else:
            await self._put_back(row, RETRY_MS, _words(error))

    async def _release(self, run: Run, row: BatchRow, why: Exception | str, pause: Paused | None) -> None:
        error = _words(why)
        count = await self._database.write(batches.release, row, error, pause)
        self._notify(f"run {run.name}: batch {row.nonce} was not accepted, {pluralize(count, 'job')} put back: {error}")
        if pause is not None:
            self._notify(f"run {run.name} is paused now: {pause.message}")

    # --- the steps ----------------------------------------------------------------------------------------------------

    async def _upload(self, run: Run, row: BatchRow, provider: BatchProvider) -> None:
        with tempfile.TemporaryFile() as file:  # it has no name, so that no prompt stays if this process dies
            others, full = await self._build(run, row, provider, file)
            for ids, fresh in ((others, False), (full, True)):
                if ids:
                    row = await self._database.write(batches.leave_out, row, ids, fresh=fresh)
            if not row.count:
                await self._database.write(batches.release, row, "no request of it can be sent in a batch")
                return
            size = file.tell()
            file.seek(0)
            file_id = await provider.upload(row.nonce, Path(f"/dev/fd/{file.fileno()}"))
        values = {"file_id": file_id, "bytes": size, "provider": provider.name, "credential": provider.credential}
        row = await self._database.write(batches.uploaded, row, **values)
        await self._send(run, row, provider)

    async def _build(
        self, run: Run, row: BatchRow, provider: BatchProvider, file: IO[bytes]
    ) -> tuple[list[JobId], list[JobId]]:
        """Write the upload; return the jobs that a batch cannot ask for, and those for which there is no room."""
        others: list[JobId] = []
        full: list[JobId] = []
        size = after = 0
        while page := await self._database.read(batches.claims_of, row, after):
            after = page[-1].job_id
            for claim in page:
                try:
                    line = _line(run, row, claim, provider)
                except CallError:
                    line = None
                if line is None:
                    others.append(claim.job_id)
                elif full or size + len(line) > provider.max_bytes:
                    # One that is too long for any batch must not be planned again and again.
                    (full if size else others).append(claim.job_id)
                else:
                    size += file.write(line)
        file.flush()
        return others, full

    async def _send(self, run: Run, row: BatchRow, provider: BatchProvider) -> None:
        file_id = row.file_id
        if file_id is None or row.credential != provider.credential:  # uploaded with another key
            await self._upload(run, row, provider)
            return
        began = time.time(), time.monotonic()
        row = await self._database.write(batches.intend, row, LEASE)
        # The clock that stops while the machine sleeps, and the one that does not.
        if max(time.time() - began[0], time.monotonic() - began[1]) > MAX_DELAY:
            await self._database.write(batches.withdraw, row, RETRY_MS, "the machine stood still")
            return
        try:
            found = await provider.create(file_id, row.nonce)
        except Refused as error:
            pause = Paused(PauseCause.SET_UP, f"its batch was refused: {_words(error)}")
            await self._release(run, row, error, pause)
        except Exception as error:  # noqa: BLE001 - whatever it is, the provider may have the batch
            self._warn(
                f"run {run.name}: batch {row.nonce}: no certain reply to its creation, so lbr looks for it: {error}"
            )
            await self._database.write(batches.doubt, row, FIRST_POLL_MS, _words(error))
        else:
            self._notify(
                f"run {run.name}: sent batch {row.nonce} of {pluralize(row.count, 'request')} to {provider.name}"
            )
            await self._sent(row, found)

    async def _sent(self, row: BatchRow, found: Found) -> None:
        """Record a batch that the provider has; how it ended, if it did, is judged by the next step, a poll."""
        wait = 0 if found.ended else FIRST_POLL_MS
        await self._database.write(batches.sent, row, replace(found, ended=False), wait)

    async def _look(self, run: Run, row: BatchRow, provider: BatchProvider) -> None:
        if row.credential != provider.credential:
            raise WrongKey("only that key shows whether the provider has it")
        now = await self._database.quick_read(reads.time)
        found = await provider.find(row.nonce, Millis(min(row.sent_at or now, now) - SINCE_MS))
        if found is not None:
            self._notify(f"run {run.name}: found batch {row.nonce} at {provider.name}")
            await self._sent(row, found)
        elif await self._database.write(batches.not_found, row):
            self._notify(f"run {run.name}: {provider.name} never had batch {row.nonce}; it is sent again")

    async def _poll(self, run: Run, row: BatchRow, provider: BatchProvider) -> None:
        if row.found is None:
            raise BatchError("its id is not stored: another program changed the database")
        found = await provider.poll(row.found.provider_id)
        if found.ended and not found.files and found.error not in _HARMLESS:
            wrong = Paused(PauseCause.SET_UP, f"its batch failed: {found.error}: {found.message or 'no reason given'}")
            harmless = found.error == TOKEN_LIMIT or run.state is RunState.CANCELLED
            await self._release(run, row, found.error or "failed", None if harmless else wrong)
            return
        if run.state is RunState.CANCELLED and not found.ended:
            await provider.cancel(found.provider_id)
        now = await self._database.quick_read(reads.time)
        age = max(0, now - (row.sent_at or now))
        await self._database.write(batches.sent, row, found, min(MAX_POLL_MS, max(FIRST_POLL_MS, age // 20)))

    async def _settle(self, run: Run, row: BatchRow, provider: BatchProvider, validator: Validator | None) -> None:
        """Settle the results page by page, then return the jobs that are not among them."""
        if row.found is None:
            raise BatchError("its id is not stored: another program changed the database")
        policy = replace(self._policy, max_attempts=run.max_attempts)
        page: list[Settlement] = []
        cursor, size = row.cursor, 0
        async for cursor, text, outcome in provider.results(row.found, row.cursor):
            claim = _claim_of(row, text)
            # A request that was turned away was not tried: it goes online like those that are missing.
            limited = outcome.failure is not None and outcome.failure.family is Family.RATE_LIMITED
            if claim is not None and not limited:
                ended = checked(outcome, validator, run.task, run.keep)
                ended = ended if run.price is None else priced(ended, run.price.at("batch"))
                page.append(decide(claim, ended, policy, self._rng))
                size += _size(ended)
            if len(page) >= LINES or size > LINES_BYTES:
                row, page, size = await self._settle_page(run, row, page, cursor), [], 0
        row = await self._settle_page(run, row, page, cursor)
        if row.file_id is not None:
            try:
                await provider.delete(row.file_id)
            except (CallError, BatchError, OSError) as error:
                self._warn(f"run {run.name}: the upload of batch {row.nonce} stays at {provider.name}: {error}")
        missing = await self._database.write(batches.finish, row)
        end = "are cancelled" if run.state is RunState.CANCELLED else "go online"
        without = f"; {pluralize(missing, 'job')} without an answer {end}" * bool(missing)
        self._notify(f"run {run.name}: settled batch {row.nonce} of {pluralize(row.count, 'request')}{without}")

    async def _settle_page(self, run: Run, row: BatchRow, page: Sequence[Settlement], cursor: int) -> BatchRow:
        row, settled = await self._database.write(batches.settle_page, row, page, cursor)
        for one in {one.claim.job_id: one for one in reversed(page)}.values():  # a line may come twice
            if one.claim.job_id not in settled.taken or one.claim.job_id in settled.given_back:
                continue
            match one.state:
                case JobState.DONE:
                    self._report.done += 1
                case JobState.FAILED:
                    self._report.failed += 1
                case _:
                    self._report.retried += 1
                    continue
            self._report.by_run[run.name] += 1
        for name, pause in settled.paused.items():
            self._notify(f"run {name} is paused now: {pause.message}")
        self._changed()
        return row


def _words(error: Exception | str) -> str:
    """Return an error as the database can hold it."""
    return storable(str(error).replace("\x00", ""))[:MESSAGE_LIMIT]


def _other_key(row: BatchRow) -> str:
    return f"start a worker with that key, or give the batch up with `lbr batches --forget {row.nonce}`"


def _line(run: Run, row: BatchRow, claim: Claim, provider: BatchProvider) -> bytes | None:
    """Return the line of a claim; None for a job that another model answers. Raises CallError if it cannot be asked."""
    if claim.model is not None:
        return None
    settings = seeded(claim.settings, run.task, claim.sample) if claim.sample else claim.settings
    return provider.line(replace(claim, settings=settings), custom_id(row.nonce, claim.job_id, claim.claim_seq))


def _claim_of(row: BatchRow, text: str) -> Claim | None:
    """Return the claim that a line answers; None if the line is not of this batch."""
    known = read_custom_id(text)
    if known is None or known[0] != row.nonce:
        return None
    _, job_id, seq = known
    # Its jobs were never tried before.
    return Claim(job_id, row.run_id, seq, attempts=0, crashes=0, prompt=Prompt(text=""), key=b"")


def _size(outcome: Outcome) -> int:
    ended = outcome.reply or outcome.failure
    return 0 if ended is None else len(ended.text or "")
