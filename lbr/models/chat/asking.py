"""What is asked: the body of a chat completions request."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

import orjson

from lbr.models.prompt import Image, turns_of

if TYPE_CHECKING:
    from lbr.core.types import Json
    from lbr.models.base import Request
    from lbr.models.prompt import Turn

_PLAIN_IMAGE = re.compile(r"data:image/[\w.-]+;base64,")

_SPECIAL_TOKEN = re.compile(
    r"<\||<\uff5c|<[a-z_]{1,32}\|>|<(?:start|end)_of_turn>|\[\||INST\]|SYSTEM_PROMPT\]|AVAILABLE_TOOLS\]|TOOL_RESULTS\]"
    r"|TOOL_CALLS\]|\[e~\[|\]~"
)
"""What a chat template may read as a turn of its own. pydantic-ai breaks it up for the servers that would."""


def messages_of(request: Request) -> list[dict[str, Json]] | None:
    """Return a request's messages; None for the few that pydantic-ai words in a way of its own.

    Raises Permanent for messages of which a part would not be sent.
    """
    turns = turns_of(request)
    messages: list[dict[str, Json]] = []
    before = True
    for turn in turns:
        if turn.role == "system":
            if not before:
                return None  # where it may stand depends on the model
        else:
            before = False
            if not _is_plain(turn):
                return None
        messages.append({"role": turn.role, "content": _content(turn.content)})
    instructions = request.task.instructions
    if instructions is not None:
        place = sum(turn.role == "system" for turn in turns)
        messages.insert(place, {"role": "system", "content": instructions})
    return messages


def _is_plain(turn: Turn) -> bool:
    if turn.calls:
        return False
    parts = [turn.content] if isinstance(turn.content, str) else turn.content
    return all(
        _is_plain_image(part) if isinstance(part, Image) else _SPECIAL_TOKEN.search(part) is None
        for part in parts
    )


def _is_plain_image(image: Image) -> bool:
    """Tell whether an image is sent as it is: pydantic-ai decodes a data: URL, and encodes it again."""
    if not image.url.startswith("data:"):
        return True
    start = _PLAIN_IMAGE.match(image.url)
    if start is None:
        return False
    data = image.url[start.end() :].encode("utf-8", "replace")
    try:
        return base64.b64encode(base64.b64decode(data, validate=True)) == data
    except ValueError:
        return False


def _content(content: str | list[str | Image]) -> Json:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else _image(part) for part in content]


def _image(image: Image) -> dict[str, Json]:
    told: dict[str, Any] = {"url": image.url}
    if image.detail is not None:
        told["detail"] = image.detail
    return {"type": "image_url", "image_url": told}


class Template:
    """All of a body but its messages. Raises TypeError for what is no JSON."""

    def __init__(self, fields: dict[str, Json]) -> None:
        self._start = orjson.dumps(fields)[:-1] + b',"messages":'

    def body(self, messages: list[dict[str, Json]]) -> bytes:
        """Return the whole body. Raises TypeError for text that is no Unicode."""
        return b"".join((self._start, orjson.dumps(messages), b"}"))
