"""What ended workers left behind: finished answers in files, and jobs that they held.

Answers that the database did not take are kept in a private file next to the queue, or in the state folder, until the
next worker starts. Each line names its job by id, claim and content key, so that no other job can get its answer.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson

from lbr.core import ownership
from lbr.core.errors import DatabaseBusyError, DatabaseError, LbrError
from lbr.core.text import pluralize
from lbr.core.types import KEY_BYTES, Claim, JobId, JobState, Outcome, Prompt, RunId, Settlement
from lbr.store import files, leases
from lbr.store.leases import RECLAIM_PAGE
from lbr.store.settle import jobs_of_keys, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lbr.store.database import Database
    from lbr.store.leases import Reclaimed
    from lbr.store.settle import JobStanding

ENDING = ".spool.jsonl"
LEFT = ".left.jsonl"
PAGE = 100
_reported: set[str] = set()


def keep(database: Database, batch: Sequence[Settlement]) -> Path:
    """Write settlements to a new file on disk and return it. Raises OSError if no place can be written."""
    lines = b"".join(orjson.dumps(_to_line(s), option=orjson.OPT_APPEND_NEWLINE) for s in batch)
    problem: OSError | None = None
    for place in database.spool_places:
        path = place.with_name(f"{place.name}.{os.getpid()}-{uuid4().hex[:8]}{ENDING}")
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_private(path, lines)
        except OSError as error:
            problem = error
        else:
            return path
    raise problem or FileNotFoundError("no place to keep answers in")


def keep_unwritten(database: Database, error: BaseException, left: Sequence[Settlement]) -> BaseException:
    """Keep what an error prevented from being written; return the error with the path of the file."""
    if not left:
        return error
    try:
        message = (
            f"{error}. {len(left)} finished answers are kept in {keep(database, left)}: the next `lbr worker` on this "
            f"machine writes them"
        )
    except OSError as problem:
        message = f"{error}; {len(left)} finished answers are lost: {problem}"
    found = DatabaseError(message)
    found.__cause__ = error
    return found


def kept_files(places: Iterable[Path]) -> dict[Path, int | None]:
    """Return the files of kept answers in a database's `spool_places`, with the number of answers, None if unreadable."""
    found: dict[Path, int | None] = {}
    for place in places:
        for path in _paths(place, ENDING):
            try:
                found[path] = _read(path, place).count(b"\n")
            except OSError:
                found[path] = None
    return found


def _paths(place: Path, ending: str) -> list[Path]:
    return sorted(map(Path, glob.glob(f"{glob.escape(str(place))}.*{ending}")))


def _read(path: Path, place: Path) -> bytes:
    # Another user may have put answers beside a database, or a pipe that never ends.
    with os.fdopen(ownership.open_ours(path, os.O_RDONLY, place), "rb") as file:
        return file.read()


async def reclaim(database: Database, notify: Callable[[str], None], *, starting: bool = False) -> tuple[int, int]:
    """Settle kept answers if a worker is `starting` or may have died, then reclaim the jobs of dead workers.

    Return how many jobs were reclaimed, and how many of them failed because it was their third crash. Safe to repeat.
    """
    # A worker keeps its answers before it ends, and they must be settled before its jobs are claimed again.
    dead = await database.quick_read(leases.dead_workers, database.presence)
    if (dead or starting or not database.presence.knows) and not await settle_kept(database, notify):
        dead = []  # their jobs wait for the end of their leases
    taken: list[Reclaimed] = []
    while page := await leases.reclaim(database, dead):
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


