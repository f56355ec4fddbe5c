"""The HTTP server of the tests: what it does with a request is a function of it, byte by byte if need be.

`serving` runs it in the test's event loop, `Server` in a thread.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import json
import random
import socket
import ssl
import struct
import threading
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    Respond = Callable[["Request"], "Script"]

MAX_HEAD_BYTES = 10_000_000
TRICKLE_SECONDS = 0.1


@dataclass
class Request:
    """One request as it came: its first line, its headers with names in small letters, its body."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def method(self) -> str:
        """Its method."""
        return self.line.split()[0]

    @property
    def path(self) -> str:
        """Its path with the query."""
        return self.line.split()[1]

    def json(self) -> Any:
        """Return what the body says."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Script:
    """What the server does with a request: it waits, sends these bytes, then does something with the connection.

    `keep` reads the next request, `trickle` sends a space now and then.
    """

    sent: bytes = b""
    then: Literal["close", "reset", "hang", "trickle", "keep"] = "close"
    wait_seconds: float = 0.0


@dataclass
class Served:
    """A server's address, and how many connections have begun and ended."""

    port: int
    scheme: str = "http"
    begun: int = 0
    ended: int = 0
    end: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    async def all_ended(self) -> None:
        """Return once every connection has ended."""
        async with asyncio.timeout(30), self.end:
            await self.end.wait_for(lambda: self.begun == self.ended)


@asynccontextmanager
async def serving(handle: Handle, tls: ssl.SSLContext | None = None, *, port: int = 0) -> AsyncIterator[Served]:
    """Serve for the length of a block; `handle` has a connection to itself until it returns."""
    tasks: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers.add(writer)
        served.begun += 1
        try:
            await handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError):  # the client went away
            pass
        finally:
            writer.close()
            tasks.discard(task)
            writers.discard(writer)
            async with served.end:
                served.ended += 1
                served.end.notify_all()

    server = await asyncio.start_server(joined, "127.0.0.1", port, ssl=tls, limit=MAX_HEAD_BYTES, backlog=128)
    served = Served(server.sockets[0].getsockname()[1], "http" if tls is None else "https")
    try:
        yield served
    finally:
        server.close()
        left = list(tasks)
        for writer in writers:
            writer.transport.abort()
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def read(reader: asyncio.StreamReader) -> Request:
    """Read one request. Raises IncompleteReadError when the client went away."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    return Request(head[0], headers, await reader.readexactly(int(headers.get("content-length", 0))))


def reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection off without a goodbye."""
    raw: Any = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def scripted(respond: Respond, ended: Callable[[Request], object] = lambda _: None) -> Handle:
    """Do with each request what `respond` returns; `ended` gets each that was answered or given up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read(reader)
            script = respond(request)
            try:
                await asyncio.sleep(script.wait_seconds)
                writer.write(script.sent)
                await writer.drain()
            finally:
                ended(request)
            match script.then:
                case "keep":
                    continue
                case "reset":
                    reset(writer)
                case "hang":
                    await asyncio.Event().wait()
                case "trickle":
                    while True:
                        await asyncio.sleep(TRICKLE_SECONDS)
                        writer.write(b" ")
                        await writer.drain()
            return

    return handle


def answering(sent: bytes, asked: list[Request] | None = None) -> Handle:
    """Give one answer to every request of a connection, and keep what was asked."""

    def respond(request: Request) -> Script:
        if asked is not None:
            asked.append(request)
        return Script(sent, "keep")

    return scripted(respond)


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """Return a whole answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def reply(
    status: int, body: str | bytes = "", headers: Mapping[str, str] | None = None, *, seconds: float = 0.0
) -> Script:
    """Return an answer of JSON that takes so long and keeps the connection."""
    data = body.encode() if isinstance(body, str) else body
    named = {"content-type": "application/json", **(headers or {})}
    lines = [f"{name}: {value}" for name, value in named.items()]
    return Script(answer(data, *lines, status=f"{status} Whatever"), "keep", seconds)


