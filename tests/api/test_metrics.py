"""The metrics of a queue, read by Prometheus's own parser."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import TYPE_CHECKING

import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

import lbr
from lbr.api.metrics import render
from lbr.core.errors import Family, UsageError
from lbr.core.types import Failure, Task
from lbr.store import reads, runs
from lbr.store.settle import settle
from tests.support import Queue, answered, eventually, failed, put

if TYPE_CHECKING:
    from lbr.store.database import Database
    from tests.support import Cli, Clock

TRANSIENT = Failure(Family.TRANSIENT, "ServerError", "a secret prompt")
HOSTILE = 'a "run" \\ {of}, mine'


def samples(text: str) -> dict[str, float]:
    """Return every sample by its name and labels, checked by the parser."""
    families = list(text_string_to_metric_families(text))
    assert all(one.documentation and one.type in {"gauge", "counter"} for one in families)
    found = [sample for one in families for sample in one.samples]
    return {f"{one.name}{sorted(one.labels.items())}": one.value for one in found}


def value(text: str, name: str, **labels: str) -> float:
    """Return one sample."""
    return samples(text)[f"{name}{sorted(labels.items())}"]


async def test_metrics_show_the_whole_queue_and_no_prompt(database: Database, clock: Clock) -> None:
    """Names are escaped; no prompt, answer or message is there."""
    run = await put(database, ["a secret prompt", "b", "c"], name=HOSTILE, task=Task(model="offline:echo"))
    queue = Queue(database)
    worker = await queue.register(host="a", pid=1, concurrency=4)
    claims = await queue.claim(worker, [run.id], 2, lease=60)
    await database.write(settle, [answered(claims[0], "a secret answer"), failed(claims[1], TRANSIENT)])
    await queue.claim(worker, [run.id], 1, lease=60)
    text = render(await database.read(reads.overview))
    assert value(text, "lbr_jobs", run=HOSTILE, state="done") == 1
    assert value(text, "lbr_jobs", run=HOSTILE, state="inflight") == 1
    assert value(text, "lbr_jobs", run=HOSTILE, state="pending") == 1
    assert value(text, "lbr_answers_total", run=HOSTILE) == 1
    assert value(text, "lbr_failed_attempts_total", run=HOSTILE, family="transient") == 1
    assert value(text, "lbr_failed_attempts_total", run=HOSTILE, family="outage") == 0
    assert value(text, "lbr_workers") == 1
    named = {"run": HOSTILE, "model": "offline:echo", "pause_cause": ""}
    assert value(text, "lbr_run_info", **named, state="active") == 1
    await database.write(runs.pause, run, "a secret reason")
    text = render(await database.read(reads.overview))
    assert value(text, "lbr_run_info", **named | {"pause_cause": "user"}, state="paused") == 1
    assert "secret" not in text


async def test_limits_and_waits_of_models_are_shown(db_url: str) -> None:
    """An empty queue, and one with a cooldown, are both read."""

    async def busy(text: str) -> str:
        raise lbr.RetryLater(50)

    await lbr.enqueue([str(n) for n in range(8)], function=busy, run="r", db_url=db_url)
    found: list[str] = []
    urls: list[str] = []
    workers: list[lbr.Worker] = []
    work = asyncio.create_task(
        lbr.work(functions=[busy], db_url=db_url, metrics=0, notify=urls.append, on_start=workers.append)
    )
    async with asyncio.timeout(30), ClientSession() as session:
        while not any("lbr_cooldown_seconds{" in one for one in found):
            await asyncio.sleep(0.05)
            for url in urls:
                if match := re.search(r"http\S+", url):
                    async with session.get(match[0]) as answer:
                        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                        found.append(await answer.text())
    workers[0].abort()
    await work
    (model,) = {one.answerer for one in (await lbr.status(db_url=db_url)).runs}
    assert 0 < value(found[-1], "lbr_cooldown_seconds", model=model) <= 75
    assert value(found[-1], "lbr_calls_at_a_time", model=model) >= 1


async def test_a_worker_serves_this_machine_only(db_url: str) -> None:
    """A page whose own name leads here is refused; a taken port, and none at all, are errors before any work."""
    await lbr.enqueue(["a"], model="offline:echo", run="r", db_url=db_url)
    said: list[str] = []
    workers: list[lbr.Worker] = []
    flags = {"until": "forever", "notify": said.append, "on_start": workers.append}
    work = asyncio.create_task(lbr.work(db_url=db_url, metrics=0, **flags))  # type: ignore[arg-type]
    async with asyncio.timeout(30), ClientSession() as session:
        await eventually(lambda: said)
        url = said[0].rpartition(" ")[2]
        port = int(url.split(":")[2].partition("/")[0])
        codes = {}
        for host in (
            "localhost",
            f"localhost:{port}",
            "[::1]:9",
            "10.0.0.1",
            "evil.example",
            "evil.example:80",
            "localhost.evil:1",
        ):
            async with session.get(url, headers={"Host": host}) as answer:
                codes[host] = answer.status
        for method, path, code in (("POST", "", 405), ("GET", "/x", 404)):
            async with session.request(method, f"{url}{path}") as answer:
                assert answer.status == code
    assert [code for host, code in codes.items() if "evil" in host] == [421] * 3
    assert {code for host, code in codes.items() if "evil" not in host} == {200}
    for bad in (port, -1, 65_536):
        with pytest.raises(UsageError, match="metrics"):
            await lbr.work(db_url=db_url, metrics=bad)
    workers[0].drain()
    await work
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@pytest.mark.processes
async def test_the_parent_of_several_processes_serves(cli: Cli) -> None:
    """One port shows the work of both, while they work."""
    (cli.folder / "in.txt").write_text("".join(f"{n}\n" for n in range(4)))
    cli("enqueue", "in.txt", "--model", "offline:echo", "--set", "latency=30", "--run", "r")
    process = cli.start("worker", "--processes", "2", "--concurrency", "2", "--grace", "0.1", "--metrics", "0")
    assert process.stderr is not None
    line = await asyncio.to_thread(process.stderr.readline)
    url = line.strip().rpartition(" ")[2]
    async with asyncio.timeout(60), ClientSession() as session:
        text = ""
        while not text or value(text, "lbr_jobs", run="r", state="inflight") < 4:
            async with session.get(url) as answer:
                text = await answer.text()
    assert value(text, "lbr_workers") == 2
    process.terminate()
    _, rest = await asyncio.to_thread(process.communicate)
    assert "metrics" not in rest
