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

    Raises Permanent for messages of which a part would not be sent.
    """
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart  # noqa: PLC0415

    history: list[ModelMessage] = []
    for turn in turns_of(request):
        if turn.role == "assistant":
            calls = [ToolCallPart(call.name, call.arguments, call.id) for call in turn.calls]
            texts = [] if calls and not turn.content else [TextPart(str(turn.content))]
            history.append(ModelResponse(parts=[*texts, *calls]))
        elif history and isinstance(history[-1], ModelRequest):
            history[-1].parts = [*history[-1].parts, _part(turn)]
        else:
            history.append(ModelRequest(parts=[_part(turn)]))
    asked = [message for message in history if isinstance(message, ModelRequest)]
    asked[-1].instructions = request.task.instructions
    return history


def _part(turn: Turn) -> ModelRequestPart:
    from pydantic_ai.messages import SystemPromptPart, ToolReturnPart, UserPromptPart  # noqa: PLC0415

    if turn.role == "tool":
        return ToolReturnPart(turn.calls[0].name, str(turn.content), turn.calls[0].id)
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
