"""What a queue holds, read past the store as another program would, in the words of the model, with a recount."""

from __future__ import annotations

import sqlite3
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sqlalchemy import make_url

from lbr.core.types import JobState, RunState
from lbr.store import counters
from tests.proofs.model_of_queue import Job, Key, Try
from tests.support import is_postgresql, postgres

if TYPE_CHECKING:
    import psycopg

TABLES = ("runs", "prompts", "jobs", "results", "attempts", "items", "limits", "counters")
USAGE = ("input_tokens", "output_tokens", "cost_nanos")


def outside(url: str) -> sqlite3.Connection | psycopg.Connection:
    """Return a connection of another program to a queue."""
    if is_postgresql(url):
        return postgres.connect(url, options="-c search_path=lbr")
    return sqlite3.connect(str(make_url(url).database), isolation_level=None)


class Seen:
    """Everything in a queue; `runs` and `workers` are what the model calls the ids of the database.

    `jobs` are in the order of their ids, `counters` as kept and `recount` as counted now, without zeros.
    """

    def __init__(
        self,
        connection: sqlite3.Connection | psycopg.Connection,
        runs: dict[int, str],
        workers: dict[int, int],
    ) -> None:
        tables = {name: _read(connection, name) for name in TABLES}
        prompts = {row.job_id: row for row in tables["prompts"]}
        results = {row.job_id: row for row in tables["results"]}
        self.keys = {job_id: Key(runs[row.run_id], row.body) for job_id, row in prompts.items()}
        tries: dict[int, list[Any]] = {}
        for one in sorted(tables["attempts"], key=lambda one: one.id):
            tries.setdefault(one.job_id, []).append(one)
        self.jobs: dict[Key, Job] = {}
        self.recount = {name: Counter[str]() for name in runs.values()}
        for row in sorted(tables["jobs"], key=lambda row: row.id):
            key, result, mine = self.keys[row.id], results.pop(row.id, None), tries.get(row.id, [])
            assert key not in self.jobs, f"{key} has two jobs"
            ended = row.state in {"done", "failed"} or (row.state == "cancelled" and row.finished_at is not None)
            assert (row.finished_at is not None) == ended, key
            self.jobs[key] = self._job(row, prompts[row.id], result, mine, workers)
            self.recount[key.run].update(_counted(row, result, mine))
        assert not results, f"answers without a job: {results}"
        self.items: dict[str, list[str]] = {name: [] for name in runs.values()}
        for row in sorted(tables["items"], key=lambda row: (row.run_id, row.idx)):
            inputs = self.items[runs[row.run_id]]
            assert row.idx == len(inputs)
            inputs.append(self.keys[row.job_id].text)
        self.run_states = {row.name: RunState(row.state) for row in tables["runs"]}
        self.cooldowns = {row.answerer: row.cooldown_until for row in tables["limits"] if row.cooldown_until}
        self.counters = {name: Counter[str]() for name in runs.values()}
        for row in tables["counters"]:
            self.counters[runs[row.run_id]][row.name] += row.value
        for count in self.counters.values():
            for name in (counters.ANSWERED, counters.OPENED, counters.CACHED_TOKENS):  # not told by the rows
                del count[name]
        self.counters = {name: _without_zeros(count) for name, count in self.counters.items()}

    def _job(self, row: Any, prompt: Any, result: Any, tries: list[Any], workers: dict[int, int]) -> Job:
        return Job(
            available_at=row.available_at,
            state=JobState(row.state),
            claim_seq=row.claim_seq,
            retry_seq=row.retry_seq,
            attempts=row.attempts,
            crashes=row.crashes,
            worker=None if row.worker_id is None else workers[row.worker_id],
            lease_until=row.lease_until,
            answer=result and result.text,
            source=result and self.keys.get(result.reused_from),
            own=prompt.settings,
            tries=tuple(Try(one.claim_seq, one.what, one.family, one.text, one.at) for one in tries),
        )


def _read(connection: Any, table: str) -> list[Any]:
    found = connection.execute(f"SELECT * FROM {table}")
    columns = [one[0] for one in found.description]
    return [SimpleNamespace(**dict(zip(columns, values, strict=True))) for values in found.fetchall()]


def _counted(row: Any, result: Any, tries: list[Any]) -> Counter[str]:
    """Return what one job adds to its run's counters."""
    count = Counter({str(row.state): 1})
    # An answer that was validated later is on record as the bad answer that it was.
    on_record = any((one.claim_seq, one.what) == (row.claim_seq, "failed") for one in tries)
    own = result is not None and result.reused_from is None and not on_record
    for call in [*tries, *([result] if own else [])]:
        count.update({name: getattr(call, name) or 0 for name in USAGE})
    for one in tries:
        count[counters.CRASHED] += one.what == "crashed"
        count[counters.STALE] += one.what == "stale"
        count[counters.ESTIMATED_NANOS] += (one.what == "crashed") * (one.cost_nanos or 0)
        count[counters.WASTED_NANOS] += 0 if one.error == "Redone" else one.cost_nanos or 0
        if one.family is not None:
            count[counters.TRY + one.family] += 1
    count[counters.REUSED] += result is not None and result.reused_from is not None
    return _without_zeros(count)


def _without_zeros(count: Counter[str]) -> Counter[str]:
    return Counter({name: value for name, value in count.items() if value})
