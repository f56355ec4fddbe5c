"""lbr: a durable, multi-process batch runner for LLM prompts.

At-least-once calls, exactly-once results: a finished answer that was committed is never lost, never
overwritten by a slower worker, never paid for again.
"""

import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in {"lbr", "-mlbr"} and not sys.flags.safe_path:
    # `python -m lbr` puts the working directory first, where a queue.py would be imported instead of Python's own.
    sys.path.append(sys.path.pop(0))

from lbr.api.batches import BatchStatus, batches, forget_batch
from lbr.api.collect import Collected, collect
from lbr.api.compare import Comparison, compare
from lbr.api.doctor import Finding, Gravity, doctor
from lbr.api.enqueue import EnqueueReport, enqueue
from lbr.api.estimate import Estimate, estimate
from lbr.api.failures import FailureGroup, failures
from lbr.api.move import Moved, move
from lbr.api.operate import backup, cancel, limit, pause, prune, remove, reparse, resume, retry, show, status
from lbr.api.prompt_map import export_jsonl, prompt_map, prompt_map_sync
from lbr.api.rows import Row
from lbr.api.status import RunStatus, Status
from lbr.api.stream import stream
from lbr.api.work import work
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import (
    AlreadyRunningError,
    BadAnswer,
    CallError,
    DatabaseBusyError,
    DatabaseError,
    InputError,
    LbrError,
    MisfitError,
    NothingToServeError,
    OutputError,
    Pause,
    Permanent,
    RetryLater,
    RunChangedError,
    RunMismatchError,
    RunNotFoundError,
    StoppedError,
    UsageError,
)
from lbr.core.types import AnswerRow, Paused
from lbr.models.answer import Answer
from lbr.store.enqueue import EnqueueCounts
from lbr.store.reads import Attempt, JobDetail
from lbr.store.redo import Reparsed
from lbr.worker.calls import WorkReport
from lbr.worker.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "DB_URL_DEFAULT",
    "AlreadyRunningError",
    "Answer",
    "AnswerRow",
    "Attempt",
    "BadAnswer",
    "BatchStatus",
    "CallError",
    "Collected",
    "Comparison",
    "DatabaseBusyError",
    "DatabaseError",
    "EnqueueCounts",
    "EnqueueReport",
    "Estimate",
    "FailureGroup",
    "Finding",
    "Gravity",
    "InputError",
    "JobDetail",
    "LbrError",
    "MisfitError",
    "Moved",
    "NothingToServeError",
    "OutputError",
    "Pause",
    "Paused",
    "Permanent",
    "Reparsed",
    "RetryLater",
    "Row",
    "RunChangedError",
    "RunMismatchError",
    "RunNotFoundError",
    "RunStatus",
    "Status",
    "StoppedError",
    "UsageError",
    "WorkReport",
    "Worker",
    "__version__",
    "backup",
    "batches",
    "cancel",
    "collect",
    "compare",
    "doctor",
    "enqueue",
    "estimate",
    "export_jsonl",
    "failures",
    "forget_batch",
    "limit",
    "move",
    "pause",
    "prompt_map",
    "prompt_map_sync",
    "prune",
    "remove",
    "reparse",
    "resume",
    "retry",
    "show",
    "status",
    "stream",
    "work",
]


def __dir__() -> list[str]:
    """Return the public names alone: the packages inside are not part of the API."""
    return list(__all__)
