"""Prices and token estimates. Money is in US dollars when users write it, and in integer billionths (nanos) when counted."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.errors import MAX_NANOS, DatabaseError, Usage, UsageError
from lbr.core.messages import texts_in
from lbr.core.types import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lbr.core.types import Json, Prompt, Task

FORM = "in=0.15,out=0.60 (US dollars per million input and output tokens)"
MAX_PRICE = 1_000_000.0
"""Dollars per million tokens: a dollar per token is a typing error."""
NANOS = 10**9
CHARACTERS_PER_TOKEN = 4
"""What English comes to with most tokenizers."""
ASSUMED_OUTPUT_TOKENS = 256
"""Tokens of an answer that nothing limits."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in US dollars per million tokens of input and of output."""

    input_per_million: float
    output_per_million: float

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
        return replace(usage, cost_nanos=cost if cost <= MAX_NANOS else None)

    def words(self) -> str:
        """Return the price as `read_price` reads it."""
        prices = (Decimal(str(price)).normalize() for price in (self.input_per_million, self.output_per_million))
        return "in={:f},out={:f}".format(*prices)

    def to_dict(self) -> dict[str, float]:
        """Return the price as JSON has it."""
        return {"in": self.input_per_million, "out": self.output_per_million}

    def to_json(self) -> str:
        """Return the text that the store keeps."""
        return orjson.dumps(self.to_dict()).decode()

    @classmethod
    def from_json(cls, text: str) -> Price:
        """Read a stored price. Raises DatabaseError if it is not one."""
        try:
            found = orjson.loads(text)
            return cls(_number(found["in"]), _number(found["out"]))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DatabaseError(f"expected a stored price, got: {text[:200]!r}") from error


def read_price(text: str) -> Price:
    """Read `in=0.15,out=0.60`, in either order. Raises UsageError for anything else."""
    try:
        (first, low), (second, high) = (part.split("=") for part in text.split(","))
        found = {first.strip(): _number(low), second.strip(): _number(high)}
        return Price(found["in"], found["out"])
    except (KeyError, ValueError):
        raise UsageError(
            f"expected a price like {FORM}, from 0 to {MAX_PRICE:,.0f} each, got: {text[:100]!r}"
        ) from None


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


def table_price(model: str) -> Price | None:
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
        found = calc_price(Tokens(input_tokens=1_000, output_tokens=1_000), name, provider_id=provider)
        return Price(_number(found.input_price * 1_000), _number(found.output_price * 1_000))
    except Exception:  # noqa: BLE001 - another's package and table, which may be damaged in any way
        return None


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
