"""The view of runs: what it shows at each moment that matters, at 80 and at 120 columns."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import lbr
from lbr.api.draw import frame
from lbr.api.status import RunStatus, Status
from lbr.api.view import Watch, money, reason_of, short, span

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "openai-chat:gpt-4o-mini"
NOW = 1_800_000_000.0
LIMIT: dict[str, Any] = {
    "answerer": MODEL,
    "rpm": None,
    "tpm": None,
    "concurrency": None,
    "at_a_time": 6,
    "slots": 32,
    "inflight": 6,
}
COOLING = {"answerer": MODEL, "seconds": 12.3, "reason": "429: slow down"}
AWAY = {"answerer": MODEL, "seconds": 300.0, "probe_seconds": 20.0, "reason": "Connection refused"}
WORKER = {"host": "a", "pid": 1, "concurrency": 32}
STOPPING = "stopping: finishing the calls in flight (at most 28 s more); press Ctrl-C again to give them back at once"


@pytest.fixture
async def start() -> RunStatus:
    """Return the status of a large run whose first calls have just begun."""
    await lbr.enqueue(["a"], run="reviews", model="offline:echo")
    (one,) = (await lbr.status("reviews")).runs
    return replace(one, answerer=MODEL, jobs=10_000, pending=9_968, inflight=32, max_cost_usd=5.0)


def later(start: RunStatus) -> RunStatus:
    """Return a status from the middle of the run."""
    used: dict[str, Any] = {"input_tokens": 1_234_567, "output_tokens": 310_222, "cost_usd": 1.2345678}
    errors = {"rate_limited": 812, "transient": 14}
    return replace(start, done=4_310, failed=11, pending=5_647, errors=errors, retrying=3, per_minute=414.0, **used)


def seen(
    *runs: RunStatus, cooldowns: Sequence[Any] = (), outages: Sequence[Any] = (), limits: Sequence[Any] = ()
) -> Status:
    """Return what a look at the queue returns."""
    return Status(list(runs), [WORKER], list(cooldowns), list(outages), list(limits))


def drawn(status: Status, width: int = 80, **more: Any) -> str:
    """Return the frame of a command that began ten minutes ago."""
    watch = Watch()
    views = [watch.view(status, one, watch.started + 629, NOW) for one in status.runs]
    lines = frame(views, width=width, **more)
    assert max(line.cell_len for line in lines) <= width
    return "\n".join(line.plain for line in lines)


def test_the_first_moment(start: RunStatus) -> None:
    """Nothing is answered yet, but calls are made."""
    assert (
        drawn(seen(start))
        == f"""\
reviews  {"─" * 51}    0 %  0 of 10,000
  0 done · 32 in flight · $0.00 of $5.00
  elapsed 10 min 29 s"""
    )


@pytest.mark.parametrize(("width", "done"), [(80, 20), (120, 37)])
def test_rate_limits(start: RunStatus, width: int, done: int) -> None:
    """The view says until when the model is not called, and how many calls at a time it takes."""
    shown = drawn(seen(later(start), cooldowns=[COOLING], limits=[LIMIT]), width)
    assert (
        shown
        == f"""\
