"""What an answer took: tokens as the provider counts them, and what they cost."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from lbr.errors import NO_USAGE, Usage

if TYPE_CHECKING:
    from lbr.models.chat.endpoints import Endpoint

_NANOS = 10**9


class Costs:
    """Reads usage as the price table of genai-prices has it for one endpoint; `warm` has to come first.

    That package takes half a second to import, so it is done in a thread while other calls go on.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._table: Any = None
        self._extract: Any = None
        self._warming: asyncio.Task[None] | None = None

    async def warm(self) -> None:
        """Load the price table, once."""
        if self._extract is not None:
            return
        if self._warming is None:
            self._warming = asyncio.create_task(asyncio.to_thread(self._load))
        await asyncio.shield(self._warming)

    def _load(self) -> None:
        from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

        self._table = get_snapshot()
        self._extract = self._extractor()

    def _extractor(self) -> Any:
        """Return what reads a usage object: the provider's that the URL belongs to, else of the name, else OpenAI's."""
        where = ((None, self._endpoint.base_url), (self._endpoint.provider, None), ("openai", None))
        for provider, url in where:
            try:
                return self._table.find_provider(None, provider, url).extract_usage
            except LookupError:
                continue
        raise LookupError("expected the price table to know OpenAI")

    def usage(self, body: dict[str, Any]) -> Usage | None:
        """Return what a plain answer took; None where the table cannot tell even the tokens."""
        told = body.get("usage")
        if told is None:
            return NO_USAGE
        counted = {name: value for name, value in told.items() if value is not None}
        try:
            _, found = self._extract({"model": self._endpoint.model, "usage": counted}, api_flavor="chat")
            tokens = found.input_tokens, found.output_tokens
        except Exception:  # noqa: BLE001 - the table is another's
            return None
        if type(tokens[0]) is not int or type(tokens[1]) is not int:
            return None
        said = told.get("cost") if self._endpoint.provider == "openrouter" else None
        if said:
            return Usage(*tokens, round(Decimal(str(float(said))) * _NANOS))
        if (told.get("prompt_tokens_details") or {}).get("cache_write_tokens"):
            return None
        return Usage(*tokens, self._cost_nanos(body, found))

    def _cost_nanos(self, body: dict[str, Any], found: Any) -> int | None:
        """Return what the table says that an answer costs, None where it does not know."""
        if not body["model"]:
            return None
        tier = body.get("service_tier")
        context = {"service_tier": tier} if tier else None
        for provider, url in ((None, self._endpoint.base_url), (self._endpoint.provider, None)):
            try:
                price = self._table.calc(found, body["model"], provider, url, datetime.now(UTC), context)
            except LookupError:
                continue
            except Exception:  # noqa: BLE001 - an unknown price must not lose an answer that is paid for
                return None
            return round(price.total_price * _NANOS)
        return None
