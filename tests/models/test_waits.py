"""What a provider's headers say about when to come again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr.models.waits import wait_of

NOW = 1_800_000_000.0
"""2027-01-15 08:00:00 UTC."""


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2),
        ({"retry-after": "2", "x-ratelimit-reset-requests": "6m0s"}, 2),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-requests": "1d2h"}, 93_600),
        ({"x-ratelimit-reset-tokens": "12"}, 12),
        ({"anthropic-ratelimit-requests-reset": "2027-01-15T08:00:12Z"}, 12),
        ({"anthropic-ratelimit-input-tokens-reset": "2027-01-15T09:00:12+01:00"}, 12),
        ({"anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:12"}, 12),
        ({"X-RateLimit-Reset": "1800000060000"}, 60),
        ({"X-RateLimit-Reset": "1800000060"}, 60),
        ({"RateLimit-Reset": "45"}, 45),
    ],
)
def test_every_way_to_name_a_wait(headers: Any, wait: Any) -> None:
    """Seconds, milliseconds, durations, dates and points in time are read, by any spelling of the header's name."""
    assert wait_of(headers, NOW) == pytest.approx(wait)


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"content-type": "application/json"},
        {"retry-after": ""},
        {"retry-after": "later"},
        {"retry-after": "-3"},
        {"retry-after": "inf"},
        {"retry-after": "nan"},
        {"retry-after": "Fri, 15 Jan 2027 07:59:30 GMT"},
        {"retry-after": "Fri, 99 Jan 2027 07:59:30 GMT"},
        {"retry-after-ms": "-1"},
        {"x-ratelimit-reset-requests": "6 minutes"},
        {"x-ratelimit-reset-requests": "6m0"},
        {"x-ratelimit-reset-requests": "0s"},
        {"X-RateLimit-Reset": "1700000000000"},
        {"X-RateLimit-Reset": "1700000000"},
        {"anthropic-ratelimit-requests-reset": "2027-01-15T07:00:00Z"},
        {"anthropic-ratelimit-requests-reset": "0001-01-01T00:00:00+23:00"},
        {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"},
    ],
)
def test_nonsense_and_the_past_say_nothing(headers: Any) -> None:
    """What cannot be read, and what is over, is as if it were not there."""
    assert wait_of(headers, NOW) is None


def openai(**left: Any) -> dict[str, str]:
    """Return OpenAI's headers: requests are back in 2 minutes, tokens in 3 seconds."""
    resets = {"requests": "2m0s", "tokens": "3s"}
    return {f"x-ratelimit-reset-{what}": reset for what, reset in resets.items()} | {
        f"x-ratelimit-remaining-{what}": str(count) for what, count in left.items()
    }


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        (openai(), 120),
        (openai(requests=59, tokens=0), 3),
        (openai(requests=0, tokens=100), 120),
        (openai(requests=0, tokens=0), 120),
        (openai(requests=7, tokens=12), 120),
        (openai(requests="many", tokens=0), 3),
        (openai(tokens=0) | {"x-ratelimit-reset-tokens": "nonsense"}, 120),
        (
            {
                "anthropic-ratelimit-requests-remaining": "49",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:10:00Z",
                "anthropic-ratelimit-output-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2027-01-15T08:00:04Z",
            },
            4,
        ),
        (
            {
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": "1800000009000",
                "RateLimit-Remaining": "3",
                "RateLimit-Reset": "50",
            },
            9,
        ),
    ],
)
def test_what_is_used_up_decides(headers: Any, wait: Any) -> None:
    """Only the resets of what is used up count where that is told; else the latest of all."""
    assert wait_of(headers, NOW) == pytest.approx(wait)


@given(
    st.dictionaries(
        st.sampled_from(
            ["retry-after", "retry-after-ms", "x-ratelimit-reset", "anthropic-ratelimit-tokens-reset"]
        ),
        st.one_of(
            st.text("0123456789.:-+TZmshd eE", max_size=30),
            st.floats().map(str),
            st.integers().map(str),
            st.datetimes().map(str),
        ),
    )
)
def test_no_header_can_break_it(headers: Any) -> None:
    """Whatever a server sends, the wait is a time in the future or none."""
    wait = wait_of(headers, NOW)
    assert wait is None or wait > 0
