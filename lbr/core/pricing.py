"""Prices and token estimates. Money is in US dollars when users write it, and in integer billionths (nanos) when counted."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import orjson

from lbr.core.errors import MAX_NANOS, DatabaseError, Usage, UsageError
from lbr.core.messages import texts_in
from lbr.core.types import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.core.types import Json, Prompt, Task

FORM = "in=0.15,out=0.60 (US dollars per million input and output tokens; cached=0.08 for input from the cache)"
MAX_PRICE = 1_000_000.0
"""Dollars per million tokens: a dollar per token is a typing error."""
NANOS = 10**9
CHARACTERS_PER_TOKEN = 4
"""What English comes to with most tokenizers."""
ASSUMED_OUTPUT_TOKENS = 256
"""Tokens of an answer that nothing limits."""
BATCH_FACTOR = 0.5
"""What flex and batch cost of the standard price, if the price table has no price of their own."""

Processing = Literal["standard", "flex", "batch"]


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in US dollars per million tokens of input and of output; flex and batch cost a factor of it.

    Input from the provider's cache costs as much as other input unless `cached_per_million` is set.
    """

    input_per_million: float
    output_per_million: float
    batch_factor: float = BATCH_FACTOR
    cached_per_million: float | None = None

    def at(self, processing: Processing) -> Price:
        """Return the price of calls that are processed so."""
        if processing == "standard":
            return self
        factor, cached = self.batch_factor, self.cached_per_million
        cached = None if cached is None else cached * factor
        return Price(self.input_per_million * factor, self.output_per_million * factor, factor, cached)

    def cost_nanos(self, input_tokens: int, output_tokens: int) -> int:
        """Return what this many tokens cost."""
        # A dollar per million tokens is a thousand nanos per token.
        return round(input_tokens * self.input_per_million * 1000 + output_tokens * self.output_per_million * 1000)

    def apply(self, usage: Usage) -> Usage:
        """Return the usage of a call with its cost at this price; unchanged if its tokens are not known."""
        if not (self.input_per_million or self.output_per_million):
            return replace(usage, cost_nanos=0)
        if usage.input_tokens is None or usage.output_tokens is None:
            return usage
        cost = self.cost_nanos(usage.input_tokens, usage.output_tokens)
        if self.cached_per_million is not None:
            cached = min(usage.cached_tokens or 0, usage.input_tokens)
            cost -= round(cached * (self.input_per_million - self.cached_per_million) * 1000)
        return replace(usage, cost_nanos=cost if cost <= MAX_NANOS else None)

    def words(self) -> str:
        """Return the price as `read_price` reads it."""
        return ",".join(f"{name}={Decimal(str(price)).normalize():f}" for name, price in self.to_dict().items())

    def to_dict(self) -> dict[str, float]:
        """Return the price as JSON has it."""
        cached = {} if self.cached_per_million is None else {"cached": self.cached_per_million}
        return {"in": self.input_per_million, "out": self.output_per_million} | cached

    def to_json(self) -> str:
        """Return the text that the store keeps."""
        factor = {} if self.batch_factor == BATCH_FACTOR else {"batch_factor": self.batch_factor}
        return orjson.dumps(self.to_dict() | factor).decode()

    @classmethod
    def from_json(cls, text: str) -> Price:
        """Read a stored price. Raises DatabaseError if it is not one."""
        try:
            found = orjson.loads(text)
            low, high, factor = map(_number, (found["in"], found["out"], found.get("batch_factor", BATCH_FACTOR)))
            return cls(low, high, factor, _number(found["cached"]) if "cached" in found else None)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DatabaseError(f"expected a stored price, got: {text[:200]!r}") from error


def read_price(text: str | None, batch_factor: float | None = None) -> Price | None:
    """Read `in=0.15,out=0.60`, perhaps with `cached=0.08`, in any order; None for None.

    `batch_factor`: what flex and batch cost of it. Raises UsageError for anything else, or a factor without a price.
    """
    if batch_factor is not None and (type(batch_factor) not in {int, float} or not 0 <= batch_factor <= 1):
        raise UsageError(f"expected --batch-factor to be a number from 0 to 1, got: {batch_factor!r}")
    if text is None:
        if batch_factor is not None:
            raise UsageError("--batch-factor is a factor of your own price; add --price in=…,out=…, or leave it out")
        return None
    try:
        found = _parts_of(text)
        factor = BATCH_FACTOR if batch_factor is None else float(batch_factor)
        return Price(found["in"], found["out"], factor, found.get("cached"))
    except (KeyError, ValueError):
        raise UsageError(
            f"expected a price like {FORM}, from 0 to {MAX_PRICE:,.0f} each, got: {text[:100]!r}"
        ) from None


def _parts_of(text: str) -> dict[str, float]:
    """Return the parts of a price by name. Raises ValueError for one that is odd, or given twice."""
    parts = [part.split("=") for part in text.split(",")]
    found = {name.strip(): _number(price) for name, price in parts}
    if len(found) < len(parts) or not found.keys() <= {"in", "out", "cached"}:
        raise ValueError(text)
    return found


def _number(value: Any) -> float:
    """Return a price as a number. Raises ValueError or TypeError if it is not a plausible one."""
    number = float(value)
    if not 0 <= number <= MAX_PRICE:
        raise ValueError(value)
    return abs(number)  # there is a -0.0


def dollars(nanos: int) -> str:
    """Write an amount of money with all its digits, at least two after the point."""
    whole, part = divmod(abs(nanos), NANOS)
    return f"{'-' if nanos < 0 else ''}${whole}.{f'{part:09}'.rstrip('0').ljust(2, '0')}"


