"""What comes back: the text of an answer, in any envelope. Only the text is required; what else is odd is not known."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from lbr.core.errors import MAX_TOKENS, NO_USAGE, CallError, Family, Usage
from lbr.core.pricing import loading_table
from lbr.core.types import Reply
from lbr.models.failures import (
    call_error,
    check_answer,
    clean,
    ending_of,
    filter_words,
    message_in,
    page_words,
    status_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lbr.models.chat.model import Endpoint

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


RETRY_SECONDS = 5.0
_LINEAR = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "output_mtok")


@dataclass(frozen=True, slots=True)
class _Rates:
    """Prices in dollars for a million tokens, None if the table has none; `table` has all that it has for the model.

    `others` are the kinds of tokens with prices of their own. If `is_linear` is false, the price of a token depends on
    how many there are, or a call costs something by itself.
    """

    table: Any
    others: frozenset[str]
    is_linear: bool
    input: Decimal | None
    cache_read: Decimal | None
    cache_write: Decimal | None
    output: Decimal | None

    def price(self, counts: Mapping[str, int]) -> Decimal | None:
        """Return what these tokens cost in dollars; None if the counts contradict each other."""
        if not self.is_linear or not self.others.isdisjoint(counts):
            from genai_prices import Usage as Tokens  # noqa: PLC0415

            total: Decimal = self.table.calc_price(Tokens(**counts))["total_price"]
            return total
        plain, price = counts.get("input_tokens", 0), Decimal(0)
        for rate, name in ((self.cache_read, "cache_read_tokens"), (self.cache_write, "cache_write_tokens")):
            if rate is not None and (count := counts.get(name)):
                plain -= count
                price += count * rate
        if plain < 0:
            return None
        return (price + plain * (self.input or 0) + counts.get("output_tokens", 0) * (self.output or 0)) / 1_000_000


class Costs:
    """Reads usage for one endpoint. Call `begin` before a call, and wait for `ready` before `usage`.

    The table takes half a second to import, so it is loaded in a thread beside the first call. If that fails, tokens
    are as the provider reported them and the cost is not known, until a later try succeeds.
    """

    def __init__(self, endpoint: Endpoint, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = endpoint.model
        self._reports_cost = endpoint.provider == "openrouter"
        self._places = ((None, endpoint.base_url), (endpoint.provider, None))
        self._clock = clock
        self._table: Any = None
        self._counts: list[tuple[tuple[str, ...], str]] = []
        self._loading: asyncio.Task[None] | None = None
        self._retry_at = math.inf
        self._rates: dict[tuple[str, str | None], _Rates | None] = {}
        self._minute = 0

    def begin(self) -> None:
        """Start to load the price table, unless it is loaded, is being loaded, or just could not be."""
        if self._table is None and (self._loading is None or self._clock() >= self._retry_at):
            self._retry_at = math.inf
            self._loading = asyncio.create_task(self._load())

    async def ready(self, seconds: float) -> None:
        """Wait for the price table, at most this long: the answer that waits is paid for."""
        if self._table is None and self._loading is not None:
            await asyncio.wait([self._loading], timeout=seconds)

    async def _load(self) -> None:
        try:
            with loading_table():
                self._counts, self._table = await asyncio.to_thread(self._read_table)
        except Exception:  # noqa: BLE001 - `loading_table` keeps it for the log
            self._retry_at = self._clock() + RETRY_SECONDS

    def _read_table(self) -> tuple[list[tuple[tuple[str, ...], str]], Any]:
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

        table = get_snapshot()
        return _counts_in(table, (*self._places, ("openai", None))), table

    def usage(self, body: Mapping[str, Any]) -> Usage:
        """Return what an answer took, as far as its body says so."""
        usage = body.get("usage")
        if type(usage) is not dict:
            return NO_USAGE
        prompt, completion = tokens_in(usage)
        cost: Any = usage.get("cost") if self._reports_cost else None
        reported = Decimal(str(cost)) if type(cost) in {int, float} and 0 <= cost < math.inf else None
        if prompt is not None and completion is not None and self._table is not None:
            counts = {"input_tokens": prompt, "output_tokens": completion}
            for path, name in self._counts:
                value: Any = usage
                for step in path:
                    value = value.get(step) if type(value) is dict else None
                if type(value) is int and value > 0:
                    counts[name] = counts.get(name, 0) + value
            prompt, completion = counts["input_tokens"], counts["output_tokens"]
            if not reported:
                # Free by the provider's report, unless the table knows better.
                price = self._price(body, counts)
                reported = reported if price is None else price
        return Usage(prompt, completion, None if reported is None else round(reported * 10**9))

    def _price(self, body: Mapping[str, Any], counts: Mapping[str, int]) -> Decimal | None:
        """Return the price by the table; None if it does not know the model."""
        model, tier = body.get("model"), body.get("service_tier")
        key = (
            model if isinstance(model, str) and model else self._model,
            tier if isinstance(tier, str) else None,
        )
        minute = int(time.time()) // 60
        if minute != self._minute:  # prices may change with the time of day
            self._rates.clear()
            self._minute = minute
        try:
            if key not in self._rates:
                self._rates[key] = self._found_rates(*key)
            rates = self._rates[key]
            return None if rates is None else rates.price(counts)
        except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
            return None

    def _found_rates(self, name: str, tier: str | None) -> _Rates | None:
        for place in self._places:
            with suppress(LookupError):
                provider, model = self._table.find_provider_model(name, None, *place)
                own = tier and any(one is model for one in provider.models)  # a tier is the model's own provider's
                found = model.get_prices(datetime.now(UTC), {"service_tier": tier} if own else None)
                prices = {field: price for field, price in vars(found).items() if price is not None}
                others = {field.replace("_mtok", "_tokens") for field in prices.keys() - set(_LINEAR)}
                known = [prices.get(field) for field in _LINEAR]
                is_linear = "requests_kcount" not in prices and {*map(type, known)} <= {Decimal, type(None)}
                return _Rates(found, frozenset(others), is_linear, *known)
        return None


def _counts_in(table: Any, places: Any) -> list[tuple[tuple[str, ...], str]]:
    """Return where usage objects have which count beside the two totals, by the first place that the table knows."""
    totals = {(("prompt_tokens",), "input_tokens"), (("completion_tokens",), "output_tokens")}
    found = {(("prompt_tokens_details", "cache_write_tokens"), "cache_write_tokens")}
    for provider, url in places:
        with suppress(LookupError, StopIteration, TypeError):
            extractors = table.find_provider(None, provider, url).extractors
            for one in next(one for one in extractors if one.api_flavor == "chat").mappings:
                found.add(((one.path,) if isinstance(one.path, str) else tuple(one.path), one.dest))
            break
    return list(found - totals)


def tokens_in(usage: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens of prompt and completion; None for one that is neither reported nor follows from the total.

    If only the total is known, it stands for the prompt.
    """
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is type(completion) is int and 0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS:
        return prompt, completion
    prompt = _whole(usage.get("prompt_tokens", usage.get("input_tokens")))
    completion = _whole(usage.get("completion_tokens", usage.get("output_tokens")))
    total = _whole(usage.get("total_tokens"))
    if total is not None:
        if completion is None and prompt is not None and total >= prompt:
            completion = total - prompt
        elif prompt is None:
            prompt = total if completion is None else total - completion if total >= completion else None
    return prompt, completion


def _whole(value: Any) -> int | None:
    """Return a count that may be written as a float or as text; None for anything else."""
    try:
        number = math.nan if value is True else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= MAX_TOKENS and number.is_integer() else None
