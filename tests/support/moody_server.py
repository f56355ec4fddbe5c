"""A provider that goes away and comes back: its mood is a word in a file, and each request is a line in another.

Run as a process of its own: `python -m tests.support.moody_server FOLDER PORT`. The moods are `up`, `broken` (500 to
every call), `silent` (no call is answered) and whatever follows `but ` for a prompt that a firewall refuses.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from aiohttp import web

SECONDS = 0.1
"""What an answer takes."""
SLOW_SECONDS = 5.0
"""What an answer to a prompt takes that begins with `slow`."""
KEY = "sk-good"


class Moody:
    """Answers, and writes down each request: when it began, what it asked, how it ended, and how many were open."""

    def __init__(self, folder: Path) -> None:
        self._mood = folder / "mood"
        self._log = (folder / "requests.jsonl").open("a", buffering=1)
        self._open = 0

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one request by the mood of the moment."""
        asked = json.loads(await request.read())
        prompt, began, mood = asked["messages"][-1]["content"], time.time(), self._mood.read_text().strip()
        self._open += 1
        seen = {"at": began, "prompt": prompt, "mood": mood, "open": self._open, "status": 0}
        try:
            seen["status"], body = await self._reply(request, prompt, mood)
            return web.json_response(body, status=seen["status"])
        finally:
            self._open -= 1
            self._log.write(json.dumps(seen) + "\n")

    async def _reply(self, request: web.Request, prompt: str, mood: str) -> tuple[int, object]:
        if mood == "silent":
            await asyncio.sleep(3600)
        await asyncio.sleep(SLOW_SECONDS if prompt.startswith("slow") else SECONDS)
        if mood == "broken":
            return 500, {"error": {"message": "internal trouble"}}
        if request.headers["authorization"] != f"Bearer {KEY}":
            return 401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
        message = {"role": "assistant", "content": f"answer to {prompt}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "moody", "usage": usage}
        return 200, {**whole, "choices": [choice]}


def main() -> None:
    """Serve until killed."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", Moody(Path(sys.argv[1])).answer)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None, access_log=None)


if __name__ == "__main__":
    main()
