"""Why jobs of a run failed: in groups of the same kind, each with an example."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbr.api.arguments import checked
from lbr.api.status import printable
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.text import pluralize
from lbr.core.types import Report
from lbr.store import inputs, reads
from lbr.store.database import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lbr.core.types import PathOrUrl, Run
    from lbr.store.database import Database
    from lbr.store.inputs import FailedJob

FIRST_WORDS = 8
MAX_GROUPS = 1_000
"""Beyond that many groups, messages are no longer told apart, only errors."""
SHOWN = 200
_VARYING = re.compile(r"""\d+|"[^"]*"|'[^']*'""")


@dataclass(frozen=True, slots=True)
class FailureGroup(Report):
    """Failed jobs whose last errors have the same family, class and first words, numbers and quoted text aside.

    `message` is that of the first of them; `idx` and `sample` are its input.
    """

    family: str
    error: str
    message: str
    count: int
    idx: int
    sample: int


@checked
async def failures(
    run: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> list[FailureGroup]:
    """Return why jobs of a run failed, in groups of the same kind, the largest first."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        return await groups_of(database, await database.read(reads.find_run, run))


async def failed_jobs(
    run: str, *, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> AsyncIterator[FailedJob]:
    """Yield the failed jobs of a run in input order."""
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        async for page in inputs.failed_jobs(database, await database.read(reads.find_run, run)):
            for one in page:
                yield one


async def groups_of(database: Database, run: Run) -> list[FailureGroup]:
    """Return a run's failed jobs in groups, the largest first."""
    first: dict[tuple[str, str, str], FailedJob] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    async for page in inputs.failed_jobs(database, run):
        for one in page:
            kind = kind_of(one.family, one.error, one.message)
            if kind not in counts and len(counts) >= MAX_GROUPS:
                kind = (one.family, one.error, "")
            first.setdefault(kind, one)
            counts[kind] += 1
    found = ((first[kind], count) for kind, count in counts.most_common())
    return [FailureGroup(one.family, one.error, one.message, count, one.idx, one.sample) for one, count in found]


def kind_of(family: str, error: str, message: str) -> tuple[str, str, str]:
    """Return what failures of the same kind have in common: the message's first words, numbers and quoted text aside."""
    return family, error, " ".join(_VARYING.sub("#", message).split()[:FIRST_WORDS])


def kinds_of(groups: Sequence[FailureGroup]) -> str:
    """Return the families of failed jobs, with their numbers if there are several: `4 permanent, 2 bad answer`."""
    counts: Counter[str] = Counter()
    for one in groups:
        counts[one.family.replace("_", " ") or "unknown"] += one.count
    return ", ".join(f"{count} {family}" if len(counts) > 1 else family for family, count in counts.most_common())


def describe(run: str, groups: Sequence[FailureGroup]) -> str:
    """Return the report that `lbr failures` prints."""
    lines = [f"run {run}: {pluralize(sum(one.count for one in groups), 'job')} failed"]
    for one in groups:
        place = f"{one.idx}{f' --sample {one.sample}' if one.sample else ''}"
        lines += [
            "",
            f"{one.count} {one.family} {one.error}: {short(one.message)}",
            f"  example: `lbr show {run} {place}`",
        ]
    return "\n".join(map(printable, lines))


def describe_job(one: FailedJob) -> str:
    """Return a line about a failed job."""
    place = f"input {one.idx}{f', sample {one.sample}' if one.sample else ''}{f' (id {one.id})' if one.id else ''}"
    return printable(f"{place}: {one.family} {one.error}: {short(one.message)}")


def short(message: str) -> str:
    """Return the beginning of a message on one line."""
    line = " ".join(message.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