reviews  {"━" * done}{"─" * (width - 33 - done)}   43 %  4,321 of 10,000
  4,310 done · 11 failed · 3 retrying · 32 in flight · $1.23 of $5.00
  414/min · elapsed 10 min 29 s · 13 min 43 s left · tokens 1.2M in, 310k out
  failed attempts: 812 rate limited, 14 transient
  rate limited, next call in 12 s, 6 of 32 at a time"""
    )


def test_a_server_that_is_away(start: RunStatus) -> None:
    """Since when, why, and when the next try is; nobody knows when the run will end."""
    since = time.strftime("%H:%M", time.localtime(NOW - 300))
    tail = "  failed attempts: 812 rate limited, 14 transient\n"
    status = seen(later(start), outages=[AWAY])
    head, _, reason = drawn(status).partition(tail)
    assert " left" not in head
    assert reason == f"  {MODEL} unreachable since {since} (Connection refused), next try\n  in 20 s"
    assert drawn(status, 120).endswith(f"{MODEL} unreachable since {since} (Connection refused), next try in 20 s")


def test_a_budget_that_is_used_up(start: RunStatus) -> None:
    """The view names the command that lets the run go on."""
    pause: dict[str, Any] = {"state": "paused", "pause_cause": "budget", "pause_message": "it has cost $5.01 of $5.00"}
    shown = drawn(seen(replace(later(start), inflight=0, **pause)))
    assert " left" not in shown
    assert shown.endswith("""
  paused: it has cost $5.01 of $5.00; `lbr resume reviews --max-cost DOLLARS`
  lets it cost more""")


def test_a_drain(start: RunStatus) -> None:
    """Ctrl-C: what happens next, what a second one does; messages that came again are counted."""
    note = "3 times: lost job 12: its lease ran out and it was reclaimed"
    shown = drawn(seen(later(start)), notes=[note], last=STOPPING)
    assert shown.endswith(f"""
  {note}
  stopping: finishing the calls in flight (at most 28 s more); press Ctrl-C
  again to give them back at once""")


def test_the_end(start: RunStatus) -> None:
    """All jobs have ended, which is shown without a time that is left."""
    end = replace(later(start), done=9_989, pending=0, retrying=0, inflight=0, finished=True)
    first, *_ = shown = drawn(seen(end)).splitlines()
    assert first == f"reviews  {'━' * 46}  100 %  10,000 of 10,000"
    assert shown[2] == "  414/min · elapsed 10 min 29 s · tokens 1.2M in, 310k out"


def test_a_line_for_each_of_several_runs(start: RunStatus) -> None:
    """Those at work come first; narrow terminals show fewer columns, short ones fewer runs."""
    middle = later(start)
    wide = "日本語の名前" * 5
    runs = (replace(start, run="b", inflight=0), replace(start, run=wide), middle)
    shown = drawn(seen(*runs, outages=[AWAY]), 120)
    assert shown.count("unreachable") == 3
    lines = [line for line in shown.splitlines() if "%" in line]
    assert [line[:1] for line in lines] == ["日", "r", "b"]
    assert lines[1].endswith("43 %  4,321/10,000  11 failed  414/min  $1.23 of $5.00")
    assert drawn(seen(*runs)).splitlines()[1].endswith("43 %  4,321/10,000  11 failed  13 min 43 s left")
    many = drawn(seen(*(replace(middle, run=f"r{n}") for n in range(30))), height=16)
    assert (len(many.splitlines()), many.splitlines()[-1]) == (11, "and 20 more runs")


def test_bars_without_colours_and_in_ascii(start: RunStatus) -> None:
    """What is done differs from what is called and what is left; text of others controls nothing."""
    some = replace(start, run="r\x1b[2J", jobs=100, done=50, failed=10, inflight=20, pending=20)
    away = AWAY | {"reason": "\x1b]0;x\x07 gone"}
    assert "━" * 31 + "╍" * 10 + "─" * 11 in drawn(seen(some))
    shown = drawn(seen(some, outages=[away]), ascii_only=True)
    assert "#" * 26 + "x" * 5 + "=" * 10 + "-" * 11 in shown
    assert shown.isascii()
    assert "\x1b" not in shown


def test_reasons(start: RunStatus) -> None:
    """Why a run waits, in the order of what the user can do about it."""
    middle = replace(later(start), inflight=6)

    def reason(run: RunStatus, **more: Any) -> str | None:
        return reason_of(seen(run, **more), run, NOW)

    assert reason(middle) is None
    assert reason(middle, limits=[LIMIT]) == "rate limited, 6 of 32 at a time"
    assert reason(replace(middle, errors={}), limits=[LIMIT]) == "starting slowly, 6 of 32 at a time"
    assert reason(middle, cooldowns=[COOLING]) == "rate limited, next call in 12 s (429: slow down)"
    slow = LIMIT | {"at_a_time": None, "rpm": 60, "tpm": 10_000}
    assert reason(middle, limits=[slow]) == "limited to 60 requests a minute, 10,000 tokens a minute"
    probing = AWAY | {"probe_seconds": 0.0}
    assert str(reason(middle, outages=[probing], cooldowns=[COOLING])).endswith("(Connection refused), trying now")
    unserved = replace(middle, inflight=0)
    assert reason(replace(unserved, pending=3)) == "waiting to try 3 failed calls again"
    nobody = replace(seen(unserved), workers=[])
    assert reason_of(nobody, unserved, NOW) == "no worker is running; `lbr worker` starts one"
    assert reason_of(nobody, unserved, NOW, at_work=True) is None
    assert str(reason(replace(unserved, pending=0, sealed=False))).startswith("waiting for its other inputs")
    assert reason(replace(middle, state="cancelled")) is None
    long = reason(middle, cooldowns=[COOLING | {"reason": "x" * 900}])
    assert len(str(long)) < 200


def test_a_rate_is_of_the_latest_minute(start: RunStatus) -> None:
    """Answers of other runs, answers that were reused, and what was long ago do not count."""
    watch = Watch()
    base = replace(start, done=100, reused=100)

    def rate(done: int, at: float) -> float | None:
        return watch.view(seen(base), replace(base, done=done), at, NOW).per_minute

    assert [rate(100, 0), rate(100, 1), rate(110, 11), rate(120, 21)] == [None, None, 60, 60]
    assert [rate(120, at) for at in (61, 90, 160)] == [20, None, None]
    assert watch.view(seen(base), replace(base, per_minute=120.0), 170, NOW).per_minute == 120


def test_a_line_for_a_log(start: RunStatus) -> None:
    """The same in one line."""
    view = Watch().views(seen(later(start), limits=[LIMIT]))[0]
    expected = "reviews: 4,321 of 10,000 (43 %), 11 failed, 3 retrying, 32 in flight, 414/min, 13 min 43 s left, $1.23 of $5.00"
    assert view.line == f"{expected}; rate limited, 6 of 32 at a time"


def test_numbers_in_few_characters() -> None:
    """Counts, dollars and times as a view shows them."""
    assert [short(n) for n in (0, 999, 1_000, 12_345, 999_999, 4_100_000, 7 * 10**11)] == [
        *("0", "999", "1.0k", "12.3k", "999k", "4.1M", "700G")
    ]
    assert [money(n) for n in (0, 0.000004, 0.0123, 0.1, 1.239, 12_345.6)] == [
        *("$0.00", "$0.000004", "$0.012", "$0.10", "$1.24", "$12,345.60")
    ]
    assert [span(n) for n in (0.2, 59.4, 59.6, 61, 7_800)] == ["0 s", "59 s", "1 min 00 s", "1 min 01 s", "2 h 10 min"]
