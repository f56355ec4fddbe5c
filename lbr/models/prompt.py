"""A request as chat messages in OpenAI's form: one adapter sends them as they are, the other converts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lbr.core.errors import InputError, Permanent
from lbr.core.messages import check_messages

if TYPE_CHECKING:
    from lbr.core.types import Json
    from lbr.models.base import Request


def messages_of(request: Request) -> list[dict[str, Any]]:
    """Return a request's prompt, and its answer that did not validate if there is one; without the instructions.

    Only a user's content may be a list of parts. Raises Permanent for messages of which a part would not be sent.
    """
    prompt, last_bad = request.prompt, request.last_bad
    if prompt.messages is None:
        messages = [{"role": "user", "content": prompt.text or ""}]
    else:
        try:  # again: an older version may have enqueued them
            check_messages(prompt.messages)
        except InputError as error:
            raise Permanent(str(error)) from error
        messages = list(map(_message, prompt.messages))
    if last_bad is not None:
        if last_bad.text.strip():
            messages.append({"role": "assistant", "content": last_bad.text})
        words = f"That answer does not fit what was asked for: {last_bad.message}\nGive a corrected answer."
        messages.append({"role": "user", "content": words})
    return messages


def _message(message: dict[str, Json]) -> dict[str, Any]:
    """Return what is sent of a checked message."""
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        content = list(map(_part, content)) if role == "user" else "".join(part["text"] for part in content)
    sent = {"role": "system" if role == "developer" else role, "content": content}
    return sent | {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}


def _part(part: dict[str, Json]) -> dict[str, Json]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part["image_url"]
    return {"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}
