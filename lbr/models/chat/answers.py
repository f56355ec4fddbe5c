"""What comes back: the text of an answer, in any envelope. Only the text is required; what else is odd is not known."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Mapping

ANSWER_TOOL = "answer"
"""The tool whose arguments are the answer, for models that take no schema in another way."""


EVENTS = ("data:", "event:", "id:", "retry:", ":")
"""How server-sent events begin."""
CUT_OFF_STREAM = "the stream of the answer was cut off"


class Reader:
    """Reads the answers of one model."""

    def __init__(self, provider: str, model: str, base_url: str, api_key: str | None = None) -> None:
        self.costs = Costs(provider, model, base_url)
        self._api_key = api_key

    def read(self, content: bytes) -> Reply:
        """Read the body of an answer with a status of 2xx. Raises CallError, with what came, if it cannot be used."""
        body = _object(self._parse(content))
        choices = body.get("choices")
        choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
        message = _object(choice.get("message"))
        text = _without_thoughts(_text_of(message))
        usage, ending = self.costs.usage(body), ending_of(choice.get("finish_reason"))
        if error := body.get("error") or choice.get("error"):
            self._check_error(error, text, usage, ending)
        refusal = message.get("refusal")
        if not text.strip() or ending not in {"stop", "length"} or refusal:
            raw = content.decode(errors="replace")
            if not choice:
                words = "expected an answer, got: JSON without one; `lbr show` has it as it came"
                raise CallError(words, family=Family.BAD_ANSWER, kind="UnreadAnswer", text=raw, usage=usage)
            why = filter_words(choice) or filter_words(body)
            refusal = refusal if isinstance(refusal, str) else None
            check_answer(text, ending, usage, raw=raw, refusal=refusal, why=why)
        name = body.get("model")
        model = name if isinstance(name, str) and name else self.costs.model
        return Reply(text=text, usage=usage, model=model, finish_reason=ending)

    def _check_error(self, error: Any, text: str, usage: Usage, ending: str | None) -> None:
        """Raise CallError for an error in the place of an answer, or one that broke the answer off."""
        status = status_in(error)
        if error is CUT_OFF_STREAM:
            failed = CallError(CUT_OFF_STREAM, kind="UnreadAnswer")
        elif text.strip() and status is None and ending is not None:
            return
        else:
            words = "expected an answer, got: the error " + orjson.dumps(error, default=str).decode()
            body = error if message_in(error) else None
            failed = call_error(words, status=status or 0, body=body, api_key=self._api_key)
        failed.text, failed.usage, failed.finish_reason = text if text.strip() else None, usage, ending
        raise failed

    def _parse(self, content: bytes) -> Any:
        """Parse JSON, also if it is a little damaged, or server-sent events that were not requested.

        Raises CallError, with the text, for anything else.
        """
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            text = content.decode("utf-8-sig", errors="replace")
        try:
            return json.loads(text, strict=False)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith(EVENTS):
                return _assembled(text)
            page = page_words(text)
            if page is not None:  # of a proxy or a portal, and no answer of a model
                words, kept = f"expected JSON, got: the page {page!r}", None
            elif text.strip():
                words, kept = f"the answer is cut off, or no JSON: {error}", text
            else:
                words, kept = "the answer is empty", None
            raise CallError(clean(words, self._api_key), kind="UnreadAnswer", text=kept) from error


def _assembled(text: str) -> dict[str, Any]:
    """Return the answer that server-sent events add up to, with an error if not all of them came."""
    body: dict[str, Any] = {}
    parts: dict[str, list[str]] = {"content": [], "refusal": []}
    ending, whole = None, False
    for line in re.split(r"\r\n|\r|\n", text):  # str.splitlines would also split inside of JSON strings
        name, _, data = line.partition(":")
        if name.strip() != "data":
            continue
        if whole := data.strip() == "[DONE]":
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
                    texts.append(_text_of({"content": delta.get(name)}))
                ending = choice.get("finish_reason") or ending
    if not whole and ending is None:
        body.setdefault("error", CUT_OFF_STREAM)
    message = {name: "".join(texts) for name, texts in parts.items()}
    return {**body, "choices": [{"message": message, "finish_reason": ending}]}


def _object(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def _text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, which may come in parts, without those that are the model's thoughts."""
    match message:
        case {"tool_calls": [{"function": {"name": name, "arguments": str(arguments)}}, *_]} if name == ANSWER_TOOL:
            return arguments
        case {"content": str(text)}:
            return text
        case {"content": [*parts]}:
            texts = (part.get("text") if _is_text(part) else part for part in parts)
            return "".join(text for text in texts if isinstance(text, str))
    return ""


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") in {"text", "output_text"}


