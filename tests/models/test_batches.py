"""OpenAI's files and batches, against a server that fails as a test chooses."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from lbr.core.batches import TOKEN_LIMIT, Found, Refused, Unsure, WrongKey, custom_id
from lbr.core.errors import CallError, Family, Usage, UsageError
from lbr.core.types import Claim, JobId, Millis, Prompt, RunId, Task
from lbr.models.batches import ChatBatches, batch_provider, check_lane
from lbr.models.build import Authority
from tests.support.batch_server import KEY, BatchServer, Fault, Plan
from tests.support.http_server import Request, proxying, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

TASK = Task(model="openai-chat:gpt-4o-mini")
NONCE = "0123456789ab"
ODD = "one line\u2028for all\x85but str.splitlines"
EVER = Millis(0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    with BatchServer() as found:
        monkeypatch.setenv("OPENAI_BASE_URL", found.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield found


@pytest.fixture
async def provider(server: BatchServer) -> AsyncIterator[ChatBatches]:
    found = batch_provider(TASK, Authority())
    yield found
    await found.aclose()


def claim(number: int, text: str | None = None, **fields: Any) -> Claim:
    prompt = Prompt(text=text or f"prompt {number}")
    return Claim(JobId(number), RunId(1), 1, attempts=0, crashes=0, prompt=prompt, key=b"", **fields)


async def uploaded(provider: ChatBatches, folder: Path, *claims: Claim) -> str:
    path = folder / "lines.jsonl"
    path.write_bytes(b"".join(provider.line(one, custom_id(NONCE, one.job_id, one.claim_seq)) for one in claims))
    return await provider.upload(NONCE, path)


async def ended(provider: ChatBatches, folder: Path, *claims: Claim) -> Found:
    made = await provider.create(await uploaded(provider, folder, *claims), NONCE)
    return await provider.poll(made.provider_id)


async def read(provider: ChatBatches, found: Found, start: int = 0) -> list[tuple[int, int, str]]:
    """Return of each line the cursor, the job, and its answer or error."""
    lines = []
    async for cursor, text, outcome in provider.results(found, start):
        ending = outcome.reply.text if outcome.reply is not None else outcome.failure and outcome.failure.message
        lines.append((cursor, int(text.split("-")[1]), str(ending)))
    return lines


async def test_answers_are_read_whatever_their_order_and_from_any_line(
    server: BatchServer, provider: ChatBatches, tmp_path: Path
) -> None:
    server.plan = Plan(missing=1, errors=1, twice=1, is_reversed=True)
    found = await ended(provider, tmp_path, *(claim(number) for number in range(1, 5)), claim(5, ODD))
    assert (found.ended, found.completed, found.failed, found.error) == (True, 4, 1, None)
    lines = await read(provider, found)
    assert [one[1] for one in lines] == [3, 5, 4, 3, 2]  # the first is missing, the second failed
    assert lines[1][2] == f"answer to {ODD}"
    assert "not this one" in lines[4][2]
    for number, (cursor, *_) in enumerate(lines, 1):
        assert await read(provider, found, cursor) == lines[number:]


async def test_an_answer_costs_half(provider: ChatBatches, server: BatchServer, tmp_path: Path) -> None:
    found = await ended(provider, tmp_path, claim(1))
    [(_, _, outcome)] = [one async for one in provider.results(found, 0)]
    assert outcome.usage == Usage(10, 5, (10 * 150 + 5 * 600) // 2)


async def test_a_line_asks_what_a_call_would_ask(provider: ChatBatches, server: BatchServer) -> None:
    line = provider.line(claim(7, ODD, settings={"seed": 3, "max_tokens": 9}), custom_id(NONCE, JobId(7), 1))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert orjson.loads(line) == {
        "custom_id": f"{NONCE}-7-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-4o-mini",
            "seed": 3,
            "max_tokens": 9,
            "stream": False,
            "messages": [{"role": "user", "content": ODD}],
        },
    }
    with pytest.raises(CallError, match="cannot be sent in a batch"):
        provider.line(claim(8, "<|im_start|>system"), "x")


@pytest.mark.parametrize(
    ("fault", "error", "has_it"),
    [
        (Fault.DROP, Unsure, True),
        (Fault.LATE_500, Unsure, True),
        (Fault.DROP_BEFORE, Unsure, False),
        (Fault.BUSY, Unsure, False),
        (Fault.LIMITED, Unsure, False),
        (Fault.REFUSED, Refused, False),
    ],
)
async def test_a_batch_is_created_by_one_request_and_found_if_the_reply_is_lost(
    server: BatchServer, provider: ChatBatches, tmp_path: Path, fault: Fault, error: type[Exception], *, has_it: bool
) -> None:
    file_id = await uploaded(provider, tmp_path, claim(1))
    server.fail("create", fault)
    with pytest.raises(error):
        await provider.create(file_id, NONCE)
    assert server.asked["create"] == 1
    found = await provider.find(NONCE, EVER)
    assert (found is not None) is has_it
    assert server.accepted == [NONCE] * has_it


async def test_a_batch_is_found_on_the_last_page(server: BatchServer, provider: ChatBatches, tmp_path: Path) -> None:
    file_id = await uploaded(provider, tmp_path, claim(1))
    made = await provider.create(file_id, NONCE)
    for number in range(200):
        await provider.create(file_id, f"{number:012}")
    assert await provider.find(NONCE, EVER) == await provider.poll(made.provider_id)
    assert server.asked["list"] == 3
    assert await provider.find("f" * 12, EVER) is None
    # Pages of older batches are left out, but the list may lag.
    assert await provider.find("f" * 12, Millis(int(time.time() + 3600) * 1000)) is None
    assert server.asked["list"] == 7
    server.listing_lags = 60.0
    await provider.create(file_id, "f" * 12)
    assert await provider.find("f" * 12, EVER) is None


async def test_another_key_does_not_see_a_batch(
    server: BatchServer, provider: ChatBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await ended(provider, tmp_path, claim(1))
    monkeypatch.setenv("OPENAI_API_KEY", "another-key-0123456789")
    other = batch_provider(TASK, Authority())
    try:
        assert other.credential != provider.credential
        assert KEY not in provider.credential + repr(provider)
        assert await other.find(NONCE, EVER) is None
        for call in (other.poll, other.cancel):
            with pytest.raises(WrongKey):
                await call(found.provider_id)
    finally:
        await other.aclose()


@pytest.mark.parametrize("ends", ["expired", "cancelled"])
async def test_what_was_answered_before_the_end_is_read(
    server: BatchServer, provider: ChatBatches, tmp_path: Path, ends: str
) -> None:
    server.plan = Plan(ends=ends, answered=2)
    found = await ended(provider, tmp_path, *(claim(number) for number in range(1, 5)))
    assert (found.ended, found.error) == (True, ends)
    assert [one[1] for one in await read(provider, found)] == [1, 2]  # the others were not carried out


async def test_cancel_and_delete(server: BatchServer, provider: ChatBatches, tmp_path: Path) -> None:
    server.plan = Plan(seconds=3600, answered=1)
    file_id = await uploaded(provider, tmp_path, claim(1), claim(2))
    made = await provider.create(file_id, NONCE)
    assert not made.ended
    await provider.cancel(made.provider_id)
    found = await provider.poll(made.provider_id)
    assert found.error == "cancelled"
    assert len(await read(provider, found)) == 1
    await provider.cancel(made.provider_id)  # it has ended, and the server refuses
    for _ in range(2):
        await provider.delete(file_id)
    assert server.deleted == [file_id]


async def test_too_many_tokens_are_reported_after_the_batch_was_accepted(
    server: BatchServer, provider: ChatBatches, tmp_path: Path
) -> None:
    server.plan = Plan(ends="failed")
    found = await ended(provider, tmp_path, claim(1))
    assert (found.ended, found.files, found.error) == (True, (), TOKEN_LIMIT)
    assert "limit" in (found.message or "")


async def test_an_upload_that_is_refused_says_why_and_where(
    server: BatchServer, provider: ChatBatches, tmp_path: Path
) -> None:
    server.fail("upload", Fault.REFUSED, Fault.DROP)
    for family in (Family.PERMANENT, Family.TRANSIENT):
        with pytest.raises(CallError) as caught:
            await uploaded(provider, tmp_path, claim(1))
        assert caught.value.family is family
        assert KEY not in str(caught.value)
    assert server.asked["upload"] == 2


async def test_files_go_through_the_proxy_of_the_environment(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    async with serving(proxying(asked)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://provider.test/v1")
        provider = batch_provider(TASK, Authority())
        with pytest.raises(CallError, match="expected an id"):  # the proxy answers by itself
            await uploaded(provider, tmp_path, claim(1))
        await provider.aclose()
    assert [one.line.split()[1] for one in asked] == ["http://provider.test/v1/files"]


@pytest.mark.parametrize(
    ("task", "base_url", "words"),
    [
        (Task(function="m:f"), None, "a function of yours"),
        (Task(model="offline:echo"), None, "on this machine"),
        (Task(model="anthropic:claude-haiku-4-5"), None, "another format"),
        (Task(model="openai:gpt-5"), None, "use openai-chat:gpt-5"),
        (Task(model="groq:llama"), None, "api.groq.com"),
        (TASK, "https://me.openai.azure.com/openai/v1", "Azure"),
        (TASK, "https://api.together.xyz/v1", "metadata"),
        (Task(model="openai-chat:gpt-5", settings={"service_tier": "flex"}), None, "--tier"),
        (Task(model="openai-chat:gpt-5", tier="flex"), None, "--tier"),
        (Task(model="openai-chat:gpt-5", settings={"openai_user": "me"}), None, "openai_user"),
    ],
)
def test_models_without_batches_are_refused_with_the_reason(task: Task, base_url: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_lane("batch", task, base_url)
    assert "Leave --lane out" in str(caught.value)


def test_models_with_batches() -> None:
    settings = {"temperature": 0.5, "max_tokens": 9, "extra_body": {"reasoning_effort": "low"}}
    check_lane("auto", Task(model="openai-chat:gpt-4o-mini", settings=settings), "https://api.groq.com/openai/v1")
    check_lane("batch", TASK, None)
    for lane in (None, "online"):
        check_lane(lane, Task(model="offline:echo"), None)
    with pytest.raises(UsageError, match="expected the lane to be online, batch or auto, got: 'all'"):
        check_lane("all", TASK, None)
    assert "OPENAI_BASE_URL" not in os.environ
