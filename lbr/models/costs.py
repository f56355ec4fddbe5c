"""What the calls of one model took: tokens by the provider's report, and dollars by the price table."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from lbr.core.errors import MAX_TOKENS, NO_USAGE, Usage
from lbr.core.pricing import loading_table, table_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbr.core.pricing import Processing


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
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))

    async def ready(self, seconds: float) -> None:
        """Wait for the price table, at most this long: the answer that waits is paid for."""
        if self._table is None and self._loading is not None:
            await asyncio.wait([self._loading], timeout=seconds)

    def _load(self) -> None:
        with suppress(Exception), loading_table():  # which keeps the exception for the log
            from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

            table = get_snapshot()
            self._counts = _counts_in(table, (*self._places, ("openai", None)))
            self._table = table

    def usage(self, body: Mapping[str, Any], processing: Processing = "standard") -> Usage:
        """Return what an answer took, as far as its body says so; `processing` is what was asked for."""
        usage = body.get("usage")
        if type(usage) is not dict:
            return NO_USAGE
        prompt, completion = _tokens_in(usage)
        cached: int | None = None
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
            prompt, completion, cached = counts["input_tokens"], counts["output_tokens"], counts.get(_CACHED[0])
            if not reported:
                # Free by the provider's report, unless the table knows better.
                price = self._price(body, counts, processing)
                reported = reported if price is None else price
        return Usage(prompt, completion, None if reported is None else round(reported * 10**9), cached)

    def _price(self, body: Mapping[str, Any], counts: Mapping[str, int], processing: Processing) -> Decimal | None:
        """Return the price by the table; None if it does not know the model."""
        model, tier = body.get("model"), body.get("service_tier")
        name = model if isinstance(model, str) and model else self.model
        if processing == "flex" and tier is not None and tier != "flex":
            processing = "standard"  # the provider reports how it processed the call
        minute = int(time.time()) // 60  # prices may change with the time of day
        try:
            found = self._rates(name, tier if isinstance(tier, str) else None, processing, minute)
            if found is None:
                return None
            price = _price_of(counts, *found[1:])
            return None if price is None else price * found[0]
        except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
            return None

    def _find_rates(
        self, name: str, tier: str | None, processing: Processing, _minute: int
    ) -> tuple[Decimal, Any, dict[str, Any], set[str]] | None:
        """Return a factor, what the table has for a model, and its prices by kind; None if it does not know the model."""
        for place in self._places:
            with suppress(LookupError):
                provider, model = self._table.find_provider_model(name, None, *place)
                own = any(one is model for one in provider.models)  # a tier is the model's own provider's
                context, factor = {"service_tier": tier} if tier and own else None, Decimal(1)
                if processing != "standard":
                    context, factor = table_context(provider, model, processing)
                found = model.get_prices(datetime.now(UTC), context)
                prices = {
                    kind.replace("_mtok", "_tokens"): price for kind, price in vars(found).items() if price is not None
                }
                odd = {kind for kind, price in prices.items() if kind not in _KINDS or type(price) is not Decimal}
                return factor, found, prices, odd | ({"input_tokens"} if "requests_kcount" in odd else set())
        return None


def cost_nanos(response: Any, processing: Processing) -> int | None:
    """Return what a response of pydantic-ai, whose call was asked to be processed so, cost; None if that is not known."""
    details = response.provider_details or {}
    try:
        if (reported := details.get("cost")) is not None:
            return round(Decimal(str(reported)) * 10**9)
        found, factor = response.cost(), Decimal(1)
        if processing == "batch" or (processing == "flex" and details.get("service_tier", "flex") == "flex"):
            context, factor = table_context(found.provider, found.model, processing)
            found = replace(response, provider_details={**details, **(context or {})}).cost()
        price: Decimal = found.total_price * factor
        return round(price * 10**9)
    except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
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
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    is_count = type(value) is not bool and 0 <= number <= MAX_TOKENS and number.is_integer()
    return int(number) if is_count else None
