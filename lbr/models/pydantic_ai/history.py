"""What is asked: a request as pydantic-ai's messages."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from lbr.errors import Permanent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic_ai.messages import ModelMessage, ModelRequestPart, UserContent

    from lbr.jobs import Json, Prompt
    from lbr.models.base import Request


def history_of(request: Request) -> list[ModelMessage]:
    """Turn a request into messages; the last request among them carries the instructions."""
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, UserPromptPart  # noqa: PLC0415

    history: list[ModelMessage] = []
    for part in _parts(request.prompt):
        if isinstance(part, str):
            history.append(ModelResponse(parts=[TextPart(part)]))
        elif history and isinstance(history[-1], ModelRequest):
            history[-1].parts = [*history[-1].parts, part]
        else:
            history.append(ModelRequest(parts=[part]))
    if request.last_bad is not None:
        if request.last_bad.text.strip():
            history.append(ModelResponse(parts=[TextPart(request.last_bad.text)]))
        words = f"That answer does not fit what was asked for: {request.last_bad.message}\nGive a corrected answer."
        history.append(ModelRequest(parts=[UserPromptPart(words)]))
    asked = [message for message in history if isinstance(message, ModelRequest)]
    if not asked:
        raise Permanent("expected at least one message of the user, got: none")
    asked[-1].instructions = request.task.instructions
    return history


def _parts(prompt: Prompt) -> Iterator[ModelRequestPart | str]:
    """Yield the parts of a prompt in order; a plain str is what the assistant said."""
    from pydantic_ai.messages import SystemPromptPart, UserPromptPart  # noqa: PLC0415

    if prompt.messages is None:
        yield UserPromptPart(prompt.text or "")
        return
    for number, message in enumerate(prompt.messages, start=1):
        where = f"message {number}"
        content = message.get("content")
        match message.get("role"):
            case "system" | "developer":
                yield SystemPromptPart(_text(content, where))
            case "user":
                yield UserPromptPart(content if isinstance(content, str) else _contents(content, where))
            case "assistant":
                yield _text(content, where)
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


def _contents(content: Json, where: str) -> list[UserContent]:
    if not isinstance(content, list):
        raise Permanent(
            f"expected the content of {where} to be text or a list of parts, got: {type(content).__name__}"
        )
    return [_content(part, where) for part in content]


def _content(part: Json, where: str) -> UserContent:
    from pydantic_ai.messages import BinaryContent, ImageUrl  # noqa: PLC0415

    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            detail = part["image_url"].get("detail") if isinstance(part["image_url"], dict) else None
            metadata = None if detail is None else {"detail": detail}
            if not url.startswith("data:"):
                return ImageUrl(url, vendor_metadata=metadata)
            try:
                image = BinaryContent.from_data_uri(url)
                _check_base64(url)
            except ValueError as error:
                raise Permanent(f"expected a base64 data: URL in {where}, got: {error}") from error
            image.vendor_metadata = metadata
            return image
        case {"type": "image_url"}:
            raise Permanent(
                f'expected an image of {where} to be like {{"type": "image_url", "image_url": {{"url": "https://…"}}}}, '
                f"got: {str(part)[:100]}"
            )
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Permanent(f"expected the parts of {where} to be text or image_url, got: {kind!r}")


def _check_base64(url: str) -> None:
    """Raise ValueError for a data: URL whose image is damaged: decoders leave out what they do not know."""
    data = "".join(url.partition(",")[2].split())
    if not base64.b64decode(data, validate=True):
        raise ValueError("no data")
