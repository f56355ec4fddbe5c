"""What an answer took: tokens as the provider counts them, and what they cost.

The price table knows both, and takes a tenth of a millisecond to say so, a third of what all else about a call takes.
But for one model the tokens and the price grow evenly with what the provider counted, unless the price rises with the
length of the input; so it is asked at a few points, once a minute, and the rest is a multiplication.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

from lbr.core.errors import MAX_TOKENS, NO_USAGE, Usage
from lbr.core.pricing import loading_table
from lbr.models.loading import Loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbr.models.chat.endpoints import Endpoint

_NANOS = 10**9
_STEP = 1_000_000
_FAR = 8 * _STEP
_MAX_LINES = 256
_NOTHING = Decimal(0)
_COUNTS = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "total_tokens": "total_tokens",
}
"""The counts of a usage object, with the names that some servers give them."""
_DETAILS = ("prompt_tokens_details", "completion_tokens_details")

_KNOWN = frozenset(
    {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details",
        "completion_tokens_details",
        "cost",
        "cost_details",
        "is_byok",
    }
)
"""Parts of a usage object of which none but the counts says what was taken."""


class _Counts(NamedTuple):
    """What varies from call to call: `cached` are of the prompt, `reasoning` of the completion."""

    prompt: int
    completion: int
    cached: int
    reasoning: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """Tokens and price in dollars as the table has them; the price is None where it knows none."""

    input: int
    output: int
    price: Decimal | None


@dataclass(frozen=True, slots=True)
class _Line:
    """What one token more of each count adds to input, output and price; what no tokens take is nothing."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    price: tuple[Decimal, ...] | None

    def at(self, counts: _Counts) -> _Taken:
        """Return what so many tokens take."""
        input_ = sum(map(mul, counts, self.input))
        output = sum(map(mul, counts, self.output))
        if self.price is None:
            return _Taken(input_, output, None)
        return _Taken(input_, output, sum(map(mul, map(Decimal, counts), self.price), _NOTHING))