def _without_thoughts(text: str) -> str:
    if "<think>" not in text:
        return text
    text = re.sub("<think>.*?</think>", "", text, flags=re.DOTALL)
    return text.replace("<think>", "", 1)  # of a thought without an end, only the tag is left out


class Costs:
    """Reads the usage of one model's calls. Call `begin` before a call, and wait for `ready` before `usage`.

    The table takes half a second to import, so it is loaded in a thread beside the first call. If that fails, tokens
    are as the provider reported them and the cost is not known, until a later try succeeds.
    """

    def __init__(self, provider: str, model: str, base_url: str) -> None:
        self.model = model
        self._reports_cost = provider == "openrouter"
        self._places = ((None, base_url), (provider, None))
        self._table: Any = None
        self._counts: list[tuple[tuple[str, ...], str]] = []
        self._loading: asyncio.Task[None] | None = None
        self._rates = functools.lru_cache(maxsize=64)(self._find_rates)

    def begin(self) -> None:
        """Start to load the price table, unless it is loaded or being loaded."""
        if self._table is None and (self._loading is None or self._loading.done()):
            self._loading = asyncio.create_task(self._load())

    async def ready(self, seconds: float) -> None:
        """Wait for the price table, at most this long: the answer that waits is paid for."""
        if self._table is None and self._loading is not None:
            await asyncio.wait([self._loading], timeout=seconds)

    async def _load(self) -> None:
        with suppress(Exception):  # `loading_table` keeps it for the log
            self._counts, self._table = await asyncio.to_thread(self._read_table)

    def _read_table(self) -> tuple[list[tuple[tuple[str, ...], str]], Any]:
        with loading_table():
            from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

            table = get_snapshot()
            return _counts_in(table, (*self._places, ("openai", None))), table

    def usage(self, body: Mapping[str, Any]) -> Usage:
        """Return what an answer took, as far as its body says so."""
        usage = body.get("usage")
        if type(usage) is not dict:
            return NO_USAGE
        prompt, completion = _tokens_in(usage)
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
        name = model if isinstance(model, str) and model else self.model
        minute = int(time.time()) // 60  # prices may change with the time of day
        try:
            found = self._rates(name, tier if isinstance(tier, str) else None, minute)
            return None if found is None else _price_of(counts, *found)
        except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
            return None

    def _find_rates(self, name: str, tier: str | None, _minute: int) -> tuple[Any, dict[str, Any], set[str]] | None:
        """Return what the table has for a model, and its prices by kind of token; None if it does not know the model."""
        for place in self._places:
            with suppress(LookupError):
                provider, model = self._table.find_provider_model(name, None, *place)
                own = tier and any(one is model for one in provider.models)  # a tier is the model's own provider's
                found = model.get_prices(datetime.now(UTC), {"service_tier": tier} if own else None)
                prices = {
                    kind.replace("_mtok", "_tokens"): price for kind, price in vars(found).items() if price is not None
                }
                odd = {kind for kind, price in prices.items() if kind not in _KINDS or type(price) is not Decimal}
                return found, prices, odd | ({"input_tokens"} if "requests_kcount" in odd else set())
        return None


_CACHED = ("cache_read_tokens", "cache_write_tokens")
_KINDS = frozenset({"input_tokens", "output_tokens", *_CACHED})


def _price_of(counts: Mapping[str, int], table: Any, prices: Mapping[str, Any], odd: set[str]) -> Decimal | None:
    """Return what these tokens cost in dollars, by prices per million; None if the counts contradict each other.

    Only the table knows what tokens of the kinds in `odd` cost.
    """
    if not odd.isdisjoint(counts):
        from genai_prices import Usage as Tokens  # noqa: PLC0415

        total: Decimal = table.calc_price(Tokens(**counts))["total_price"]  # ten times slower
        return total
    plain, cost = counts["input_tokens"], Decimal(0)
    for kind in _CACHED:
        if kind in counts and kind in prices:
            plain -= counts[kind]
            cost += counts[kind] * prices[kind]
    cost += plain * prices.get("input_tokens", 0) + counts["output_tokens"] * prices.get("output_tokens", 0)
    return cost / 1_000_000 if plain >= 0 else None


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


def _tokens_in(usage: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the tokens of prompt and completion; None for one that is neither reported nor follows from the total.

    If only the total is known, it stands for the prompt.
    """
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    completion = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    total = _count(usage.get("total_tokens"))
    if total is not None and prompt is None:
        prompt = max(total - (completion or 0), 0)
    elif total is not None and prompt is not None and completion is None:
        completion = max(total - prompt, 0)
    return prompt, completion


def _count(value: Any) -> int | None:
    """Return a count that may be written as a float or as text; None for anything else."""
    if type(value) is int:
        return value if 0 <= value <= MAX_TOKENS else None
    try:
        number = math.nan if value is True else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= MAX_TOKENS and number.is_integer() else None