async def settle_kept(database: Database, notify: Callable[[str], None]) -> bool:
    """Settle what workers on this machine could not write. Safe to repeat, and for many workers at once.

    A file that cannot be read or settled is reported once and stays. Return False if that may pass.
    """
    passed = True
    for place in database.spool_places:
        files.remove_parts(_paths(place.with_name(f".{place.name}"), f"{ENDING}*{files.PART}"))
        for path in _paths(place, ENDING):
            try:
                await _settle_file(database, path, place, notify)
            except FileNotFoundError:  # another worker has settled it
                continue
            except (OSError, LbrError) as error:
                passed &= not isinstance(error, OSError | DatabaseBusyError)
                problem = f"the answers kept in {path} are not written: {getattr(error, 'strerror', None) or error}"
                if problem not in _reported:
                    _reported.add(problem)
                    notify(problem)
    return passed


async def _settle_file(database: Database, path: Path, place: Path, notify: Callable[[str], None]) -> None:
    """Settle the lines of a file and remove it; rename it if some of them are of another database."""
    try:
        kept = [_from_line(orjson.loads(line)) for line in _read(path, place).splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatabaseError(f"the file holds something else ({error}); check it, then remove it") from error
    jobs = await database.read(jobs_of_keys, [s.claim.key for s in kept if len(s.claim.key) == KEY_BYTES])
    known = [_with_known_claim(s, jobs.get(s.claim.key, [])) for s in kept]
    ours = list({(s.claim.job_id, s.claim.claim_seq): s for s in reversed(known) if s is not None}.values())
    foreign = known.count(None)
    taken = stale = 0
    for start in range(0, len(ours), PAGE):
        settled = await database.write(settle, ours[start : start + PAGE])
        taken += len(settled.taken)
        stale += len(settled.stale)
        for name, pause in settled.paused.items():
            notify(f"run {name} is paused now: {pause.message}")
    if foreign:
        left = path.with_name(path.name.removesuffix(ENDING) + LEFT)
        os.rename(path, left)
        notify(
            f"{foreign} of {len(kept)} kept answers belong to another database; they are in {left}: remove "
            f"it when you do not need it"
        )
    else:
        os.unlink(path)
    if ours:
        late = f", {stale} came too late" * bool(stale)
        notify(f"wrote {pluralize(taken, 'answer')} that {'was' if taken == 1 else 'were'} kept in {path}{late}")


def _with_known_claim(settlement: Settlement, jobs: Sequence[JobStanding]) -> Settlement | None:
    """Return a settlement of one of these jobs, which have its content key; None if it fits none of them.

    A database that was created again or restored has forgotten the claim, and may have the job under another id. An
    answer is taken all the same if no worker has claimed the job since, because it is paid for.
    """
    claim, is_answer = settlement.claim, settlement.outcome.reply is not None
    job = next((job for job in jobs if job.job_id == claim.job_id), None)
    if job is not None and is_answer and job.state is JobState.PENDING:
        claim = replace(claim, claim_seq=min(claim.claim_seq, job.claim_seq))
    elif job is None and is_answer:
        job = next((job for job in jobs if job.common and job.state is JobState.PENDING), None)
        claim = claim if job is None else replace(claim, job_id=job.job_id, claim_seq=job.claim_seq)
    return None if job is None else replace(settlement, claim=replace(claim, run_id=job.run_id))


def _to_line(settlement: Settlement) -> dict[str, Any]:
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


def _from_line(line: dict[str, Any]) -> Settlement:
    """Read a line, without waits and pauses, which may be over by now. Raises ValueError, KeyError or TypeError."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - slow to import, and rarely needed

    outcome = TypeAdapter(Outcome).validate_python({name: line[name] for name in Outcome.__slots__})
    state = JobState(line["state"])
    states = {JobState.FAILED, JobState.PENDING} if outcome.reply is None else {JobState.DONE}
    if (outcome.reply is None) == (outcome.failure is None) or state not in states:
        raise ValueError(f"no such call ends {state}")
    ids = JobId(int(line["job"])), RunId(int(line["run"])), int(line["claim_seq"])
    claim = Claim(*ids, attempts=0, crashes=0, prompt=Prompt(text=""), key=bytes.fromhex(line["key"]))
    return Settlement(claim, state, outcome, charge=int(line["charge"]))
