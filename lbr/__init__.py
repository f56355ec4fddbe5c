"""lbr: a durable, multi-process batch runner for LLM prompts.

At-least-once calls, exactly-once results: a finished answer that was committed is never lost, never
overwritten by a slower worker, never paid for again.
"""

from lbr.api.collect import collect
from lbr.api.doctor import doctor
from lbr.api.enqueue import enqueue
from lbr.api.estimate import estimate
from lbr.api.move import move
from lbr.api.operate import cancel, limit, pause, reparse, resume, retry, show, status
from lbr.api.prompt_map import export_jsonl, prompt_map
from lbr.api.work import work
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import LbrError, Pause, Permanent, RetryLater

__all__ = [
    "DB_URL_DEFAULT",
    "LbrError",
    "Pause",
    "Permanent",
    "RetryLater",
    "cancel",
    "collect",
    "doctor",
    "enqueue",
    "estimate",
    "export_jsonl",
    "limit",
    "move",
    "pause",
    "prompt_map",
    "reparse",
    "resume",
    "retry",
    "show",
    "status",
    "work",
]
