"""From claimed rows to claims: the prompts and the past that a worker needs to make the calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
from sqlalchemy import case, select

from lbr.errors import DatabaseError, Family
from lbr.jobs import NO_HISTORY, BadTry, Claim, History, JobId, Millis, Prompt, RunId
from lbr.store.arrays import among
from lbr.store.schema import attempts, prompts

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from lbr.jobs import Json
    from lbr.store.schema import AnyRow

_PROMPTS = select(prompts.c.job_id, prompts.c.key, prompts.c.body, prompts.c.chat, prompts.c.settings).where(
    among(prompts.c.job_id, "ids")
)
_TRIES = (
    select(attempts.c.job_id, attempts.c.claim_seq, attempts.c.family, attempts.c.message, attempts.c.at)
    .add_columns(case((attempts.c.family == Family.BAD_ANSWER, attempts.c.text)).label("text"))
    .where(among(attempts.c.job_id, "ids"))
    .order_by(attempts.c.id)
)


async def with_prompts(connection: AsyncConnection, rows: list[AnyRow], now: Millis) -> list[Claim]:
    """Read, in the claim's own transaction, what its worker needs to make the calls."""
    if not rows:
        return []
    found = (await connection.execute(_PROMPTS, {"ids": [row.id for row in rows]})).all()
    by_id = {row.job_id: row for row in found}
    tried = [row for row in rows if row.claim_seq > row.retry_seq + 1]
    histories = await _histories(connection, tried, now)
    for row in rows:
        if row.id not in by_id:
            raise DatabaseError(
                f"expected a prompt for job {row.id}, got: none; the database was changed by hand"
            )
    return [
        Claim(
            job_id=JobId(row.id),
            run_id=RunId(row.run_id),
            claim_seq=row.claim_seq,
            attempts=row.attempts,
            crashes=row.crashes,
            key=by_id[row.id].key,
            prompt=Prompt.from_body(by_id[row.id].body, chat=bool(by_id[row.id].chat)),
            history=histories.get(row.id, NO_HISTORY),
            settings=_settings(by_id[row.id].settings),
        )
        for row in sorted(rows, key=lambda row: row.id)
    ]


def _settings(text: str | None) -> dict[str, Json] | None:
    if text is None:
        return None
    try:
        settings = orjson.loads(text)
    except orjson.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise DatabaseError(f"expected the stored settings of a job to be an object, got: {text[:200]!r}")
    return settings


async def _histories(connection: AsyncConnection, rows: list[AnyRow], now: Millis) -> dict[int, History]:
    if not rows:
        return {}
    since = {row.id: row.retry_seq for row in rows}
    tries = (await connection.execute(_TRIES, {"ids": list(since)})).all()
    by_job: dict[int, list[AnyRow]] = {}
    for one in tries:
        if one.claim_seq > since[one.job_id]:
            by_job.setdefault(one.job_id, []).append(one)
    return {job_id: _history(group, now) for job_id, group in by_job.items()}


def _history(tries: list[AnyRow], now: Millis) -> History:
    bad = [t for t in tries if t.family == Family.BAD_ANSWER]
    limited = [t for t in tries if t.family == Family.RATE_LIMITED]
    return History(
        bad_answers=len(bad),
        limited_tries=len(limited),
        limited_ms=max(0, now - limited[0].at) if limited else 0,
        last_bad=BadTry(bad[-1].text or "", bad[-1].message) if bad else None,
    )