class Costs:
    """Reads usage as the price table of genai-prices has it for one endpoint; `begin` and `ready` have to come first.

    That package takes half a second to import, so it is done in a thread while other calls go on. Where the table
    cannot be loaded, tokens are what the provider counted and the cost is not known, until another try succeeds.
    """

    def __init__(self, endpoint: Endpoint, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._table: Any = None
        self._readers: list[Any] = []
        self._loading = Loading(self._load, clock=clock)
        self._lines: dict[object, _Line | None] = {}
        self._minute = 0

    def begin(self) -> None:
        """Start to load the price table beside the first call; again beside a later one where that failed."""
        if not self._readers:
            self._loading.begin()

    async def ready(self, seconds: float) -> None:
        """Wait for the price table, for so many seconds at most: whoever waits has an answer that is paid for."""
        if not self._readers:
            await self._loading.settled(seconds)

    def _load(self) -> None:
        with loading_table():
            from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

            self._table = table = get_snapshot()
            self._readers = list(self._found_readers(table))

    def _found_readers(self, table: Any) -> Iterator[Any]:
        """Yield what reads a usage object: the provider's that the URL belongs to, that of the name, and OpenAI's."""
        for provider, url in (*self._places, ("openai", None)):
            with suppress(LookupError):
                yield table.find_provider(None, provider, url).extract_usage

    def _extract(self, told: dict[str, Any]) -> Any:
        """Return the usage as the first that can read it has it. Raises LookupError when none can."""
        counted = {name: value for name, value in told.items() if value is not None}
        for reader in self._readers:
            with suppress(Exception):  # the table is another's
                return reader({"model": self._endpoint.model, "usage": counted}, api_flavor="chat")[1]
        raise LookupError("expected the price table to read a usage object")

    def usage(self, body: dict[str, Any]) -> Usage:
        """Return what an answer took, as far as it says so in a way that can be read."""
        told = counted(body)
        if told is None:
            return NO_USAGE
        price = self._said(told)
        if "completion_tokens" not in told:
            return Usage(told.get("prompt_tokens"), None, None if price is None else round(price * _NANOS))
        if "prompt_tokens" not in told:
            return Usage(None, told["completion_tokens"], None if price is None else round(price * _NANOS))
        model, tier = body.get("model"), body.get("service_tier")
        known = {
            "model": model if isinstance(model, str) and model else self._endpoint.model,
            "service_tier": tier if isinstance(tier, str) else None,
        }
        try:
            taken = self._taken_by(known, told)
        except Exception:  # noqa: BLE001 - the table is another's
            taken = _Taken(told["prompt_tokens"], told["completion_tokens"], None)
        if not price:
            # Free by the provider's word, unless the table knows better.
            price = taken.price if taken.price is not None else price
        return Usage(taken.input, taken.output, None if price is None else round(price * _NANOS))

    def _said(self, told: dict[str, Any]) -> Decimal | None:
        """Return the cost that the provider reports, None if it does not."""
        said = told.get("cost") if self._endpoint.provider == "openrouter" else None
        return None if said is None else Decimal(str(float(said)))

    def _taken_by(self, body: dict[str, Any], told: dict[str, Any]) -> _Taken:
        """Return what an answer took, as the table has it; while it is not there, what the provider counted."""
        if not self._readers:
            return _Taken(told["prompt_tokens"], told["completion_tokens"], None)
        counts = _counts_in(told)
        line = None if counts is None else self._line(body, told, counts)
        return self._taken(body, told) if line is None or counts is None else line.at(counts)

    def _line(self, body: dict[str, Any], told: dict[str, Any], counts: _Counts) -> _Line | None:
        """Return how tokens and price grow for answers like this one; None where they do not do so evenly."""
        minute = int(time.time()) // 60
        if minute != self._minute or len(self._lines) > _MAX_LINES:
            self._lines.clear()  # prices may change with the time of day
            self._minute = minute
        names = (_names(told.get("prompt_tokens_details")), _names(told.get("completion_tokens_details")))
        key = (body["model"], body.get("service_tier"), names, counts.cached > 0, counts.reasoning > 0)
        if key not in self._lines:
            self._lines[key] = self._learned(body, told, counts)
        return self._lines[key]

    def _learned(self, body: dict[str, Any], told: dict[str, Any], counts: _Counts) -> _Line | None:
        start = _Counts(_FAR, _FAR, _STEP if counts.cached else 0, _STEP if counts.reasoning else 0)
        try:
            if self._is_tiered(body):
                return None
            first = self._taken(body, _with(told, start), strict=True)
            ends = [self._taken(body, _with(told, _further(start, i)), strict=True) for i in range(4)]
        except Exception:  # noqa: BLE001 - the table is another's
            return None
        line = _Line(
            tuple((end.input - first.input) // _STEP for end in ends),
            tuple((end.output - first.output) // _STEP for end in ends),
            None
            if first.price is None
            else tuple(((end.price or _NOTHING) - first.price) / _STEP for end in ends),
        )
        return line if line.at(start) == first else None

    def _taken(self, body: dict[str, Any], told: dict[str, Any], *, strict: bool = False) -> _Taken:
        """Ask the table. Raises whatever it raises at the tokens; at the price, it is unknown unless `strict`."""
        found = self._extract(told)
        writes = (told.get("prompt_tokens_details") or {}).get("cache_write_tokens")
        if writes:
            found.cache_write_tokens = writes
        tokens = found.input_tokens, found.output_tokens
        if type(tokens[0]) is not int or type(tokens[1]) is not int:
            raise TypeError(f"expected whole tokens, got: {tokens}")
        try:
            return _Taken(*tokens, self._price(body, found))
        except Exception:
            if strict:
                raise
            return _Taken(*tokens, None)

    def _price(self, body: dict[str, Any], found: Any) -> Decimal | None:
        """Return what the table says that an answer costs, None where it does not know the model."""
        if not body["model"]:
            return None
        tier = body.get("service_tier")
        context = {"service_tier": tier} if tier else None
        for provider, url in self._places:
            try:
                asked = self._table.calc(found, body["model"], provider, url, datetime.now(UTC), context)
            except LookupError:
                continue
            price: Decimal = asked.total_price
            return price
        return None

    def _is_tiered(self, body: dict[str, Any]) -> bool:
        """Tell whether what a token costs depends on how many there are."""
        for provider, url in self._places:
            try:
                _, model = self._table.find_provider_model(body["model"], None, provider, url)
            except LookupError:
                continue
            return "TieredPrices" in repr((model.prices, model.price_variants))
        return False

    @property
    def _places(self) -> tuple[tuple[str | None, str | None], ...]:
        return ((None, self._endpoint.base_url), (self._endpoint.provider, None))


def counted(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the usage object of an answer without what cannot be read in it; None if there is none."""
    told = body.get("usage")
    if type(told) is not dict:
        return None
    return told if _is_plain(told) else _repaired(told)


def _is_plain(told: dict[str, Any]) -> bool:
    """Return whether a usage object is as nearly all are, so that nothing in it has to be checked again."""
    if any(type(told.get(name)) is not int or told[name] < 0 for name in _COUNTS):
        return False
    for name in _DETAILS:
        details = told.get(name)
        if details is not None and (type(details) is not dict or not all(map(_is_count, details.values()))):
            return False
    cost = told.get("cost")
    return cost is None or (type(cost) in {int, float} and 0 <= cost < math.inf)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _repaired(told: dict[str, Any]) -> dict[str, Any]:
    """Return a plain usage object of what can be read in an odd one; a count that is not known is left out.

    If only the total is known, it stands in the place of the input: the tokens count, but their cost is not known.
    """
    prompt, completion, total = (_whole(told.get(name, told.get(other))) for name, other in _COUNTS.items())
    if total is not None:
        if completion is None and prompt is not None and total >= prompt:
            completion = total - prompt
        elif prompt is None:
            prompt = total if completion is None else total - completion if total >= completion else None
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    found: dict[str, Any] = {name: count for name, count in counts.items() if count is not None}
    if len(found) == len(counts):
        found["total_tokens"] = sum(found.values())
    nothing = dict.fromkeys(_COUNTS, 0)
    kept = {name: told[name] for name in (*_DETAILS, "cost") if told.get(name) is not None}
    return found | {name: value for name, value in kept.items() if _is_plain({**nothing, name: value})}


def _whole(value: Any) -> int | None:
    """Return a count of tokens that may be written as a float or as text; None for what is none."""
    try:
        number = math.nan if value is True else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= MAX_TOKENS and number.is_integer() else None


def _counts_in(told: dict[str, Any]) -> _Counts | None:
    """Return the counts of a usage object; None where something else in it may count too."""
    prompt, completion = told["prompt_tokens"], told["completion_tokens"]
    of_prompt, of_completion = (
        told.get("prompt_tokens_details") or {},
        told.get("completion_tokens_details") or {},
    )
    cached, reasoning = of_prompt.get("cached_tokens") or 0, of_completion.get("reasoning_tokens") or 0
    if (
        not told.keys() <= _KNOWN
        or told["total_tokens"] != prompt + completion
        or cached > prompt
        or reasoning > completion
        or sum(filter(None, of_prompt.values())) != cached  # nobody counts below 0
        or sum(filter(None, of_completion.values())) != reasoning
    ):
        return None
    return _Counts(prompt, completion, cached, reasoning)


def _further(start: _Counts, which: int) -> _Counts:
    """Return counts of which one is a step higher; the same ones where there are none of it."""
    return _Counts(*(count + _STEP if i == which and count else count for i, count in enumerate(start)))


def _names(details: dict[str, Any] | None) -> tuple[str, ...]:
    return tuple(name for name, count in details.items() if count is not None) if details else ()


def _with(told: dict[str, Any], counts: _Counts) -> dict[str, Any]:
    """Return a usage object like another one with other counts."""
    made: dict[str, Any] = {
        **told,
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
    }
    for part, name, count in (
        ("prompt_tokens_details", "cached_tokens", counts.cached),
        ("completion_tokens_details", "reasoning_tokens", counts.reasoning),
    ):
        if count:
            made[part] = {**told[part], name: count}
    return made
