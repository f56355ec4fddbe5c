"""Groups of failed jobs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import lbr
from lbr.api import failures
from lbr.store import inputs
from lbr.store.inputs import FailedJob

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import pytest


def grouped(
    monkeypatch: pytest.MonkeyPatch, jobs: Sequence[tuple[str, str, str]]
) -> list[tuple[int, str, str, str, int]]:
    """Return the groups of failed jobs with these families, errors and messages."""

    async def pages(_database: object, _run: object) -> AsyncIterator[list[FailedJob]]:
        for idx, (family, error, message) in enumerate(jobs):
            yield [FailedJob(idx, 0, None, family, error, message)]

    monkeypatch.setattr(inputs, "failed_jobs", pages)
    found = asyncio.run(failures.groups_of(None, None))  # type: ignore[arg-type]
    return [(one.count, one.family, one.error, one.message, one.idx) for one in found]


def test_messages_that_begin_alike_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, quoted text and what follows may differ; family and error may not. The largest group comes first."""
    long = "the input of {} tokens is longer than 'm-{}' reads, which is {}"
    jobs = [
        ("permanent", "BadRequest", "400: refused"),
        ("permanent", "BadRequest", long.format(9123, 1, "a")),
        ("permanent", "BadRequest", long.format(8, 2, "b")),
        ("permanent", "TooLong", long.format(8, 2, "b")),
        ("transient", "TooLong", "two\n  lines"),
        ("transient", "TooLong", "two lines"),
        ("", "", ""),
    ]
    assert grouped(monkeypatch, jobs) == [
        (2, "permanent", "BadRequest", long.format(9123, 1, "a"), 1),
        (2, "transient", "TooLong", "two\n  lines", 4),
        (1, "permanent", "BadRequest", "400: refused", 0),
        (1, "permanent", "TooLong", long.format(8, 2, "b"), 3),
        (1, "", "", "", 6),
    ]


def test_messages_that_all_differ_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a number of groups on, jobs are grouped by their error alone."""
    monkeypatch.setattr(failures, "MAX_GROUPS", 3)
    jobs = [("permanent", "BadRequest", word) for word in "abcdefgh"]
    found = grouped(monkeypatch, jobs)
    assert (len(found), found[0][0], sum(one[0] for one in found)) == (4, 5, 8)


async def test_a_run_without_failures_has_no_group(db_url: str) -> None:
    """One with a failed job has it, with the first of its inputs."""

    async def answer(prompt: str) -> str:
        if prompt == "bad":
            raise lbr.Permanent("no answer to this")
        return prompt

    for run, prompts in (("good", ["a"]), ("mixed", ["a", "bad", "b", "bad"])):
        await lbr.prompt_map(prompts, answer, run=run, db_url=db_url, progress_every=0, max_attempts=1)
    assert await lbr.failures("good", db_url=db_url) == []
    (one,) = await lbr.failures("mixed", db_url=db_url)
    assert one.to_dict() == {
        "family": "permanent",
        "error": "Permanent",
        "message": "no answer to this",
        "count": 1,
        "idx": 1,
        "sample": 0,
    }
    assert failures.describe("mixed", [one]).splitlines()[-1].endswith("`lbr show mixed 1`")
    assert failures.kinds_of([one]) == "permanent"
