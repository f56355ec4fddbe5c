"""The ordered steps that upgrade an older database to the tables of `lbr.store.schema`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson
from sqlalchemy import Column, Index, MetaData, Table, insert, inspect, literal_column, select, text, update

from lbr.core.errors import DatabaseError
from lbr.core.types import Move, PauseCause, Paused, RunState
from lbr.store.schema import (
    LIVE_MS,
    failed,
    items,
    jobs,
    metadata,
    prompts,
    runs,
    schema_version,
    set_postgresql_options,
    suspects,
    tried,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy import Connection

    from lbr.core.types import WorkerId


def _schema_of(connection: Connection) -> str | None:
    name: str | None = connection.get_execution_options().get("schema_translate_map", {}).get(None)
    return name


def _names(connection: Connection, table: str) -> set[str]:
    return {one["name"] for one in inspect(connection).get_columns(table, schema=_schema_of(connection))}


def _alter(connection: Connection, table: Table, change: str) -> None:
    name = ".".join(filter(None, (_schema_of(connection), table.name)))
    connection.execute(text(f"ALTER TABLE {name} {change}"))


def _add_missing(connection: Connection) -> None:
    """Add the columns that older versions of the tables do not have, but for those of a primary key."""
    for table in metadata.sorted_tables:
        there = _names(connection, table.name)
        for column in table.columns:
            if column.name not in there and not column.primary_key:
                _alter(connection, table, f"ADD COLUMN {column.name} {column.type.compile(connection.dialect)}")


def _index_suspects(connection: Connection) -> None:
    # The youngest of all indexes, even in a new database: of two that would do, SQLite takes that.
    suspects.drop(connection, checkfirst=True)
    suspects.create(connection)


def _index_tried(connection: Connection) -> None:
    tried.drop(connection, checkfirst=True)
    tried.create(connection)


def _move_keys(connection: Connection) -> None:
    if "key" not in _names(connection, "jobs"):
        return
    old = Table("prompts_before", MetaData(), *(Column(name) for name in ("job_id", "chat", "body")))
    keyed = Table("jobs", MetaData(), *(Column(name) for name in ("id", "run_id", "key")))
    _alter(connection, prompts, "RENAME TO prompts_before")
    prompts.create(connection)
    whole = select(old.c.job_id, keyed.c.run_id, keyed.c.key, old.c.chat, old.c.body)
    rows = whole.join_from(old, keyed, keyed.c.id == old.c.job_id)
    connection.execute(prompts.insert().from_select(["job_id", "run_id", "key", "chat", "body"], rows))
    old.drop(connection)
    for name, column in (("jobs_run_key", keyed.c.run_id), ("jobs_done_key", keyed.c.key)):
        Index(name, column).drop(connection)
    _alter(connection, jobs, "DROP COLUMN key")


# Before version 9, only the text of a pause showed its cause.
_CAUSES = {
    PauseCause.BUDGET: r"it may cost \$[^\n]* spent there is no room for a call",
    PauseCause.UNPRICED: r"its calls tell no cost: expected [^\n]*",
    PauseCause.OUTAGE: r"[^\n]+ could not be reached in [^\n]+ of waits: .*",
    PauseCause.SET_UP: r"all \d+ jobs? that were called failed alike: .*",
    PauseCause.ACCOUNT: r"[\w.]+: .*",  # the class of the error, or the provider's code
}
_MOVED = r"(moving to|moved to|moving from) (.*?)(?: \(was (?:paused: )?(.*)\))?"
_MOVING_TO = "moving_to"


def _cause_of(reason: str) -> PauseCause:
    causes = (cause for cause, words in _CAUSES.items() if re.fullmatch(words, reason, re.DOTALL))
    return next(causes, PauseCause.USER)


def _pause_of(state: str, reason: str) -> dict[str, str | None]:
    """Return the columns of a run that was paused for this reason."""
    moved = re.fullmatch(_MOVED, reason, re.DOTALL)
    if state == RunState.CANCELLED or moved is None:
        cause = PauseCause.REMOVING if state == RunState.CANCELLED else _cause_of(reason)
        return {"pause_cause": cause, "pause_message": reason}
    way, place, before = moved.groups()
    move = Move(place)
    if before is not None:
        cancelled = before == RunState.CANCELLED
        move = Move(place, RunState.CANCELLED) if cancelled else Move(place, RunState.PAUSED, _cause_of(before), before)
    return {
        "pause_cause": way.replace(" ", "_"),
        "pause_message": f"{way} {place}",
        "move": move.to_json(),
    }


def _name_causes(connection: Connection) -> None:
    if "pause_reason" not in _names(connection, "runs"):
        return
    old = Table("runs", MetaData(), *(Column(name) for name in ("id", "state", "pause_reason")))
    for row in connection.execute(select(old).where(old.c.pause_reason.is_not(None))).all():
        pause = _pause_of(row.state, row.pause_reason)
        connection.execute(update(runs).where(runs.c.id == row.id).values(pause))
    _alter(connection, runs, "DROP COLUMN pause_reason")


def _end_moves(connection: Connection) -> None:
    """Let runs that were being moved away rest here, as they were before, or paused: the same `lbr move` continues."""
    leaving = select(runs.c.id, runs.c.pause_message, runs.c.move).where(runs.c.pause_cause == _MOVING_TO)
    for row in connection.execute(leaving).all():
        state, pause = Move(**orjson.loads(row.move)).before
        if state is RunState.ACTIVE:
            state, pause = RunState.PAUSED, Paused(PauseCause.USER, row.pause_message)
        cause, message = (None, None) if pause is None else (pause.cause, pause.message)
        values = {"state": state, "pause_cause": cause, "pause_message": message, "move": None}
        connection.execute(update(runs).where(runs.c.id == row.id).values(values))


def _drop_writers(connection: Connection) -> None:
    Table("writers", MetaData()).drop(connection, checkfirst=True)


def _number_samples(connection: Connection) -> None:
    """Put the number of the sample into the primary key of the items; all that are there are the first, 0."""
    if "sample" in _names(connection, "items"):
        return
    if connection.dialect.name == "postgresql":
        key = "DROP CONSTRAINT items_pkey, ADD PRIMARY KEY (run_id, idx, sample)"
        _alter(connection, items, f"ADD COLUMN sample SMALLINT NOT NULL DEFAULT 0, {key}")
        _alter(connection, items, "ALTER COLUMN sample DROP DEFAULT")
        return
    names = [one.name for one in items.c if one.name != "sample"]
    old = Table("items_before", MetaData(), *map(Column, names))
    _alter(connection, items, "RENAME TO items_before")
    items.create(connection)
    rows = select(*old.c, literal_column("0")).order_by(old.c.run_id, old.c.idx)
    connection.execute(items.insert().from_select([*names, "sample"], rows))
    old.drop(connection)


MIGRATIONS: tuple[tuple[str, Callable[[Connection], None] | None], ...] = (
    ("create the tables", None),
    ("index the suspects", _index_suspects),
    ("keep keys beside prompts", _move_keys),
    ("share limits, price runs, set jobs apart", None),
    ("keep why answers of failed tries ended", None),
    ("add the share of refused calls and the highest cost of a call", None),
    ("note outages of models", None),
    ("keep the order of columns, and which ids are numbers", None),
    ("keep the cause of a pause apart from its message", _name_causes),
    ("let runs rest that were being moved away", _end_moves),
    ("forget the numbers of transactions on a server", _drop_writers),
    ("count cached tokens", None),
    ("keep reasoning, log probabilities and raw answers", None),
    ("number the samples of an input", _number_samples),
    ("count what each worker does in a minute", None),
    ("note which ends of runs were reported", None),
    ("send jobs in batches", _index_tried),
    ("index the failed jobs", lambda connection: failed.create(connection, checkfirst=True)),
    ("let a run's first call go alone", None),
)
"""Ordered and append-only: a database's version is the number of them that it has seen.

