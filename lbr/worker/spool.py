"""What workers that ended left behind: finished answers in files, and jobs that they held.

An answer that no database took is kept in a private file next to the queue, or in the state folder, and settled when
the next worker starts. Each line names its job by id, claim and content key, so that an answer never lands at another.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from filelock import AsyncFileLock

from lbr.core import ownership
from lbr.core.errors import DatabaseError, LbrError, Usage
from lbr.core.retry import storable_usage
from lbr.core.text import pluralize
from lbr.core.types import KEY_BYTES, Claim, JobId, JobState, Outcome, Prompt, RunId, Settlement
from lbr.store import files, reads
from lbr.store.queue import RECLAIM_PAGE
from lbr.store.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from lbr.store.database import Database
    from lbr.store.queue import Queue, Reclaimed

ENDING = ".spool.jsonl"
LEFT = ".left.jsonl"
PAGE = 100
LOCK_SECONDS = 10
"""How long to wait for another worker that is settling a file: its jobs must not be claimed before that."""
WAYS = (JobState.DONE, JobState.FAILED, JobState.PENDING)
"""How a call may leave its job."""
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)


def keep(database: Database, batch: Sequence[Settlement]) -> Path:
    """Write settlements to a new file, which has reached the disk when this returns.

    Raises OSError if no place can be written.
    """
    lines = b"".join(orjson.dumps(_line(s), option=orjson.OPT_APPEND_NEWLINE) for s in batch)
    problem: OSError | None = None
    for place in database.spool_places:
        path = place.with_name(f"{place.name}.{os.getpid()}-{uuid4().hex[:8]}{ENDING}")
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_private(path, lines)
        except OSError as error:
            problem = error
            continue
        return path
    raise problem or FileNotFoundError("no place to keep answers in")


def kept(database: Database, error: BaseException, left: Sequence[Settlement]) -> BaseException:
    """Keep what was not written because of an error; return the error that says where it is."""
    if not left:
        return error
    try:
        words = (
            f"{error}. {len(left)} finished answers are kept in {keep(database, left)}: the next `lbr worker` on this "
            f"machine writes them"
        )
    except OSError as problem:
        words = f"{error}; {len(left)} finished answers are lost: {problem}"
    found = DatabaseError(words)
    found.__cause__ = error
    return found


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file of kept answers: how many, None if it cannot be read; some of `left` are of another database."""

    path: Path
    answers: int | None
    left: bool


def waiting(places: Iterable[Path]) -> list[Waiting]:
    """Return the files of kept answers of a database, given its `spool_places`."""
    return [
        Waiting(path, _count(path, place), left=ending == LEFT)
        for place in places
        for ending in (ENDING, LEFT)
        for path in _paths(place, ending)
    ]


def _paths(place: Path, ending: str) -> list[Path]:
    """Return the files of a place; none in a folder that cannot be read, because no worker of ours kept any there."""
    try:
        return sorted(place.parent.glob(f"{glob.escape(place.name)}.*{ending}"))
    except OSError:
        return []


def _bytes_of(path: Path, place: Path) -> bytes:
    # Another user may have put answers beside a database, or a pipe that never ends.
    with os.fdopen(ownership.open_ours(path, os.O_RDONLY, place), "rb") as file:
        return file.read()


def _count(path: Path, place: Path) -> int | None:
    try:
        return _bytes_of(path, place).count(b"\n")
    except OSError:
        return None


async def reclaim(
    database: Database, queue: Queue, notify: Callable[[str], None], *, starting: bool = False
) -> tuple[int, int]:
    """Settle kept answers, which are paid for, then reclaim the jobs of dead workers. Safe to repeat.

    Return how many jobs were reclaimed, and how many of them failed, because it was their third crash. Kept answers
    are looked for when a worker is `starting` or found dead.
    """
    # First who is dead: what one has kept was written before, and must be settled before its jobs are claimed again.
    dead_workers = await queue.dead_workers()
    if dead_workers or starting:
        await settle_kept(database, notify)
    taken: list[Reclaimed] = []
    while page := await queue.reclaim(dead_workers):
        taken += page
        if len(page) < RECLAIM_PAGE:
            break
    for (worker, died), count in sorted(Counter((one.worker_id, one.died) for one in taken).items()):
        why = "which died" if died else "whose lease ran out"
        notify(f"reclaimed {pluralize(count, 'job')} of worker {worker}, {why}")
    failed = [one for one in taken if one.state is JobState.FAILED]
    for one in failed:
        notify(f"job {one.job_id} failed: its worker died 3 times")
    return len(taken), len(failed)


