"""lbr: a durable, multi-process batch runner for LLM prompts.

At-least-once calls, exactly-once results: a finished answer that was committed is never lost, never
overwritten by a slower worker, never paid for again.
"""

from lbr.api import collect, enqueue, work
from lbr.config import DB_URL_DEFAULT
from lbr.errors import LbrError, Pause, Permanent, RetryLater
from lbr.estimating import estimate
from lbr.examining import doctor
from lbr.mapping import export_jsonl, prompt_map
from lbr.moving import move
from lbr.operating import cancel, limit, pause, reparse, resume, retry, show, status

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