_problem: str | None = None


@contextmanager
def loading_table() -> Iterator[None]:
    """Note whether the price table could be loaded in this block, whose exceptions pass."""
    global _problem  # noqa: PLW0603 - there is one table in a process
    try:
        yield
    except Exception as error:
        _problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise
    _problem = None


def table_problem() -> str | None:
    """Return why this process could not load the price table; None if it could, or did not try."""
    return _problem


def price_of(model: str, given: Price | None = None, processing: Processing = "standard") -> Price | None:
    """Return what calls of a model cost if they are processed so: at the user's price, else the price table's."""
    return table_price(model, processing) if given is None else given.at(processing)


def processing_of(settings: Mapping[str, Json]) -> Processing:
    """Return how a provider is asked to process calls with these settings."""
    body = settings.get("extra_body")
    tier = body.get("service_tier") if isinstance(body, dict) else None
    return "flex" if "flex" in (settings.get("service_tier"), tier) else "standard"


def table_price(model: str, processing: Processing = "standard") -> Price | None:
    """Return the installed price table's price of a model's full name, `provider:model`; None without one.

    Uses no network. If the price rises with the length of the input, it is that of a short one. If the table cannot be
    loaded, `table_problem` returns why.
    """
    provider, _, name = model.partition(":")
    if provider in {"offline", "function"} or not name:
        return None
    try:
        with loading_table():
            from genai_prices import Usage as Tokens  # noqa: PLC0415 - takes half a second
            from genai_prices import calc_price  # noqa: PLC0415
            from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

            get_snapshot()
        tokens = Tokens(input_tokens=1_000, output_tokens=1_000)
        found = calc_price(tokens, name, provider_id=provider)
        context, factor = table_context(found.provider, found.model, processing)
        if context:
            found = calc_price(tokens, name, provider_id=provider, price_context=context)
        return Price(*(_number(price * factor * 1_000) for price in (found.input_price, found.output_price)))
    except Exception:  # noqa: BLE001 - another's package and table, which may be damaged in any way
        return None


_CONTEXTS = {
    "flex": ({"service_tier": "flex"}, {"processing": "batch"}),  # providers sell both at one price
    "batch": ({"processing": "batch"},),
}
_SELL_FLEX = frozenset({"openai", "azure", "google"})
"""The providers at which flex is cheaper; Groq's is not."""


def table_context(provider: Any, model: Any, processing: Processing) -> tuple[dict[str, str] | None, Decimal]:
    """Return what selects the price table's price of a processing, and the factor that it still lacks.

    Without a price of their own in the table, flex and batch cost half.
    """
    if processing == "standard" or (processing == "flex" and provider.id not in _SELL_FLEX):
        return None, Decimal(1)
    now = datetime.now(UTC)
    if any(one is model for one in provider.models):  # else the table ignores what selects a price
        for context in _CONTEXTS[processing]:
            if model.get_prices(now, context) != model.get_prices(now):
                return context, Decimal(1)
    return None, Decimal(str(BATCH_FACTOR))


def table_models(provider: str) -> list[str]:
    """Return the models of a provider that are in the installed price table; none if it cannot be loaded."""
    try:
        from genai_prices.data import providers  # noqa: PLC0415 - takes half a second
    except Exception:  # noqa: BLE001 - as above
        return []
    ids = {provider, provider.removesuffix("-chat")}
    return [f"{provider}:{model.id}" for one in providers if one.id in ids for model in one.models]


def tokens_of(characters: int) -> int:
    """Return about how many tokens this many characters are, rounded up."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def characters_of(prompt: Prompt) -> int:
    """Return how many characters of a prompt the model reads: of chat messages their texts, without images."""
    if prompt.messages is None:
        return len(prompt.text or "")
    count = 0
    for message in prompt.messages:
        count += sum(map(len, texts_in(message.get("content")))) + len(str(message.get("tool_calls") or ""))
    return count


def task_characters(task: Task) -> int:
    """Return how many characters a task adds to each prompt: its instructions and its schema."""
    schema = 0 if task.schema is None else len(canonical_json(task.schema).decode())
    return len(task.instructions or "") + schema


def estimate_tokens(prompt: Prompt, task: Task) -> int:
    """Return about how many input tokens one call takes: prompt, instructions and schema."""
    return tokens_of(characters_of(prompt) + task_characters(task))


def _output_limits(settings: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield the settings that limit the length of an answer; the first one counts."""
    body = settings.get("extra_body")
    for name in ("max_completion_tokens", "max_tokens"):
        # The server decides what another value means.
        if isinstance(body, dict) and type(body.get(name)) is int and body[name] >= 1:
            yield name, body[name]
    if settings.get("max_tokens") is not None:
        yield "max_tokens", settings["max_tokens"]


def max_output_tokens(settings: Mapping[str, Json]) -> int | None:
    """Return how long an answer may be by its settings, None if nothing limits it. Raises UsageError for a bad value."""
    name, most = next(_output_limits(settings), ("", None))
    if most is not None and (type(most) is not int or most < 1):
        raise UsageError(f"expected {name} to be a whole number of at least 1, got: {most!r}")
    return most


def output_limit(settings: Mapping[str, Json]) -> str | None:
    """Return the setting that limits an answer, such as `max_tokens=500`; None if only the model limits it."""
    return next((f"{name}={most}" for name, most in _output_limits(settings)), None)
