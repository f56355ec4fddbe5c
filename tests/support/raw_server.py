"""A server of our own that says what a test wants byte by byte, and a forward proxy before it."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import socket
import ssl
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class ResolvedTask:
    """One request as it came: its first line, its headers with names in small letters, its body."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ServedRun:
    """A server's address, and how many connections it has seen begin and end."""

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
async def serving(handle: Handle, tls: ssl.SSLContext | None = None) -> AsyncIterator[ServedRun]:
    """Serve for the length of a block; `handle` has a connection to itself until it returns."""
    tasks: set[asyncio.Task[None]] = set()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        served.begun += 1
        try:
            await handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError):  # the client went away
            pass
        finally:
            writer.close()
            tasks.discard(task)
            async with served.end:
                served.ended += 1
                served.end.notify_all()

    server = await asyncio.start_server(joined, "127.0.0.1", 0, ssl=tls)
    served = ServedRun(server.sockets[0].getsockname()[1], "http" if tls is None else "https")
    try:
        yield served
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read(reader: asyncio.StreamReader) -> ResolvedTask:
    """Read one request; IncompleteReadError where the client went away."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    return ResolvedTask(head[0], headers, await reader.readexactly(int(headers.get("content-length", 0))))


def answering(answer: bytes, asked: list[ResolvedTask] | None = None) -> Handle:
    """Give one answer to every request of a connection, and keep what was asked."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read(reader)
            if asked is not None:
                asked.append(request)
            writer.write(answer)
            await writer.drain()

    return handle


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """Return a whole answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection off without a goodbye."""
    raw: Any = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def proxying(asked: list[ResolvedTask]) -> Handle:
    """Answer what is asked in the clear, as a proxy would that has it already, and pass the bytes of tunnels on."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read(reader)
            asked.append(request)
            method, target, _ = request.line.split()
            if method == "CONNECT":
                await _tunnel(target, reader, writer)
                return
            writer.write(answer(b'{"by": "proxy"}', "content-type: application/json"))

    return handle


async def _tunnel(target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    host, _, port = target.rpartition(":")
    there, back = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)
        target.close()

    await asyncio.gather(pass_on(reader, back), pass_on(there, writer))


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Make a certificate for 127.0.0.1 that nobody signed but itself; return its file, and a server's TLS with it."""
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
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = folder / "key.pem"
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file, secret)
    return file, tls