async def settle_kept(database: Database, notify: Callable[[str], None]) -> None:
    """Settle what workers on this machine could not write. Safe to repeat, and for many at once.

    A file that cannot be read or settled stays where it is, and `notify` says so: no worker stops because of it.
    """
    for place in database.spool_places:
        files.remove_parts(_paths(place.with_name(f".{place.name}"), f"{ENDING}*{files.PART}"))
        for path in _paths(place, ENDING):
            lock = path.with_name(path.name + ".lock")
            try:
                for one in (path, lock):
                    ownership.check_ours(one, place)
                async with AsyncFileLock(lock, timeout=LOCK_SECONDS, mode=0o600, fallback_to_soft=False):
                    await _settle_file(database, path, place, notify)
                    lock.unlink(missing_ok=True)
            except (OSError, LbrError) as error:
                notify(
                    f"the answers kept in {path} are not written: {getattr(error, 'strerror', None) or error}"
                )


async def _settle_file(database: Database, path: Path, place: Path, notify: Callable[[str], None]) -> None:
    """Settle what is in a file and remove it; it is put aside if a part of it is of another database."""
    try:
        lines = [_settlement(orjson.loads(line)) for line in _bytes_of(path, place).splitlines()]
    except FileNotFoundError:  # settled meanwhile
        return
    except _UNREADABLE as error:
        raise DatabaseError(f"something else is in the file ({error}); look at it and remove it") from error
    jobs = await reads.jobs_of_keys(database, [s.claim.key for s in lines if len(s.claim.key) == KEY_BYTES])
    found = [_as_known(settlement, jobs.get(settlement.claim.key, [])) for settlement in lines]
    ours = list({one.claim.job_id: one for one in reversed(found) if one is not None}.values())
    taken = stale = 0
    for start in range(0, len(ours), PAGE):
        settled = await settle(database, ours[start : start + PAGE])
        taken += len(settled.taken)
        stale += len(settled.stale)
        for name, pause in settled.paused.items():
            notify(f"run {name} is paused now: {pause.message}")
    if len(ours) < len(lines):
        left = path.with_name(path.name.removesuffix(ENDING) + LEFT)
        os.rename(path, left)
        notify(
            f"{len(lines) - len(ours)} of {len(lines)} kept answers are of another database; they are in {left}: remove "
            f"it when you do not need it"
        )
    else:
        os.unlink(path)
    if ours:
        late = f", {stale} came too late" * bool(stale)
        notify(
            f"took up {pluralize(taken, 'answer')} that {'was' if taken == 1 else 'were'} kept in {path}{late}"
        )


def _as_known(settlement: Settlement, jobs: Sequence[reads.JobStanding]) -> Settlement | None:
    """Return a settlement under a claim that the database knows, given the jobs of its key; None if there is none.

    A database that was created again, or restored from a backup, has forgotten the claim, and may have the job under
    another id. The answer is paid for all the same, and is taken as long as no worker has claimed the job since.
    """
    claim, is_answer = settlement.claim, settlement.outcome.reply is not None
    same = next((job for job in jobs if job.job_id == claim.job_id), None)
    if same is not None:
        forgotten = same.state is JobState.PENDING and same.claim_seq < claim.claim_seq
        claim_seq = same.claim_seq if forgotten and is_answer else claim.claim_seq
        return replace(settlement, claim=replace(claim, run_id=same.run_id, claim_seq=claim_seq))
    job = next((job for job in jobs if job.common and job.state is JobState.PENDING), None)
    if job is None or not is_answer:
        return None
    known = replace(claim, job_id=job.job_id, run_id=job.run_id, claim_seq=job.claim_seq)
    return replace(settlement, claim=known)


def _line(settlement: Settlement) -> dict[str, Any]:
    claim = settlement.claim
    return {
        "job": claim.job_id,
        "run": claim.run_id,
        "claim_seq": claim.claim_seq,
        "key": claim.key.hex(),
        "state": settlement.state,
        "charge": settlement.charge,
        **asdict(settlement.outcome),
    }


def _settlement(line: dict[str, Any]) -> Settlement:
    """Read a line. Waits and cooldowns are over by now, and what paused a run may be fixed: they are left out."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - slow to import, and hardly ever needed

    for part in (line["reply"], line["failure"]):
        if part is not None:
            # The counts may themselves be why the database took none of these.
            part["usage"] = storable_usage(Usage(**part["usage"]))
    outcome = TypeAdapter(Outcome).validate_python(
        {name: line[name] for name in ("reply", "failure", "latency_ms")}
    )
    state = JobState(line["state"])
    if (outcome.reply is None) == (outcome.failure is None):
        raise ValueError("neither an answer nor a failure")
    if state not in WAYS or (state is JobState.DONE) != (outcome.failure is None):
        raise ValueError(f"no such call ends {state}")
    ids = JobId(int(line["job"])), RunId(int(line["run"])), int(line["claim_seq"])
    claim = Claim(*ids, attempts=0, crashes=0, prompt=Prompt(text=""), key=bytes.fromhex(line["key"]))
    return Settlement(claim, state, outcome, charge=int(line["charge"]))
