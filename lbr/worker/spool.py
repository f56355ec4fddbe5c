"""Finished answers that no database took: kept in a private file, and settled by the next worker that starts.

A file is written whole or not at all. It holds what a settlement needs, without prompts; each line names its
job by id, claim and content key, so that an answer never lands at a job that it does not belong to.
"""

from __future__ import annotations

import glob
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from filelock import Timeout

from lbr.core import ownership
from lbr.core.errors import DatabaseError, Family, LbrError, Symptom, Usage
from lbr.core.plurals import pluralize
from lbr.core.retry import storable_usage
from lbr.core.types import (
    KEY_BYTES,
    Claim,
    Failure,
    JobId,
    JobState,
    Outcome,
    Prompt,
    Reply,
    RunId,
    Settlement,
)
from lbr.store import files, reads
from lbr.store.settle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from lbr.store.database import Database

ENDING = ".spool.jsonl"
LEFT = ".left.jsonl"
PAGE = 100
WAYS = (JobState.DONE, JobState.FAILED, JobState.PENDING)
"""How a call may leave its job."""
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, LbrError)
"""What reading a file raises that holds something else than kept answers."""


def keep(database: Database, batch: Sequence[Settlement]) -> Path:
    """Write settlements to a new file, which has reached the disk when this returns.

    Raises OSError where none of the places can be written.
    """
    lines = _lines(batch)
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
    """Keep what was not written because of an error, and return the error that says where."""
    if not left:
        return error
    try:
        path = keep(database, left)
    except OSError as problem:
        lost = DatabaseError(f"{error}; {len(left)} finished answers are lost: {problem}")
        lost.__cause__ = error
        return lost
    told = DatabaseError(
        f"{error}. {len(left)} finished answers are kept in {path}: the next `lbr worker` on this machine writes them"
    )
    told.__cause__ = error
    return told


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file of kept answers: how many, None where it cannot be read; `left` are of another database."""

    path: Path
    answers: int | None
    left: bool


def waiting(places: Iterable[Path]) -> list[Waiting]:
    """Return the files that are about a database, given its `spool_places`; nothing is changed."""
    found = []
    for place in places:
        for ending in (ENDING, LEFT):
            paths = _paths(place, ending)
            found += [
                Waiting(path, _count(path, place), left=ending == LEFT) for path in paths if path.exists()
            ]
    return found


def _paths(place: Path, ending: str) -> list[Path]:
    """Return the files of a place; none in a folder that we may not look into, where no worker of ours kept any."""
    try:
        return sorted(place.parent.glob(f"{glob.escape(place.name)}.*{ending}"))
    except OSError:
        return []


def waiting_of(database: Database, run_id: RunId) -> list[Path]:
    """Return the files that hold answers of a run, those that may hold some but cannot be read among them."""
    return [
        path
        for place in database.spool_places
        for path in _paths(place, ENDING)
        if _may_hold_some(path, place, run_id)
    ]


def _may_hold_some(path: Path, place: Path, run_id: RunId) -> bool:
    try:
        return any(settlement.claim.run_id == run_id for settlement in _read(path, place))
    except FileNotFoundError:  # settled meanwhile
        return False
    except (OSError, *_NOT_OURS):
        return True


def _count(path: Path, place: Path) -> int | None:
    try:
        return _bytes_of(path, place).count(b"\n")
    except OSError:
        return None


async def settle_kept(database: Database, notify: Callable[[str], None]) -> set[int]:
    """Settle what earlier workers on this machine could not write; safe to repeat, and for many at once.

    What cannot be read, or is not taken, stays where it is, and `notify` says so: it must not keep a worker from
    its work. Returns the ids of the processes whose answers may still be taken later: somebody is at it, it failed for
    now, or the file is to be mended.
    """
    waiting = set()
    for place in database.spool_places:
        hidden = place.with_name(f".{place.name}")
        files.remove_parts(part for of in (ENDING, LEFT) for part in _paths(hidden, f"{of}*{files.PART}"))
        for path in _paths(place, ENDING):
            if not await _settle_one(database, path, place, notify):
                waiting |= _writers(path, place)
    return waiting


async def _settle_one(database: Database, path: Path, place: Path, notify: Callable[[str], None]) -> bool:
    lock = path.with_name(path.name + ".lock")
    try:
        for one in (path, lock):
            ownership.check_ours(one, place)
        with files.file_lock(lock, timeout=0):
            done = await _settle_file(database, path, place, notify)
            if done:
                lock.unlink(missing_ok=True)
            return done
    except Timeout:
        pass
    except OSError as error:
        notify(f"cannot take up the answers in {path}: {error.strerror or error}")
    except DatabaseError as error:
        notify(f"the answers in {path} are still not taken: {error}")
    return False


def _writers(path: Path, place: Path) -> set[int]:
    """Return the process that wrote a file, as its name tells; none for a name that `keep` does not give."""
    pid = path.name.removeprefix(f"{place.name}.").partition("-")[0]
    return {int(pid)} if pid.isascii() and pid.isdecimal() else set()


async def _settle_file(database: Database, path: Path, place: Path, notify: Callable[[str], None]) -> bool:
    """Settle what is in a file and remove it; False where that is something else."""
    try:
        kept = _read(path, place)
    except FileNotFoundError:  # settled meanwhile
        return True
    except _NOT_OURS as error:
        notify(f"expected kept answers in {path}, got: something else ({error}); look at it and remove it")
        return False
    jobs = await reads.jobs_of_keys(database, [s.claim.key for s in kept if len(s.claim.key) == KEY_BYTES])
    ours: dict[JobId, Settlement] = {}
    others = []
    for settlement in kept:
        known = _as_known(settlement, jobs.get(settlement.claim.key, []))
        if known is None or known.claim.job_id in ours:
            others.append(settlement)
        else:
            ours[known.claim.job_id] = known
    batch = list(ours.values())
    taken = stale = 0
    for start in range(0, len(batch), PAGE):
        settled = await settle(database, batch[start : start + PAGE])
        taken += len(settled.taken)
        stale += len(settled.stale)
        for name, pause in settled.paused.items():
            notify(f"run {name} is paused now: {pause.message}")
    if others:
        left = path.with_name(path.name.removesuffix(ENDING) + LEFT)
        files.write_private(left, _lines(others))
        notify(
            f"expected the jobs of {len(kept)} kept answers, got: {len(others)} of another database; they are in "
            f"{left}: remove it when you do not need it"
        )
    os.unlink(path)
    if ours:
        notify(
            f"took up {pluralize(taken, 'answer')} that {'was' if taken == 1 else 'were'} kept in {path}"
            + (f", {stale} came too late" * bool(stale))
        )
    return True


def _as_known(settlement: Settlement, jobs: Sequence[reads.JobStanding]) -> Settlement | None:
    """Return a settlement under a claim that the database knows, given the jobs of its key; None where there is none.

    A database that was made anew, or restored from a backup, has forgotten the claim, and may have the job under
    another id. The answer is paid for all the same, and welcome while nobody has claimed the job since.
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


