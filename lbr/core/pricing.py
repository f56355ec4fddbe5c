"""What tokens cost: prices as people write them, as a price table knows them, and the money that comes of them.

Money is in US dollars where people write it, and in integer billionths of one (nanos) where it is counted.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.errors import MAX_NANOS, DatabaseError, Usage, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

FORM = "in=0.15,out=0.60 (US dollars for a million tokens of input and of output)"
HIGHEST = 1_000_000.0
"""Dollars for a million tokens: a dollar a token is a slip of the pen."""

NANOS = 10**9
_PROBE_TOKENS = 1_000
_OURS = ("offline", "function")
"""What stands before the first colon of an answerer that no price table knows."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a model takes, in US dollars for a million tokens of input and of output."""

    input_per_million: float
    output_per_million: float

    def cost_nanos(self, input_tokens: int, output_tokens: int) -> int:
        """Return what so many tokens cost."""
        # A dollar a million tokens is a thousand nanos a token.
        return round(
            input_tokens * self.input_per_million * 1000 + output_tokens * self.output_per_million * 1000
        )

    def apply(self, usage: Usage) -> Usage:
        """Return the usage of a call with its cost at this price; as it is where its tokens are not known.

        Where tokens cost nothing, it need not be known how many there are.
        """
        if not (self.input_per_million or self.output_per_million):
            return replace(usage, cost_nanos=0)
        if usage.input_tokens is None or usage.output_tokens is None:
            return usage
        cost = self.cost_nanos(usage.input_tokens, usage.output_tokens)
        return replace(usage, cost_nanos=cost if cost <= MAX_NANOS else None)

    def words(self) -> str:
        """Return the price as `read_price` reads it."""
        return f"in={_plain(self.input_per_million)},out={_plain(self.output_per_million)}"

    def to_dict(self) -> dict[str, float]:
        """Return the price as JSON has it."""
        return {"in": self.input_per_million, "out": self.output_per_million}

    def to_json(self) -> str:
        """Return the text that the store keeps."""
        return orjson.dumps(self.to_dict()).decode()

    @classmethod
    def from_json(cls, text: str) -> Price:
        """Read a stored price; DatabaseError when it is not one."""
        try:
            found = orjson.loads(text)
            return cls(_number(found["in"]), _number(found["out"]))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DatabaseError(f"expected a stored price, got: {text[:200]!r}") from error


def read_price(text: str) -> Price:
    """Read `in=0.15,out=0.60`, in any order; UsageError for anything else."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = _number(value)
        except ValueError:
            number = None
        if name not in {"in", "out"} or name in found or number is None:
            raise _no_price(text)
        found[name] = number
    if len(found) != 2:
        raise _no_price(text)
    return Price(found["in"], found["out"])


def _no_price(text: str) -> UsageError:
    return UsageError(f"expected a price like {FORM}, from 0 to {HIGHEST:,.0f} each, got: {text[:100]!r}")


def _number(value: Any) -> float:
    """Return a price as a number; ValueError or TypeError where it is none, or none that anybody asks."""
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= HIGHEST):
        raise ValueError(value)
    return abs(number)  # there is a -0.0


def _plain(value: float) -> str:
    """Write a number without an exponent and without zeros at its end."""
    text = f"{value:.12f}".rstrip("0").rstrip(".")
    return text if float(text) == value else repr(value)


_problem: str | None = None


@contextmanager
def loading_table() -> Iterator[None]:
    """Take note of whether the price table could be loaded in this block, whose exceptions pass."""
    global _problem  # noqa: PLW0603 - there is one table in a process
    try:
        yield
    except Exception as error:
        _problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise
    _problem = None


def table_problem() -> str | None:
    """Return why this process could not load the price table the last time; None where it did, or did not try."""
    return _problem


def table_price(model: str) -> Price | None:
    """Return what the price table that is installed says of a model's full name, `provider:model`; None if nothing.

    Needs no network. Where the price rises with the length of the input, it is that of a short one. Where the table
    cannot be loaded it says nothing, and `table_problem` says why.
    """
    provider, _, name = model.partition(":")
    if provider in _OURS or not name:
        return None
    try:
        with loading_table():
            from genai_prices import Usage as Tokens  # noqa: PLC0415 - half a second, for those who ask
            from genai_prices import calc_price  # noqa: PLC0415
            from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415

            get_snapshot()
    except Exception:  # noqa: BLE001 - the package is another's, and may be damaged in any way
        return None
    try:
        said = calc_price(
            Tokens(input_tokens=_PROBE_TOKENS, output_tokens=_PROBE_TOKENS), name, provider_id=provider
        )
        scale = 1_000_000 // _PROBE_TOKENS
        return Price(_number(said.input_price * scale), _number(said.output_price * scale))
    except Exception:  # noqa: BLE001 - the table is another's: what it cannot say, nobody knows
        return None


def dollars(nanos: int) -> str:
    """Write an amount of money, every digit of it, with two behind the point at least."""
    whole, part = divmod(abs(nanos), NANOS)
    return f"{'-' if nanos < 0 else ''}${whole}.{f'{part:09}'.rstrip('0').ljust(2, '0')}"
