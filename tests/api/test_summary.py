"""How runs ended, in at most five lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import lbr
from lbr.api import summary
from lbr.api.failures import FailureGroup
from lbr.api.summary import Ending
from lbr.worker.calls import WorkReport

if TYPE_CHECKING:
    from lbr.api.status import RunStatus
    from tests.support import Cli

BAD = FailureGroup("bad_answer", "BadAnswer", "no field n\nin it \x1b[2J", 4, 3, 0)
REFUSED = FailureGroup("permanent", "BadRequest", "400: too long", 2, 7, 0)


async def status_of(db_url: str, *names: str) -> list[RunStatus]:
    """Have a run for each name answered, and return their numbers."""
    for name in names:
        await lbr.prompt_map(
            [f"{name}1", f"{name}2"], model="offline:echo", price="in=1,out=1", run=name, db_url=db_url
        )
    return (await lbr.status(db_url=db_url)).runs


async def test_the_lines_of_one_run(db_url: str) -> None:
    """What was answered, failed and cut off, with the commands that help; a hostile message stays on its line."""
    (now,) = await status_of(db_url, "r")
    assert Ending(now).line(64.2) == "run r: 2 of 2 jobs done in 1 min 04 s; tokens 2 in, 2 out, cost $0.000004"
    assert Ending(now).problems() == []
    bad = Ending(replace(now, jobs=9, failed=6, pending=1, cost_usd=None), [BAD, REFUSED])
    assert bad.line(2) == "run r: 2 of 9 jobs done, 1 unfinished in 2.0 s; tokens 2 in, 2 out"
    failed, cut = bad.problems(3, limited=True)
    assert failed == (
        "6 failed (4 bad answer, 2 permanent), most often: no field n in it \\x1b[2J; `lbr failures r` shows why, "
        "`lbr retry r` puts them back"
    )
    assert cut == (
        "3 answers cut off at max_tokens; to redo: `lbr retry r --where finish_reason=length --set max_tokens=NUMBER`"
    )
    status = replace(
        bad.status, failed=2, finished=False, state="paused", pause_cause="budget", pause_message="it has cost $1"
    )
    assert Ending(status, [REFUSED]).all_in_one(3) == (
        "run r: 2 of 9 jobs done, 1 unfinished in 3.0 s; tokens 2 in, 2 out; 2 failed (permanent): 400: too long; "
        "`lbr failures r` shows why, `lbr retry r` puts them back; run r is paused: it has cost $1; "
        "`lbr resume r --max-cost DOLLARS` lets it cost more"
    )


@pytest.mark.slow
async def test_a_worker_of_many_runs_says_what_matters(db_url: str) -> None:
    """One line each, those with a problem first, and no more than fit; a run on which nothing was done has none."""
    names = ["a", "b", "c", "d", "e"]
    await status_of(db_url, *names)
    await lbr.enqueue(["later"], run="e", append=True, model="offline:echo", db_url=db_url)
    await lbr.pause("e", db_url=db_url)
    report = WorkReport(by_run=Counter(dict.fromkeys(names, 2)))
    found = await summary.work_lines(report, 1.0, db_url=db_url)
    lines = [line for line, _ in found]
    assert [is_problem for _, is_problem in found] == [True, False, False, False]
    assert [line[:27] for line in lines[:3]] == [
        "run e: 2 of 3 jobs done, 1 ",
        "run a: 2 of 2 jobs done; to",
        "run b: 2 of 2 jobs done; to",
    ]
    assert lines[0].endswith("; run e is paused: by the user; `lbr resume e` lets it go on")
    assert lines[3:] == ["and 2 more runs; `lbr list` shows them"]


def test_commands_end_with_the_same_lines(cli: Cli) -> None:
    """`lbr worker`, with processes as well, and `lbr run`: what is left to do is said once, on stderr."""
    (cli.folder / "in.txt").write_text("a\nb\nc\n")
    flags = ("--model", "offline:echo", "--set", "failure_rate=1", "--max-attempts", "1")
    cli("enqueue", "in.txt", *flags)
    failed = (
        "lbr: 3 failed (transient): failed, by the setting failure_rate; `lbr failures in` shows why, `lbr retry in`"
    )
    for more in (), ("--processes", "2"):
        told = cli("worker", *more, check=False).stderr.splitlines()
        assert told[-2].startswith("lbr: run in: 0 of 3 jobs done in ")
        assert (told[-1].startswith(failed), sum("`lbr failures" in line for line in told)) == (True, 1)
        cli("retry", "in")
    ran = cli("run", "in.txt", *flags, "-o", "out.csv", check=False)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert [line[:20] for line in ran.stderr.splitlines()[-3:]] == [
        "lbr: run in: 0 of 3 ",
        "lbr: 3 failed (trans",
        "lbr: 3 rows in out.c",
    ]
