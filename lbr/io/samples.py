"""Which of the inputs to take: all, the first ones, or some at random."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from operator import itemgetter
from random import Random
from typing import TYPE_CHECKING

from lbr.core.config import at_least_one
from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lbr.core.types import Item


@dataclass(frozen=True, slots=True)
class Sample:
    """The first `limit` inputs, and of these `pick` at random; None for all. Raises UsageError for a bad number.

    The same inputs and the same `seed` give the same sample; a smaller one is part of a larger one.
    """

    limit: int | None = None
    pick: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.limit is not None:
            at_least_one("limit", self.limit, most=10**12)
        if self.pick is not None:
            at_least_one("pick", self.pick)
        elif self.seed is not None:
            raise UsageError("--seed needs --pick")

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of the sample in their order; a pick reads all others before the first one."""
        first = iter(items) if self.limit is None else itertools.islice(items, self.limit)
        return first if self.pick is None else self._picked(first, self.pick)

    def _picked(self, items: Iterator[Item], size: int) -> Iterator[Item]:
        """Yield the items that draw the smallest random numbers; only these are held in memory."""
        draws = iter(Random(self.seed or 0).random, None)  # noqa: S311 - not for secrets
        chosen = heapq.nsmallest(size, zip(draws, itertools.count(), items, strict=False))
        for _, _, item in sorted(chosen, key=itemgetter(1)):
            yield item


ALL = Sample()
