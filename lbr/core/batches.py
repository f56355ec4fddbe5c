"""Batches: what a provider answers within a day at a lower price, and what lbr asks of a provider for that.

`docs/explanation/states.md` draws the states of a batch; `lbr.store.batches` has the statements, `lbr.worker.batches`
takes the steps.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from lbr.core.types import JobId, Millis, RunId, WorkerId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from lbr.core.types import Claim, Outcome

PARKED = Millis(2**62)
"""`available_at` of a pending job that is in a batch. No clock reaches it, and nothing brings it forward."""
MAX_REQUESTS = 10_000
"""Requests in one batch."""
MAX_BATCHES = 4
"""Batches that one run has out at a time."""
TAIL = 100
"""Up to this many remaining jobs of a run are answered online: a batch would make them wait for up to a day."""
AUTO_REQUESTS = 1_000
"""With the lane auto, this many jobs must be left for a batch."""
LOOK_AGAIN_MS = 600_000
"""A batch that two looks at the provider, this far apart, do not find was never accepted."""
TOKEN_LIMIT = "token_limit_exceeded"  # noqa: S105 - a code of OpenAI
"""The error code of an accepted batch whose tokens, with those of the account's other batches, are too many."""
NONCE = 12


class Lane(StrEnum):
    """How the jobs of a run are answered, and which of these a worker does (`ALL` for both)."""

    ONLINE = "online"
    BATCH = "batch"
    AUTO = "auto"
    ALL = "all"


LANES = (Lane.ONLINE, Lane.BATCH, Lane.AUTO)
"""The lanes that a run may have."""


class BatchState(StrEnum):
    """Where a batch is. Its jobs are parked until it is settled or released."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    SENDING = "sending"  # the intent is recorded: from here on the provider may have it
    SENT = "sent"
    ENDED = "ended"
    SETTLED = "settled"
    UNSURE = "unsure"  # the reply to its creation was lost
    RELEASED = "released"  # the provider never had it, or the user forgot it

    @property
    def is_open(self) -> bool:
        """Whether its jobs are parked."""
        return self not in {BatchState.SETTLED, BatchState.RELEASED}

    @property
    def may_be_out(self) -> bool:
        """Whether the provider has it, or may have it."""
        return self.is_open and self not in {BatchState.PLANNED, BatchState.UPLOADED}


class BatchError(Exception):
    """A call of a `BatchProvider` that failed for the batch itself; other failures are `CallError`s."""


class Refused(BatchError):  # noqa: N818
    """The provider refused to create the batch, for certain: it does not have it."""


class Unsure(BatchError):  # noqa: N818
    """No usable reply to the creation of a batch: the provider may have it or not. A 408, 409, 429 or 5xx is one."""


class WrongKey(BatchError):  # noqa: N818
    """The batch is not visible with this process's key."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a provider reports of a batch. `files` are the ids of what it wrote: answers, then errors."""

    provider_id: str
    ended: bool = False
    files: tuple[str, ...] = ()
    completed: int | None = None
    failed: int | None = None
    error: str | None = None
    """The provider's code for why all of it failed or expired, for example `token_limit_exceeded`."""
    message: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as stored. `next_poll_at` is when its next step is due, `looked_at` when a first look did not find it.

    `credential` is a digest of the key and the address that it was uploaded with. `cursor` is what of the results is
    settled. `worker_id` takes its next step until `lease_until`.
    """

    id: int
    run_id: RunId
    nonce: str
    state: BatchState
    count: int
    reserved_nanos: int
    created_at: Millis
    next_poll_at: Millis
    cursor: int = 0
    bytes: int | None = None
    provider: str | None = None
    credential: str | None = None
    file_id: str | None = None
    found: Found | None = None
    sent_at: Millis | None = None
    looked_at: Millis | None = None
    ended_at: Millis | None = None
    error: str | None = None
    worker_id: WorkerId | None = None
    lease_until: Millis | None = None


class BatchProvider(Protocol):
    """A provider's batches, with this process's key, for one task. Every method makes at most the calls it names."""

    name: str
    """The provider, as messages call it."""
    credential: str
    """A digest of the key and the address, never the key."""
    max_requests: int
    max_bytes: int

    def line(self, claim: Claim, custom_id: str) -> bytes:
        """Return the line of the upload for a claim, with its newline.

        Raises CallError for a request that cannot be sent; its job is answered online, which reports it.
        """

    async def upload(self, nonce: str, path: Path) -> str:
        """Upload the file as `lbr-<nonce>.jsonl`; return the provider's id of it. Not billed, so it may be repeated."""

    async def create(self, file_id: str, nonce: str) -> Found:
        """Create the batch, marked with the nonce, in one request that is never repeated.

        Raises Refused if the provider does not have it for certain, and Unsure or anything else if it may have it.
        """

    async def find(self, nonce: str, since: Millis) -> Found | None:
        """Return the batch with this nonce among all that were created `since` then, None if there is none."""

    async def poll(self, provider_id: str) -> Found:
        """Return the batch as it is now. Raises WrongKey if it is not visible with this key."""

    def results(self, found: Found, start: int) -> AsyncIterator[tuple[int, str, Outcome]]:
        """Yield what is behind the cursor `start`: the cursor behind a line, its custom_id, and how its request ended.

        The cursor counts the bytes of all `found.files`, one after the other. Lines end with a newline byte only.
        Requests that were not carried out, because the batch expired or was cancelled, are not among them.
        """

    async def cancel(self, provider_id: str) -> None:
        """Ask the provider to cancel the batch; it goes on to answer polls until it has ended."""

    async def delete(self, file_id: str) -> None:
        """Delete the upload, if it is still there."""

    async def aclose(self) -> None:
        """Close its connections."""


def new_nonce() -> str:
    """Return a nonce: 12 letters and digits that no other batch has."""
    return secrets.token_hex(NONCE // 2)


_CUSTOM_ID = re.compile(rf"([0-9a-f]{{{NONCE}}})-([0-9]{{1,19}})-([0-9]{{1,19}})")


def custom_id(nonce: str, job_id: JobId, claim_seq: int) -> str:
    """Return the id of a line: the batch that it belongs to, and the fence of its job."""
    return f"{nonce}-{job_id}-{claim_seq}"


def read_custom_id(text: str) -> tuple[str, JobId, int] | None:
    """Return nonce, job and claim_seq of a line's id; None for an id that lbr did not make."""
    parts = _CUSTOM_ID.fullmatch(text)
    return None if parts is None else (parts[1], JobId(int(parts[2])), int(parts[3]))