def http(status: int, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> Script:
    """Return an answer of JSON that closes the connection."""
    return replace(reply(status, body, {**(headers or {}), "connection": "close"}), then="close")


def completion(content: str, finish_reason: str = "stop") -> str:
    """Return the body of a chat completion."""
    message = {"role": "assistant", "content": content}
    head = {"id": "c1", "object": "chat.completion", "created": 1_700_000_000, "model": "scripted"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return json.dumps({**head, "choices": [choice], "usage": usage})


def prompt_of(request: Request) -> str:
    """Return the first message of the user: a bad answer is asked for again with more messages."""
    return str(next(one["content"] for one in request.json()["messages"] if one["role"] == "user"))


class Server:
    """A server in a thread of its own, for the length of a block or from `start` to `stop`; it keeps its port."""

    def __init__(self, respond: Respond) -> None:
        self._handle = scripted(respond, self.ended)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._port = 0
        self._serving: Any = None

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._port}/v1"

    def ended(self, request: Request) -> None:
        """Note that a request was answered or given up."""

    def start(self) -> None:
        """Listen."""
        if not self._thread.is_alive():
            self._thread.start()
        self._serving = serving(self._handle, port=self._port)
        self._port = self._do(self._serving.__aenter__()).port

    def stop(self) -> None:
        """Break every connection off, and refuse new ones."""
        if self._serving is not None:
            self._do(self._serving.__aexit__(None, None, None))
            self._serving = None

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


class Scripted(Server):
    """A server that gives one answer to every POST and keeps what was asked."""

    def __init__(self, status: int = 200, body: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(self._respond)
        self.asked: list[Any] = []
        self.headers_seen: list[tuple[str, dict[str, str]]] = []
        self._answer = http(status, body, headers)

    def _respond(self, request: Request) -> Script:
        self.headers_seen.append((request.path, request.headers))
        if request.method != "POST":
            return http(404)
        self.asked.append(request.json())
        return self._answer


class Prompted(Server):
    """A server whose answer to a prompt is a function of the number of its request, from 1; it keeps what was asked."""

    def __init__(self, respond: Callable[[str, int], Script]) -> None:
        super().__init__(self._respond)
        self.requests: Counter[str] = Counter()
        self._answer = respond

    def _respond(self, request: Request) -> Script:
        prompt = prompt_of(request)
        self.requests[prompt] += 1
        return self._answer(prompt, self.requests[prompt])


GOOD = "good"
BAD_ANSWER = "bad answer"
REFUSED = "refused"
LIMITED = "limited"
FAULTS = (LIMITED, "500", "503", "malformed", "slow", BAD_ANSWER)


def fault_of(prompt: str, number: int, rate: float) -> str:
    """Return how request `number`, from 1, of a prompt ends at a faulty provider."""
    if prompt.startswith("never"):
        return "500"
    if prompt.startswith("refuse"):
        return REFUSED
    rng = random.Random(f"{prompt}:{number}")
    return rng.choice(FAULTS) if rng.random() < rate else GOOD


def story_of(prompt: str, *, rate: float, max_attempts: int, bad_answers: int = 3) -> list[str]:
    """Return how all requests of a prompt end, the last of which decides about its job."""
    seen: list[str] = []
    while True:
        seen.append(fault_of(prompt, len(seen) + 1, rate))
        bad = seen.count(BAD_ANSWER)
        transient = len(seen) - bad - seen.count(LIMITED) - seen.count("503")
        if seen[-1] in {GOOD, REFUSED} or bad == bad_answers or transient == max_attempts:
            return seen


class Faulty(Prompted):
    """A provider with every fault at once, drawn from the prompt and the number of its request.

    So a test knows beforehand how each prompt ends, and after how many requests. `rate` is the share of requests that
    end in a fault. `broke_after` is after how many good answers the account is empty, None for one that never is.
    """

    def __init__(self, *, rate: float = 0.0, broke_after: int | None = None) -> None:
        super().__init__(self._fault)
        self.rate = rate
        self.broke_after = broke_after
        self.answered: Counter[str] = Counter()

    def _fault(self, prompt: str, number: int) -> Script:
        fault = fault_of(prompt, number, self.rate)
        if fault == GOOD and self.broke_after is not None and self.answered.total() >= self.broke_after:
            fault = "broke"
        self.answered[prompt] += fault == GOOD
        match fault:
            case "limited":
                return reply(429, json.dumps({"error": {"message": "slow down"}}), {"retry-after-ms": "50"})
            case "broke":
                words = "You exceeded your current quota, please check your plan and billing details."
                return reply(429, json.dumps({"error": {"message": words, "code": "insufficient_quota"}}))
            case "500" | "503":
                return reply(int(fault), json.dumps({"error": {"message": f"trouble {fault}"}}))
            case "refused":
                return reply(400, json.dumps({"error": {"message": "not this one"}}))
            case "malformed":
                return reply(200, '{"id": "c1", "choi')
            case "slow":
                return reply(200, completion("too late"), seconds=120)
            case "bad answer":
                return reply(200, completion('{"echo": 7}'))
        return reply(200, completion(json.dumps({"echo": prompt})))


def proxying(asked: list[Request]) -> Handle:
    """Answer plain requests as a proxy would that has the answer already, and pass the bytes of tunnels on."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read(reader)
            asked.append(request)
            if request.method == "CONNECT":
                await _tunnel(request.path, reader, writer)
                return
            writer.write(answer(b'{"by": "proxy"}', "content-type: application/json"))

    return handle


async def _tunnel(target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    host, _, port = target.rpartition(":")
    there, back = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                target.write(data)
        target.close()

    await asyncio.gather(pass_on(reader, back), pass_on(there, writer))


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Make a certificate for 127.0.0.1 that only itself signed; return its file, and a server's TLS with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = folder / "key.pem"
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file, secret)
    return file, tls
