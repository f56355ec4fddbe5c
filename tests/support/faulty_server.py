"""A provider of our own with every fault at once, drawn from the prompt and the number of its request.

So a test can tell beforehand how each prompt ends, and after how many requests.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

GOOD = "good"
BAD_ANSWER = "bad answer"
REFUSED = "refused"
LIMITED = "limited"
FAULTS = (LIMITED, "500", "503", "malformed", "slow", BAD_ANSWER)


def fault_of(prompt: str, number: int, rate: float) -> str:
    """Tell how request `number`, from 1, of a prompt ends."""
    if prompt.startswith("never"):
        return "500"
    if prompt.startswith("refuse"):
        return REFUSED
    rng = random.Random(f"{prompt}:{number}")
    return rng.choice(FAULTS) if rng.random() < rate else GOOD


def story_of(prompt: str, *, rate: float, max_attempts: int, bad_answers: int = 3) -> list[str]:
    """Tell how all requests of a prompt end, the last of which decides about its job."""
    seen: list[str] = []
    while True:
        seen.append(fault_of(prompt, len(seen) + 1, rate))
        bad = seen.count(BAD_ANSWER)
        transient = len(seen) - bad - seen.count(LIMITED) - seen.count("503")
        if seen[-1] in {GOOD, REFUSED} or bad == bad_answers or transient == max_attempts:
            return seen


def answer(content: str) -> dict[str, Any]:
    """Return a chat completion."""
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "faulty",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


class Faulty:
    """The server, for the length of a block. `requests` and `answered` count by prompt.

    `rate` is the share of requests that end in a fault. `broke_after` is after how many good answers the account is
    empty, None for one that never is; a test may set it anew.
    """

    def __init__(self, *, rate: float = 0.0, broke_after: int | None = None) -> None:
        self.rate = rate
        self.broke_after = broke_after
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                # A bad answer is asked for again with more messages; the prompt is the first of the user.
                prompt = next(m["content"] for m in asked["messages"] if m["role"] == "user")
                status, headers, body = faulty.reply(prompt)
                data = body.encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing of clients that went away."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def reply(self, prompt: str) -> tuple[int, dict[str, str], str]:
        """Return status, headers and body of the next request of a prompt."""
        with self.lock:
            self.requests[prompt] += 1
            fault = fault_of(prompt, self.requests[prompt], self.rate)
            if fault == GOOD and self.broke_after is not None and self.answered.total() >= self.broke_after:
                fault = "broke"
            self.answered[prompt] += fault == GOOD
        match fault:
            case "limited":
                return 429, {"retry-after-ms": "50"}, json.dumps({"error": {"message": "slow down"}})
            case "broke":
                words = "You exceeded your current quota, please check your plan and billing details."
                return 429, {}, json.dumps({"error": {"message": words, "code": "insufficient_quota"}})
            case "500" | "503":
                return int(fault), {}, json.dumps({"error": {"message": f"trouble {fault}"}})
            case "refused":
                return 400, {}, json.dumps({"error": {"message": "not this one"}})
            case "malformed":
                return 200, {}, '{"id": "c1", "choi'
            case "slow":
                self.ended.wait(120)
                return 200, {}, json.dumps(answer("too late"))
            case "bad answer":
                return 200, {}, json.dumps(answer('{"echo": 7}'))
        return 200, {}, json.dumps(answer(json.dumps({"echo": prompt})))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
