"""Some of the inputs: the first ones, or a random sample."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest

from lbr.core.errors import UsageError
from lbr.core.types import Item, Prompt
from lbr.io.samples import Sample


def items(count: int) -> list[Item]:
    return [Item(Prompt(str(number))) for number in range(count)]


def numbers(sample: Sample, count: int) -> list[int]:
    return [int(item.prompt.text or "") for item in sample.of(items(count))]


def test_a_sample_is_in_order_repeats_and_is_part_of_a_larger_one() -> None:
    """Whatever the sizes and the seed: distinct inputs, as many as there are, in input order."""
    random = Random(4)
    for _ in range(200):
        count, size, seed = random.randrange(60), random.randint(1, 40), random.randrange(9)
        found = numbers(Sample(pick=size, seed=seed), count)
        assert found == sorted(set(found))
        assert len(found) == min(size, count)
        assert found == numbers(Sample(pick=size, seed=seed), count)
        assert set(found) <= set(numbers(Sample(pick=size + random.randrange(5), seed=seed), count))


def test_every_input_is_picked_equally_often() -> None:
    """Of 2,000 seeds, each of 10 inputs is in a sample of 3 in about 600."""
    counts = Counter(itertools.chain.from_iterable(numbers(Sample(pick=3, seed=seed), 10) for seed in range(2_000)))
    assert sum(counts.values()) == 6_000
    assert all(abs(count - 600) < 100 for count in counts.values())


def test_a_limit_reads_no_further() -> None:
    """What follows the first inputs stays in the stream; a sample is of the first ones."""
    stream = iter(items(10))
    assert len(list(Sample(limit=4).of(stream))) == 4
    assert len(list(stream)) == 6
    assert max(numbers(Sample(limit=5, pick=5), 10)) == 4
    assert numbers(Sample(), 3) == [0, 1, 2]


@pytest.mark.parametrize("bad", [{"limit": 0}, {"pick": 0}, {"pick": 10**7}, {"limit": True}, {"seed": 3}])
def test_bad_numbers_are_refused(bad: dict[str, Any]) -> None:
    """A seed without a pick would do nothing."""
    with pytest.raises(UsageError, match="expected|--seed needs --pick"):
        Sample(**bad)
