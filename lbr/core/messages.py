"""Chat messages in OpenAI's form: only those that every adapter sends whole; others are refused, never cut."""

from __future__ import annotations

import base64
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lbr.core.types import Json

_FIELDS = {
    "system": ("role", "content"),
    "developer": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
"""The fields of a message, by its role."""
_CALL = '{"id": "…", "type": "function", "function": {"name": "…", "arguments": "{…}"}}'
_IMAGE = '{"type": "image_url", "image_url": {"url": "https://…"}}'


def texts_in(content: Json) -> list[str]:
    """Return the texts of a message's content: itself, or those of its parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return [text for text in texts if isinstance(text, str)]


def with_instructions(messages: Sequence[dict[str, Json]], instructions: str | None) -> list[dict[str, Json]]:
    """Return messages with a task's instructions behind the system messages that they begin with."""
    if instructions is None:
        return [*messages]
    systems = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [*messages[:systems], {"role": "system", "content": instructions}, *messages[systems:]]


def check_messages(messages: Json) -> list[dict[str, Any]]:
    """Return messages as they are sent. Raises InputError, which names the message, if a part would not be sent.

    Only a user's content may be a list of parts.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"expected messages to be a list of at least one, got: {_shown(messages)}")
    called: dict[str, str] = {}
    sent = [_check_message(message, f"message {number}", called) for number, message in enumerate(messages, start=1)]
    if all(message["role"] == "assistant" for message in sent):
        raise InputError("no message is of the user; add one")
    return sent


def _check_message(message: Json, where: str, called: dict[str, str]) -> dict[str, Any]:
    """Check one message; `called` maps the ids of the tool calls so far to the names of the tools."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _FIELDS:
        raise InputError(f"expected {where} to have the role {' or '.join(_FIELDS)}, got: {_shown(message)}")
    _check_fields(message, _FIELDS[role], where)
    calls, content = message.get("tool_calls"), message.get("content")
    for call in calls if isinstance(calls, list) else [calls] * bool(calls):
        _check_call(call, where)
        called[call["id"]] = call["function"]["name"]
    if role == "tool":
        call = message.get("tool_call_id")
        if not isinstance(call, str) or call not in called or message.get("name") not in (None, called[call]):
            raise InputError(f"the tool_call_id or name of {where} is not of an earlier tool call: {_shown(message)}")
    if isinstance(content, list):
        content = [_check_part(part, where, role) for part in content]
        if role != "user":
            content = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and calls):
        raise InputError(f"expected the content of {where} to be text or a list of parts, got: {_shown(content)}")
    sent = {"role": "system" if role == "developer" else role, "content": content}
    return sent | {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}


def _check_fields(given: Mapping[str, Json], known: tuple[str, ...], where: str) -> None:
    """Refuse fields that no adapter sends, unless they are empty, as in a reply that was dumped whole."""
    if unknown := sorted(n for n, value in given.items() if value not in (None, [], {}) and n not in known):
        raise InputError(f"lbr does not send these fields of {where}: {', '.join(map(repr, unknown))}; remove them")


def _check_call(call: Json, where: str) -> None:
    match call:
        case {"id": str(), "type": "function", "function": {"name": str(), "arguments": str(arguments)} as function}:
            _check_fields(call, ("id", "type", "function"), f"the tool call of {where}")
            _check_fields(function, ("name", "arguments"), f"the tool call of {where}")
        case _:
            raise InputError(f"expected the tool calls of {where} to be like {_CALL}, got: {_shown(call)}")
    with suppress(orjson.JSONDecodeError):
        if not arguments or isinstance(orjson.loads(arguments), dict):
            return
    raise InputError(f"expected the arguments of {where} to be a JSON object in a string, got: {_shown(arguments)}")


def _check_part(part: Json, where: str, role: str) -> dict[str, Any]:
    match part:
        case {"type": "text", "text": str(text)}:
            _check_fields(part, ("type", "text"), f"the text part of {where}")
            return {"type": "text", "text": text}
        case {"type": "image_url"} if role != "user":
            raise InputError(f"{where} has an image; only messages of the user may have images")
        case {"type": "image_url", "image_url": ({"url": str(url)} | str(url)) as image}:
            _check_fields(part, ("type", "image_url"), f"the image_url part of {where}")
            if isinstance(image, dict):
                _check_fields(image, ("url", "detail"), f"the image of {where}")
            _check_url(url, where)
            return {"type": "image_url", "image_url": image if isinstance(image, dict) else {"url": image}}
        case _:
            raise InputError(f"expected the parts of {where} to be text, or images like {_IMAGE}, got: {_shown(part)}")


def _check_url(url: str, where: str) -> None:
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        with suppress(ValueError):  # decoders leave out the characters that they do not know
            if head.endswith(";base64") and base64.b64decode("".join(data.split()), validate=True):
                return
        raise InputError(f"expected a base64 data: URL in {where}, got: {_shown(url)}")
    if not url.lower().startswith(("https://", "http://")):
        raise InputError(
            f"expected an image of {where} to have an https:, http: or data: URL, got: {_shown(url)}; lbr reads no image "
            f"files: put the file into a base64 data: URL"
        )


def _shown(value: Json) -> str:
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
