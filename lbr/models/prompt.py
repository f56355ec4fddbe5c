"""A request as a list of turns, in no provider's format; all adapters send these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbr.core.errors import InputError, Permanent
from lbr.core.messages import check_messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.types import Json, Prompt
    from lbr.models.base import Request


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its URL, which may be a `data:` URL whose base64 has been checked."""

    url: str
    detail: Json = None


class ToolCall(NamedTuple):
    """The assistant's call of a tool, with its arguments as JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's message. Only a user's content may be a list of parts.

    `calls`: the tool calls of an assistant's turn, or the one call that a tool's turn answers.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[str | Image]
    calls: tuple[ToolCall, ...] = ()


def turns_of(request: Request) -> list[Turn]:
    """Return a request's prompt, and its answer that did not validate if there is one; without the instructions.

    Raises Permanent for messages of which a part would not be sent.
    """
    turns = list(_turns(request.prompt))
    if request.last_bad is not None:
        if request.last_bad.text.strip():
            turns.append(Turn("assistant", request.last_bad.text))
        words = f"That answer does not fit what was asked for: {request.last_bad.message}\nGive a corrected answer."
        turns.append(Turn("user", words))
    return turns


def _turns(prompt: Prompt) -> Iterator[Turn]:
    if prompt.messages is None:
        yield Turn("user", prompt.text or "")
        return
    try:  # again: an older version may have enqueued them
        check_messages(prompt.messages)
    except InputError as error:
        raise Permanent(str(error)) from error
    called: dict[str, ToolCall] = {}
    for message in prompt.messages:
        content = _contents(message.get("content"))
        text = content if isinstance(content, str) else "".join(map(str, content))
        match message["role"]:
            case "user":
                yield Turn("user", content)
            case "assistant":
                calls = tuple(
                    ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                    for call in message.get("tool_calls") or ()
                )
                called |= {call.id: call for call in calls}
                yield Turn("assistant", text, calls)
            case "tool":
                yield Turn("tool", text, (called[message["tool_call_id"]],))
            case _:
                yield Turn("system", text)


def _contents(content: Json) -> str | list[str | Image]:
    if not isinstance(content, list):
        return content or ""
    return [part["text"] if part["type"] == "text" else _image(part["image_url"]) for part in content]


def _image(image: Json) -> Image:
    return Image(image["url"], image.get("detail")) if isinstance(image, dict) else Image(image)
