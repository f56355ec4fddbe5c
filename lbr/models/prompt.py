"""What is asked, turn by turn, in no provider's own words: the one reading of a prompt that all adapters share."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote_to_bytes

from lbr.core.errors import Permanent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.types import Json, Prompt
    from lbr.models.base import Request


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its URL, which may be a `data:` one whose base64 has been checked; `detail` is None for unset."""

    url: str
    detail: Json = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said. Only a user's content is ever a list of parts."""

    role: Literal["system", "user", "assistant"]
    content: str | list[str | Image]


def turns_of(request: Request) -> list[Turn]:
    """Read a request's prompt, and its answer that did not validate, if it has one; without the instructions.

    Raises Permanent for what no provider is asked.
    """
    turns = list(_turns(request.prompt))
    if request.last_bad is not None:
        if request.last_bad.text.strip():
            turns.append(Turn("assistant", request.last_bad.text))
        words = f"That answer does not fit what was asked for: {request.last_bad.message}\nGive a corrected answer."
        turns.append(Turn("user", words))
    if all(turn.role == "assistant" for turn in turns):
        raise Permanent("expected at least one message of the user, got: none")
    return turns


def _turns(prompt: Prompt) -> Iterator[Turn]:
    if prompt.messages is None:
        yield Turn("user", prompt.text or "")
        return
    for number, message in enumerate(prompt.messages, start=1):
        where = f"message {number}"
        content = message.get("content")
        match message.get("role"):
            case "system" | "developer":
                yield Turn("system", _text(content, where))
            case "user":
                yield Turn("user", content if isinstance(content, str) else _contents(content, where))
            case "assistant":
                yield Turn("assistant", _text(content, where))
            case role:
                raise Permanent(
                    f"expected {where} to have the role system, developer, user or assistant, got: {role!r}"
                )


def _text(content: Json, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = _contents(content, where)
    if not all(isinstance(part, str) for part in parts):
        raise Permanent(f"expected {where} to hold text only")
    return "".join(str(part) for part in parts)


def _contents(content: Json, where: str) -> list[str | Image]:
    if not isinstance(content, list):
        raise Permanent(
            f"expected the content of {where} to be text or a list of parts, got: {type(content).__name__}"
        )
    return [_content(part, where) for part in content]


def _content(part: Json, where: str) -> str | Image:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            detail = part["image_url"].get("detail") if isinstance(part["image_url"], dict) else None
            if url.startswith("data:"):
                try:
                    _check_data_url(url)
                except ValueError as error:
                    raise Permanent(f"expected a base64 data: URL in {where}, got: {error}") from error
            return Image(url, detail)
        case {"type": "image_url"}:
            raise Permanent(
                f'expected an image of {where} to be like {{"type": "image_url", "image_url": {{"url": "https://…"}}}}, '
                f"got: {str(part)[:100]}"
            )
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Permanent(f"expected the parts of {where} to be text or image_url, got: {kind!r}")


def _check_data_url(url: str) -> None:
    """Raise ValueError for a data: URL whose image is damaged: decoders leave out what they do not know."""
    _, marker, data = url.partition(";base64,")
    if not marker:
        raise ValueError('Data URI must be base64-encoded (expected ";base64," marker)')
    base64.b64decode(unquote_to_bytes(data))
    if not base64.b64decode("".join(url.partition(",")[2].split()), validate=True):
        raise ValueError("no data")
