"""A server of our own that gives one answer to every call, for what a provider says once in a blue moon."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Scripted:
    """A server that gives one answer to every call and keeps what it was asked."""

    def __init__(self, status: Any = 200, body: Any = "", headers: Any = None) -> None:
        self.asked: list[Any] = []
        self.headers_seen: list[tuple[str, dict[str, str]]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"]))
                scripted.asked.append(json.loads(text))
                scripted.headers_seen.append(
                    (self.path, {name.lower(): value for name, value in self.headers.items()})
                )
                data = body.encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                scripted.headers_seen.append((self.path, dict(self.headers.items())))
                self.send_error(404)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Any:
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
