"""What comes back: the text of an answer, in whatever envelope it came.

A server that speaks OpenAI's language may leave anything out of an answer, or put anything into it. Only the text is
required; what else cannot be read is not known.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lbr.core.errors import CallError, Family
from lbr.core.types import Reply
from lbr.models.chat.kinds import categories_of, kind_of
from lbr.models.endings import check_answer, ending_of, filter_words
from lbr.models.refusals import ProviderError, call_error, message_in, status_in
from lbr.models.wording import clean, page_words

if TYPE_CHECKING:
    from lbr.core.errors import Usage
    from lbr.models.chat.costs import Costs
    from lbr.models.chat.endpoints import Endpoint

_EVENTS = ("data:", "event:", "id:", "retry:", ":")
"""How server-sent events begin."""


class Envelope(NamedTuple):
    """The parts of an answer that are read; each is empty if it is missing or of another type."""

    body: dict[str, Any]
    choice: dict[str, Any]
    message: dict[str, Any]

    @property
    def error(self) -> Any:
        """What the server says went wrong, beside the answer or in its place."""
        return self.body.get("error") or self.choice.get("error")


class Reader:
    """Reads the answers of one endpoint."""

    def __init__(self, endpoint: Endpoint, costs: Costs, api_key: str | None = None) -> None:
        self._model = endpoint.model
        self._tags = endpoint.thinking_tags
        self._costs = costs
        self._api_key = api_key

    def read(self, content: bytes, charset: str = "") -> Reply:
        """Read the body of an answer with a status of 2xx. Raises CallError for one that cannot be used."""
        whole = True
        try:
            parsed = orjson.loads(content)
        except orjson.JSONDecodeError:
            parsed, whole = self.read_otherwise(content, charset)
        envelope = envelope_of(parsed)
        body, choice, message = envelope
        text = _answer_in(text_in(message.get("content")), self._tags)
        usage = self.check(envelope, text, whole=whole)
        ending = ending_of(choice.get("finish_reason"))
        refusal = message.get("refusal")
        refusal = refusal if isinstance(refusal, str) and refusal else None
        if not text.strip() or ending not in {"stop", "length"} or refusal:
            raw = content.decode(errors="replace")
            why = filter_words(choice) or filter_words(body)
            if not choice:
                raise CallError(
                    "expected an answer, got: JSON without one; `lbr show` has it as it came",
                    family=Family.BAD_ANSWER,
                    kind="UnreadAnswer",
                    text=raw,
                    usage=usage,
                )
            check_answer(text, ending, usage, raw=raw, refusal=refusal, why=why)
        model = body.get("model")
        name = model if isinstance(model, str) and model else self._model
        return Reply(text=text, usage=usage, model=name, finish_reason=ending)

    def check(self, envelope: Envelope, text: str, *, whole: bool) -> Usage:
        """Return what an answer took. Raises CallError, with its text, if it was cut off or has an error in its place.

        An error beside a text counts if it has a status, or if the answer has no finish reason.
        """
        usage = self._costs.usage(envelope.body)
        ending = ending_of(envelope.choice.get("finish_reason"))
        if not whole:
            raise CallError(
                "the stream of the answer was cut off",
                kind="UnreadAnswer",
                text=text,
                usage=usage,
                finish_reason=ending,
            )
        error = envelope.error
        if error and (not text.strip() or status_in(error) is not None or ending is None):
            raise self._failed(error, text, usage, ending)
        return usage

    def read_otherwise(self, content: bytes, charset: str) -> tuple[Any, bool]:
        """Read what orjson does not: other JSON, or server-sent events; return it and whether all of it came.

        Raises CallError for what is neither, with the text.
        """
        text = decoded(content, charset)
        try:
            return json.loads(text, strict=False), True
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith(_EVENTS):
                return _assembled(text)
            page = page_words(text)
            if page is not text:  # a proxy's or a portal's, and no answer of a model
                words = f"expected JSON, got: the page {page!r}"
                raise CallError(clean(words, self._api_key), kind="UnreadAnswer") from error
            words = (
                "the answer is empty" if not text.strip() else f"the answer is cut off, or no JSON: {error}"
            )
            raise CallError(
                clean(words, self._api_key), kind="UnreadAnswer", text=text if text.strip() else None
            ) from error

    def _failed(self, error: Any, text: str, usage: Usage, ending: str | None) -> CallError:
        """Return the failure that a server reports with a status of 2xx."""
        status = status_in(error) or 0
        kind = kind_of(status, error)
        words = "expected an answer, got: the error " + orjson.dumps(error, default=str).decode()
        found = call_error(
            ProviderError(
                kind, categories_of(kind), words, status=status, body=error if message_in(error) else None
            ),
            api_key=self._api_key,
        )
        found.text, found.usage, found.finish_reason = text if text.strip() else None, usage, ending
        return found


def envelope_of(parsed: Any) -> Envelope:
    """Return the parts of a body, or of the first in a list of bodies."""
    body = _object(parsed[0] if isinstance(parsed, list) and parsed else parsed)
    if not body.get("choices") and isinstance(body.get("provider"), dict):
        body = body["provider"]  # OpenRouter may pass the whole answer on in there
    choices = body.get("choices")
    choice = _object(choices[0] if isinstance(choices, list) and choices else choices)
    return Envelope(body, choice, _object(choice.get("message")))


def _object(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def text_in(content: Any) -> str:
    """Return the text of a message's content, which may come in parts; what a model thought is not part of it."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type", "text") in {"text", "output_text"}:
            part = part.get("text")  # noqa: PLW2901
        if isinstance(part, str):
            texts.append(part)
    return "".join(texts)


def _answer_in(text: str, tags: tuple[str, str]) -> str:
    """Return an answer without what the model thought aloud in it."""
    start_tag, end_tag = tags
    if start_tag not in text:
        return text
    said: list[str] = []
    while (start := text.find(start_tag)) >= 0:
        said.append(text[:start])
        text = text[start + len(start_tag) :]
        end = text.find(end_tag)
        if end < 0:
            break  # the tag is lost, but not what follows it
        text = text[end + len(end_tag) :]
    return "".join([*said, text])


def decoded(content: bytes, charset: str) -> str:
    """Return the text of a body; `charset` may be empty or unknown, and what is not in it is replaced."""
    with suppress(UnicodeDecodeError):  # whatever the header says
        return content.decode("utf-8-sig")
    try:
        return content.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return content.decode(errors="replace")


def _assembled(text: str) -> tuple[dict[str, Any], bool]:
    """Return the answer that server-sent events add up to, and whether they came to their end."""
    body: dict[str, Any] = {}
    said: dict[str, list[str]] = {"content": [], "refusal": []}
    ending, ended = None, False
    for line in re.split(r"\r\n|\r|\n", text):  # str.splitlines would also split inside of JSON strings
        name, _, data = line.partition(":")
        if name.strip() != "data":
            continue
        if data.strip() == "[DONE]":
            ended = True
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
                for name, parts in said.items():
                    parts.append(text_in(delta.get(name)))
                ending = choice.get("finish_reason") or ending
    message = {name: "".join(parts) for name, parts in said.items()}
    whole = {**body, "choices": [{"message": message, "finish_reason": ending}]}
    return whole, ended or ending is not None or "error" in body