def _read(path: Path, place: Path) -> list[Settlement]:
    return [_settlement(orjson.loads(line)) for line in _bytes_of(path, place).splitlines()]


def _bytes_of(path: Path, place: Path) -> bytes:
    # Another user may have put answers beside a database, or a pipe that never ends.
    with os.fdopen(ownership.open_ours(path, os.O_RDONLY, place), "rb") as file:
        return file.read()


def _lines(batch: Sequence[Settlement]) -> bytes:
    return b"".join(orjson.dumps(_line(s), option=orjson.OPT_APPEND_NEWLINE) for s in batch)


def _line(settlement: Settlement) -> dict[str, Any]:
    claim, outcome = settlement.claim, settlement.outcome
    return {
        "job": claim.job_id,
        "run": claim.run_id,
        "claim_seq": claim.claim_seq,
        "key": claim.key.hex(),
        "state": settlement.state,
        "charge": settlement.charge,
        "latency_ms": outcome.latency_ms,
        "reply": None if outcome.reply is None else asdict(outcome.reply),
        "failure": None if outcome.failure is None else asdict(outcome.failure),
    }


def _settlement(line: dict[str, Any]) -> Settlement:
    """Read a line. Waits and cooldowns are over by now, and what paused a run may be mended: they are left out."""
    claim = Claim(
        job_id=JobId(int(line["job"])),
        run_id=RunId(int(line["run"])),
        claim_seq=int(line["claim_seq"]),
        attempts=0,
        crashes=0,
        prompt=Prompt(text=""),
        key=bytes.fromhex(line["key"]),
    )
    reply, failure = line["reply"], line["failure"]
    if (reply is None) == (failure is None):
        raise ValueError("neither an answer nor a failure")
    state = JobState(line["state"])
    if state not in WAYS or (state is JobState.DONE) != (failure is None):
        raise ValueError(f"no such call ends {state}")
    outcome = Outcome(
        None if reply is None else Reply(**reply | {"usage": _usage(reply)}),
        None
        if failure is None
        else Failure(
            **failure
            | {
                "usage": _usage(failure),
                "family": Family(failure["family"]),
                "symptom": failure.get("symptom") and Symptom(failure["symptom"]),
            }
        ),
        latency_ms=int(line["latency_ms"]),
    )
    return Settlement(claim, state, outcome, charge=int(line["charge"]))


def _usage(kept: dict[str, Any]) -> Usage:
    # The counts may themselves be why the database took none of these.
    return storable_usage(Usage(**kept["usage"]))
