"""The functions that the measured workers call."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

NAP_SECONDS = 0.005


async def echo(prompt: str) -> str:
    """Answer at once."""
    return prompt


async def nap(prompt: str) -> str:
    """Answer after `NAP_SECONDS`, as a remote server would."""
    await asyncio.sleep(NAP_SECONDS)
    return prompt


async def note_start(prompt: str) -> str:
    """Write the time of the process's first call to the file that LBR_TEST_NOTE names."""
    _note(Path(os.environ["LBR_TEST_NOTE"]))
    return prompt


def _note(path: Path) -> None:
    if not path.exists():
        path.write_text(str(time.time()))
