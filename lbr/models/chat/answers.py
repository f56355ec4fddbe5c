"""What comes back: the text of an answer, in any envelope. Only the text is required; what else is odd is not known."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lbr.core.errors import CallError, Family
from lbr.core.types import Reply
from lbr.models.endings import check_answer, ending_of
from lbr.models.failures import call_error, clean, filter_words, message_in, page_words, status_in

if TYPE_CHECKING:
    from lbr.core.errors import Usage
    from lbr.models.chat.costs import Costs
    from lbr.models.chat.request import Endpoint

_EVENTS = ("data:", "event:", "id:", "retry:", ":")
"""How server-sent events begin."""


class Envelope(NamedTuple):
    """The parts of an answer that are read; each is empty if it is missing or of another type."""

    body: dict[str, Any]
    choice: dict[str, Any]
    message: dict[str, Any]


class Reader:
    """Reads the answers of one endpoint."""

    def __init__(self, endpoint: Endpoint, costs: Costs, api_key: str | None = None) -> None:
        self._model = endpoint.model
        self._tags = endpoint.thinking_tags
        self._costs = costs
        self._api_key = api_key

    def read(self, content: bytes, charset: str = "") -> Reply:
        """Read the body of an answer with a status of 2xx. Raises CallError, with what came, if it cannot be used."""
        whole = True
        try:
            parsed = orjson.loads(content)
        except orjson.JSONDecodeError:
            parsed, whole = self.parse_leniently(content, charset)
        envelope = envelope_of(parsed)
        body, choice, message = envelope
        text = _without_thoughts(text_in(message.get("content")), self._tags)
        usage = self.check(envelope, text, whole=whole)
        ending = ending_of(choice.get("finish_reason"))
        refusal = message.get("refusal")
        if not text.strip() or ending not in {"stop", "length"} or refusal:
            raw = content.decode(errors="replace")
            if not choice:
                words = "expected an answer, got: JSON without one; `lbr show` has it as it came"
                raise CallError(words, family=Family.BAD_ANSWER, kind="UnreadAnswer", text=raw, usage=usage)
            why = filter_words(choice) or filter_words(body)
            refusal = refusal if isinstance(refusal, str) else None
            check_answer(text, ending, usage, raw=raw, refusal=refusal, why=why)
        model = body.get("model")
        name = model if isinstance(model, str) and model else self._model
        return Reply(text=text, usage=usage, model=name, finish_reason=ending)

    def check(self, envelope: Envelope, text: str, *, whole: bool) -> Usage:
        """Return an answer's usage. Raises CallError, with its text, if it was cut off or has an error in its place.

        An error beside a text counts if it has a status, or if the answer has no finish reason.
        """
        usage = self._costs.usage(envelope.body)
        ending = ending_of(envelope.choice.get("finish_reason"))
        error = envelope.body.get("error") or envelope.choice.get("error")
        if not whole:
            failed = CallError("the stream of the answer was cut off", kind="UnreadAnswer")
        elif error and (not text.strip() or status_in(error) is not None or ending is None):
            words = "expected an answer, got: the error " + orjson.dumps(error, default=str).decode()
            body = error if message_in(error) else None
            failed = call_error(words, status=status_in(error) or 0, body=body, api_key=self._api_key)
        else:
            return usage
        failed.text, failed.usage, failed.finish_reason = text if text.strip() else None, usage, ending
        raise failed

    def parse_leniently(self, content: bytes, charset: str) -> tuple[Any, bool]:
        """Return what orjson cannot parse: other JSON, or server-sent events; and whether all of it came.

        Raises CallError, with the text, for anything else.
        """
        text = decoded(content, charset)
        try:
            return json.loads(text, strict=False), True
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith(_EVENTS):
                return _assembled(text)
            page = page_words(text)
            if page is not None:  # of a proxy or a portal, and no answer of a model
                words, kept = f"expected JSON, got: the page {page!r}", None
            elif text.strip():
                words, kept = f"the answer is cut off, or no JSON: {error}", text
            else:
                words, kept = "the answer is empty", None
            raise CallError(clean(words, self._api_key), kind="UnreadAnswer", text=kept) from error


def envelope_of(parsed: Any) -> Envelope:
    """Return the parts of a body, or of the first in a list of bodies."""
    body = _object(parsed[0] if isinstance(parsed, list) and parsed else parsed)
    if not body.get("choices") and isinstance(body.get("provider"), dict):
        body = body["provider"]  # OpenRouter may pass on the whole answer in there
    choices = body.get("choices")
    choice = _object(choices[0] if isinstance(choices, list) and choices else choices)
    return Envelope(body, choice, _object(choice.get("message")))


def _object(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def text_in(content: Any) -> str:
    """Return the text of a message's content, which may come in parts, without those that are the model's thoughts."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type", "text") in {"text", "output_text"}:
            part = part.get("text")  # noqa: PLW2901
        if isinstance(part, str):
            texts.append(part)
    return "".join(texts)


def _without_thoughts(text: str, tags: tuple[str, str]) -> str:
    start_tag, end_tag = tags
    if start_tag not in text:
        return text
    text = re.sub(f"{re.escape(start_tag)}.*?{re.escape(end_tag)}", "", text, flags=re.DOTALL)
    return text.replace(start_tag, "", 1)  # of a thought without an end, only the tag is left out


def decoded(content: bytes, charset: str) -> str:
    """Return the text of a body; `charset` may be empty or unknown. What cannot be decoded is replaced."""
    with suppress(UnicodeDecodeError):  # whatever the header says
        return content.decode("utf-8-sig")
    try:
        return content.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return content.decode(errors="replace")


def _assembled(text: str) -> tuple[dict[str, Any], bool]:
    """Return the answer that server-sent events add up to, and whether all of them came."""
    body: dict[str, Any] = {}
    parts: dict[str, list[str]] = {"content": [], "refusal": []}
    ending, whole = None, False
    for line in re.split(r"\r\n|\r|\n", text):  # str.splitlines would also split inside of JSON strings
        name, _, data = line.partition(":")
        if name.strip() != "data":
            continue
        if data.strip() == "[DONE]":
            whole = True
            break
        try:
            event = _object(json.loads(data, strict=False))
        except (ValueError, RecursionError):
            break
        body |= {name: event[name] for name in ("model", "usage", "service_tier", "error") if event.get(name)}
        choices = event.get("choices")
        for choice in map(_object, choices if isinstance(choices, list) else []):
            if choice.get("index", 0) == 0:
                delta = _object(choice.get("delta") or choice.get("message"))
                for name, texts in parts.items():
                    texts.append(text_in(delta.get(name)))
                ending = choice.get("finish_reason") or ending
    message = {name: "".join(texts) for name, texts in parts.items()}
    answer = {**body, "choices": [{"message": message, "finish_reason": ending}]}
    return answer, whole or ending is not None or "error" in body
