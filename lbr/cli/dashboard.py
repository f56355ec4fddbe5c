"""`lbr dashboard`: a page in the browser that shows runs and lets you pause, resume, cancel and retry."""

from __future__ import annotations

import asyncio
import html
import os
import secrets
import sys
import tempfile
import webbrowser
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbr.cli.app import echo, log, option, switch, with_database
from lbr.core.errors import UsageError
from lbr.worker.processes import handled_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.web.server import Dashboard

TOKEN_BYTES = 32
MIN_TOKEN = 32
LOCAL_HOST, ANY_ADDRESS = "127.0.0.1", frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - what users may ask for


@click.command()
@option("--port", "PORT", "The port; 0 takes a free one.", type=click.IntRange(0, 65_535), default=0)
@option("--host", "ADDRESS", "The address to listen at.", default=LOCAL_HOST)
@click.option("--allow-host", metavar="NAME", multiple=True, help="Another name of this machine; may be repeated.")
@switch("--read-only", "Refuse to pause, resume, cancel and retry.")
@switch("--no-open", "Do not open the browser.")
@option("--token-file", "FILE", "Keep the token in this file, so that the address stays the same.")
@option("--metrics-token", "TOKEN", "A token of your own that opens /metrics and nothing else.")
@with_database
def dashboard(db: dict[str, Any], /, port: int, host: str, no_open: bool, token_file: str | None, **more: Any) -> None:
    """Show runs and their jobs in the browser.

    It prints an address that ends with a secret token: whoever has it can read all prompts and answers, and change runs.
    Ctrl-C ends it; workers go on.
    """
    from lbr.web.server import LOCAL_HOSTS, Dashboard  # noqa: PLC0415 - it takes a tenth of a second

    token = secrets.token_urlsafe(TOKEN_BYTES) if token_file is None else kept_token(Path(token_file))
    hosts = LOCAL_HOSTS | {name.lower() for name in (*more["allow_host"], *({host} - ANY_ADDRESS))}
    shown = Dashboard(
        token=token, read_only=more["read_only"], hosts=hosts, metrics_token=more["metrics_token"] or None, **db
    )
    asyncio.run(_serve(shown, host, port, opens=not no_open))


def kept_token(path: Path) -> str:
    """Return the token in a file, which is created, for its owner only, if it is missing."""
    try:
        with suppress(FileExistsError), open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(f"{secrets.token_urlsafe(TOKEN_BYTES)}\n")
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot use {path} for the token: {error}") from error
    if len(token) < MIN_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        raise UsageError(
            f"expected a token of at least {MIN_TOKEN} characters in {path}; remove the file for a new one"
        )
    if path.stat().st_mode & 0o077:
        raise UsageError(f"others can read the token in {path}: chmod 600 {path}")
    return token


async def _serve(shown: Dashboard, host: str, port: int, *, opens: bool) -> None:
    from aiohttp import web  # noqa: PLC0415 - as above

    from lbr.web.server import application  # noqa: PLC0415

    await shown.database()  # which may raise what is wrong with it
    runner = web.AppRunner(application(shown), access_log=None, shutdown_timeout=1)
    await runner.setup()
    ended = asyncio.Event()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise UsageError(
                f"cannot listen at {host} port {port}: {error.strerror}; --port 0 takes a free one"
            ) from error
        known = LOCAL_HOST if host in ANY_ADDRESS else host
        name = f"[{known}]" if ":" in known else known
        address = f"http://{name}:{runner.addresses[0][1]}/#{shown.token}"
        with handled_signals(lambda _: ended.set()), _opened(address if opens and _has_browser() else None):
            echo(address)
            with suppress(AttributeError, OSError):
                sys.stdout.flush()
            await ended.wait()
        log("the dashboard has ended; workers go on")
    finally:
        await runner.cleanup()


def _has_browser() -> bool:
    return sys.stdout.isatty() and (
        sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    )


@contextmanager
def _opened(address: str | None) -> Iterator[None]:
    """Open an address in the browser, by a private file that leads there: all users see the arguments of processes."""
    if address is None:
        yield
        return
    with tempfile.NamedTemporaryFile("w", prefix="lbr-dashboard-", suffix=".html") as file:
        file.write(f'<meta http-equiv="refresh" content="0; url={html.escape(address)}">\n')
        file.flush()
        webbrowser.open(Path(file.name).as_uri())
        yield
