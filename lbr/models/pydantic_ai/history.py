"""What is asked: a request as pydantic-ai's messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.models.prompt import Image, turns_of

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelRequestPart, UserContent

    from lbr.models.base import Request
    from lbr.models.prompt import Turn


def history_of(request: Request) -> list[ModelMessage]:
    """Turn a request into messages; the last request among them carries the instructions.

    Raises Permanent for what no provider is asked.
    """
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart  # noqa: PLC0415

    history: list[ModelMessage] = []
    for turn in turns_of(request):
        if turn.role == "assistant":
            history.append(ModelResponse(parts=[TextPart(str(turn.content))]))
        elif history and isinstance(history[-1], ModelRequest):
            history[-1].parts = [*history[-1].parts, _part(turn)]
        else:
            history.append(ModelRequest(parts=[_part(turn)]))
    asked = [message for message in history if isinstance(message, ModelRequest)]
    asked[-1].instructions = request.task.instructions
    return history


def _part(turn: Turn) -> ModelRequestPart:
    from pydantic_ai.messages import SystemPromptPart, UserPromptPart  # noqa: PLC0415

    if turn.role == "system":
        return SystemPromptPart(str(turn.content))
    if isinstance(turn.content, str):
        return UserPromptPart(turn.content)
    return UserPromptPart([_content(part) for part in turn.content])


def _content(part: str | Image) -> UserContent:
    from pydantic_ai.messages import BinaryContent, ImageUrl  # noqa: PLC0415

    if isinstance(part, str):
        return part
    metadata = None if part.detail is None else {"detail": part.detail}
    if not part.url.startswith("data:"):
        return ImageUrl(part.url, vendor_metadata=metadata)
    image = BinaryContent.from_data_uri(part.url)
    image.vendor_metadata = metadata
    return image