A step does what is left to do when the tables and columns that were missing are there, empty.
"""

LATEST = len(MIGRATIONS)


def applied_version(connection: Connection) -> int:
    """Return how many migrations the database has seen, 0 for an empty one."""
    if not inspect(connection).has_table("schema_version", schema=_schema_of(connection)):
        return 0
    versions = connection.execute(select(schema_version.c.version)).scalars().all()
    return max(versions, default=0)


def migrate(connection: Connection, now: int, dead_workers: Callable[[Iterable[WorkerId]], list[WorkerId]]) -> None:
    """Apply what is missing and record it, in the caller's transaction. Safe to repeat.

    Raises DatabaseError, and changes nothing, while workers of an older version report; `dead_workers` returns those
    of them that have ended.
    """
    if connection.dialect.name == "postgresql":
        set_postgresql_options()
    applied = applied_version(connection)
    if applied >= LATEST:
        return
    if applied:
        _check_no_workers(connection, now, dead_workers)
    metadata.create_all(connection)
    if applied:
        _add_missing(connection)
    for _, step in MIGRATIONS[applied:]:
        if step is not None:
            step(connection)
    steps = enumerate(MIGRATIONS[applied:], start=applied + 1)
    rows = [{"version": version, "name": name, "applied_at": now} for version, (name, _) in steps]
    connection.execute(insert(schema_version), rows)


def _check_no_workers(
    connection: Connection, now: int, dead_workers: Callable[[Iterable[WorkerId]], list[WorkerId]]
) -> None:
    seen = workers.c.seen_at.between(now - LIVE_MS, now + LIVE_MS)
    rows = connection.execute(select(workers).where(seen).order_by(workers.c.id)).all()
    ended = dead_workers([row.id for row in rows])
    live = [row for row in rows if row.id not in ended]
    if not live:
        return
    wait = max(row.seen_at for row in live) + LIVE_MS - now
    shown = ", ".join(f"{row.host}:{row.pid}" for row in live[:5])
    more = f" and {len(live) - 5} more" if len(live) > 5 else ""
    raise DatabaseError(
        f"workers of an older version are running on this queue ({shown}{more}), and this version must change its "
        f"tables; stop them first. If they were killed, run the same command again in {-(-wait // 1000)} s"
    )
