"""Chat messages in OpenAI's form: only those that every adapter sends whole; others are refused, never cut."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import orjson

from lbr.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lbr.core.types import Json

TOOL_ROLE = "tool"
ROLES = ("system", "developer", "user", "assistant", TOOL_ROLE)
_FIELDS = {
    "assistant": {"role", "content", "tool_calls"},
    TOOL_ROLE: {"role", "content", "tool_call_id", "name"},
}


def check_messages(messages: Json) -> None:
    """Raise InputError, which names the message, for messages that could not be sent as they are."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"expected messages to be a list of at least one, got: {_shown(messages)}")
    called: dict[str, str] = {}
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"message {number}", called)
    if all(message["role"] == "assistant" for message in messages):
        raise InputError("no message is of the user; add one")


def _check_message(message: Json, where: str, called: dict[str, str]) -> None:
    """Check one message; `called` maps the ids of the tool calls so far to the names of the tools."""
    if not isinstance(message, dict):
        raise InputError(f"expected {where} to be an object, got: {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"expected {where} to have the role {' or '.join(ROLES)}, got: {_shown(role)}")
    _check_fields(message, _FIELDS.get(role, {"role", "content"}), where)
    if calls := message.get("tool_calls"):
        for call in calls if isinstance(calls, list) else [calls]:
            _check_call(call, where)
            called[call["id"]] = call["function"]["name"]
    if role == TOOL_ROLE:
        _check_tool(message.get("tool_call_id"), message.get("name"), where, called)
    if isinstance(content, str) or (content is None and calls):
        return
    if not isinstance(content, list):
        raise InputError(f"expected the content of {where} to be text or a list of parts, got: {_shown(content)}")
    for part in content:
        _check_part(part, where, images=role == "user")


def _check_tool(call: Json, name: Json, where: str, called: Mapping[str, str]) -> None:
    if not isinstance(call, str) or call not in called:
        raise InputError(f"the tool_call_id of {where} is not of an earlier tool call: {_shown(call)}")
    if name is not None and name != called[call]:
        raise InputError(f"{where} has the name {_shown(name)}, but the tool called is {called[call]!r}")


def _check_fields(given: Mapping[str, Json], known: Iterable[str], where: str) -> None:
    """Refuse fields that no adapter sends, unless they are empty, as in a reply that was dumped whole."""
    if unknown := sorted(n for n, value in given.items() if value not in (None, [], {}) and n not in known):
        raise InputError(f"lbr does not send these fields of {where}: {', '.join(map(repr, unknown))}; remove them")


def _check_call(call: Json, where: str) -> None:
    match call:
        case {"id": str(), "type": "function", "function": {"name": str(), "arguments": str(arguments)}}:
            _check_fields(call, ("id", "type", "function"), f"the tool call of {where}")
            _check_fields(call["function"], ("name", "arguments"), f"the tool call of {where}")
        case _:
            raise InputError(
                f'expected the tool calls of {where} to be like {{"id": "…", "type": "function", "function": '
                f'{{"name": "…", "arguments": "{{…}}"}}}}, got: {_shown(call)}'
            )
    try:
        fits = not arguments or isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        fits = False
    if not fits:
        raise InputError(f"expected the arguments of {where} to be a JSON object in a string, got: {_shown(arguments)}")


def _check_part(part: Json, where: str, *, images: bool) -> None:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "image_url"):
        raise InputError(f"expected the parts of {where} to be text or image_url, got: {kind!r}")
    _check_fields(part, ("type", kind), f"the {kind} part of {where}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"expected the text of {where} to be a string, got: {_shown(part.get('text'))}")
    elif images:
        _check_image(part.get("image_url"), where)
    else:
        raise InputError(f"{where} has an image; only messages of the user may have images")


def _check_image(image: Json, where: str) -> None:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise InputError(
            f'expected an image of {where} to be like {{"type": "image_url", "image_url": {{"url": "https://…"}}}}, '
            f"got: {_shown(image)}"
        )
    if isinstance(image, dict):
        _check_fields(image, ("url", "detail"), f"the image of {where}")
    if url.startswith("data:"):
        try:
            _check_data_url(url)
        except ValueError as error:
            raise InputError(f"expected a base64 data: URL in {where}, got: {error}") from error
    elif not url.lower().startswith(("https://", "http://")):
        raise InputError(
            f"expected an image of {where} to have an https:, http: or data: URL, got: {_shown(url)}; lbr reads no image "
            f"files: put the file into a base64 data: URL"
        )


def _check_data_url(url: str) -> None:
    """Raise ValueError for a damaged data: URL; decoders leave out the characters that they do not know."""
    _, marker, data = url.partition(";base64,")
    if not marker:
        raise ValueError('Data URI must be base64-encoded (expected ";base64," marker)')
    base64.b64decode(unquote_to_bytes(data))
    if not base64.b64decode("".join(data.split()), validate=True):
        raise ValueError("no data")


def _shown(value: Json) -> str:
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
