"""Prices as people write them, the money and the tokens of calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbr.core.errors import DatabaseError, Family, Usage, UsageError
from lbr.core.pricing import (
    Price,
    characters_of,
    dollars,
    estimate_tokens,
    max_output_tokens,
    price_of,
    processing_of,
    read_price,
    table_price,
    task_characters,
    tokens_of,
)
from lbr.core.types import Failure, Outcome, Prompt, Reply, Task
from lbr.worker.attempt import priced
from tests.support import ECHO

MINI = Price(0.15, 0.6)
MODEL = "openai-chat:gpt-4o-mini"
UNREAD = Failure(Family.TRANSIENT, "UnreadAnswer", "no reader", text="{}")
LATE = Failure(Family.TRANSIENT, "CallTimeout", "no answer within 5 s")
BAD_PRICES = (
    "",
    "1",
    "in=1",
    "in=1,out=",
    "in=1,out=x",
    "in=1,in=2",
    "in=1,out=2,out=3",
    "in=-1,out=2",
    "in=nan,out=1",
    "in=1,out=inf",
    "in=1,out=1000001",
    "in=1;out=2",
    "input=1,output=2",
    "in=1,out=2,cached=",
    "in=1,cached=1",
    "in=1,out=2,cached=1,cached=1",
)


class TestPrices:
    """Prices as people write them, and the money that comes of them."""

    @pytest.mark.parametrize("text", ["in=0.15,out=0.60", "out=.6,in=0.150", " in = 0.15 , out = 6e-1 "])
    def test_a_price_is_read(self, text: str) -> None:
        """Both parts, in any order and with spaces."""
        assert read_price(text) == MINI

    @pytest.mark.parametrize("text", BAD_PRICES)
    def test_rubbish_is_refused_with_the_form(self, text: str) -> None:
        """What is no price is a usage error that shows one."""
        with pytest.raises(UsageError, match=r"expected a price like in=0\.15,out=0\.60"):
            read_price(text)

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_a_price_is_read_as_it_was_written(self, given_in: float, given_out: float) -> None:
        """Neither the words nor the store lose a digit."""
        price = Price(given_in, given_out)
        assert read_price(price.words()) == price
        assert Price.from_json(price.to_json()) == price

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"in": 1}', '{"in": -1, "out": 2}', '{"in": "x", "out": 2}'])
    def test_a_stored_price_that_is_none_is_a_database_error(self, text: str) -> None:
        """What another program has written there is not taken for a price."""
        with pytest.raises(DatabaseError, match="expected a stored price"):
            Price.from_json(text)

    def test_cost_is_exact(self) -> None:
        """A million tokens cost the price, one token a millionth of it, in whole nanos."""
        assert MINI.cost_nanos(1_000_000, 0) == 150_000_000
        assert MINI.cost_nanos(0, 1_000_000) == 600_000_000
        assert MINI.cost_nanos(7, 3) == 7 * 150 + 3 * 600
        assert Price(0, 0).cost_nanos(7, 3) == 0
        assert Price(0.0001, 0).cost_nanos(7, 3) == 1

    def test_a_run_price_overrides_what_the_provider_says(self) -> None:
        """Known tokens are priced anew; where they are not known, the provider's word stays."""
        assert MINI.apply(Usage(10, 20, 5)) == Usage(10, 20, 10 * 150 + 20 * 600)
        assert MINI.apply(Usage(10, None, 5)) == Usage(10, None, 5)
        assert MINI.apply(Usage(cost_nanos=5)) == Usage(cost_nanos=5)

    def test_cached_tokens_have_a_price_of_their_own(self) -> None:
        """If it is given; it is stored and printed with the others, and flex costs a factor of it too."""
        price = read_price("in=1,out=2,cached=0.1")
        assert price is not None
        assert price.apply(Usage(100, 10, None, 80)).cost_nanos == 20 * 1000 + 80 * 100 + 10 * 2000
        assert price.at("flex").apply(Usage(100, 10, None, 80)).cost_nanos == (20 * 1000 + 80 * 100 + 10 * 2000) / 2
        assert price.apply(Usage(100, 0, None, 900)).cost_nanos == 100 * 100
        assert Price.from_json(price.to_json()) == price == read_price(price.words())
        assert MINI.apply(Usage(10, 20, 5, 10)).cost_nanos == 10 * 150 + 20 * 600

    def test_a_cost_that_no_database_holds_is_left_out(self) -> None:
        """The counts stay."""
        assert Price(1e6, 1e6).apply(Usage(2**62, 1, 5)) == Usage(2**62, 1, None)

    def test_outcomes_are_priced_failed_ones_too(self) -> None:
        """The usage of a reply or of a failure gets its cost; all else stays."""
        reply = Outcome(Reply("a", Usage(1, 1), "m"), None, 5)
        failure = Outcome(None, Failure(Family.BAD_ANSWER, "BadAnswer", "no", usage=Usage(2, 1)), 5)
        assert priced(reply, MINI) == Outcome(Reply("a", Usage(1, 1, 750), "m"), None, 5)
        assert priced(failure, MINI).failure == Failure(Family.BAD_ANSWER, "BadAnswer", "no", usage=Usage(2, 1, 900))

    @pytest.mark.parametrize("model", [MODEL, "openrouter:google/gemini-2.5-flash", "anthropic:claude-sonnet-4-5"])
    def test_the_table_knows_models_by_our_names(self, model: str) -> None:
        """A well-known model of each kind of name has a price, output above input."""
        found = table_price(model)
        assert found is not None
        assert 0 < found.input_per_million < found.output_per_million

    def test_the_table_says_dollars_for_a_million(self) -> None:
        """A model whose price is known for certain has that price."""
        assert table_price(MODEL) == MINI

    @pytest.mark.parametrize(
        ("model", "processing", "factor"),
        [
            ("openai-chat:gpt-5-mini", "flex", 0.5),  # by the table's own prices
            ("openai-chat:gpt-5-mini", "batch", 0.5),
            ("azure:gpt-5-mini", "flex", 0.5),  # the table has none
            ("google:gemini-2.5-pro", "flex", 0.5),  # by its prices of a batch
            ("groq:openai/gpt-oss-20b", "flex", 1),  # Groq sells more calls a minute, at the same price
            ("groq:openai/gpt-oss-20b", "batch", 0.5),
        ],
    )
    def test_flex_and_batch_cost_half_where_they_do(self, model: str, processing: Any, factor: float) -> None:
        """By the table's own prices, else by half of the standard ones."""
        standard, found = table_price(model), price_of(model, None, processing)
        assert standard is not None
        assert found is not None
        assert found.output_per_million == pytest.approx(standard.output_per_million * factor)
        assert found.input_per_million < standard.input_per_million or factor == 1

    def test_a_price_of_ones_own_has_a_factor(self) -> None:
        """It is stored with the price, and comes before the table."""
        assert price_of(MODEL, MINI, "flex") == Price(0.075, 0.3)
        assert price_of(MODEL, MINI) is MINI
        own = read_price("in=1,out=2", 0.4)
        assert own is not None
        assert Price.from_json(own.to_json()) == own
        assert own.at("batch").to_dict() == {"in": 0.4, "out": 0.8}

    @pytest.mark.parametrize(("price", "factor"), [(None, 0.5), ("in=1,out=1", 1.5), ("in=1,out=1", float("nan"))])
    def test_a_factor_of_nothing_and_an_odd_one_are_refused(self, price: str | None, factor: float) -> None:
        """The message names the flag."""
        with pytest.raises(UsageError, match="--batch-factor"):
            read_price(price, factor)

    def test_processing_is_that_of_the_settings(self) -> None:
        """Wherever they have it."""
        assert (
            processing_of({"service_tier": "flex"}) == processing_of({"extra_body": {"service_tier": "flex"}}) == "flex"
        )
        assert processing_of({"service_tier": "priority"}) == processing_of({}) == "standard"

    @pytest.mark.parametrize("model", ["offline:echo", "function:m:f", f"{MODEL}-nobodys", "nobody:x", "x", ""])
    def test_what_the_table_does_not_know_has_no_price(self, model: str) -> None:
        """Offline models, functions and strangers have none."""
        assert table_price(model) is None

    @pytest.mark.parametrize(
        ("nanos", "text"),
        [
            (0, "$0.00"),
            (1, "$0.000000001"),
            (1_500_000_000, "$1.50"),
            (12_345_600_000, "$12.3456"),
            (-5, "-$0.000000005"),
        ],
    )
    def test_money_is_written_with_every_digit(self, nanos: int, text: str) -> None:
        """Nothing is rounded away, and there are cents at least."""
        assert dollars(nanos) == text

    def test_what_is_free_costs_nothing_however_many_tokens(self) -> None:
        """But a call that brought nothing is no call that was paid for."""
        free = Price(0, 0)
        assert priced(Outcome(Reply("a"), None, 5), free).usage == Usage(None, None, 0)
        assert priced(Outcome(None, UNREAD, 5), free).usage == Usage(None, None, 0)
        assert priced(Outcome(None, LATE, 5), free) == Outcome(None, LATE, 5)
        assert priced(Outcome(Reply("a"), None, 5), Price(0, 1)).is_unpriced


class TestTokens:
    """How many tokens a call takes, as far as that can be said."""

    @pytest.mark.parametrize(("characters", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4_000, 1_000)])
    def test_four_characters_are_a_token(self, characters: int, tokens: int) -> None:
        """Rounded up, so that no text is free."""
        assert tokens_of(characters) == tokens

    def test_messages_count_their_texts(self) -> None:
        """Roles and images are left out."""
        parts = [{"type": "text", "text": "12345"}, {"type": "image_url", "image_url": {"url": "x" * 999}}]
        chat = Prompt(messages=({"role": "system", "content": "123"}, {"role": "user", "content": parts}))
        assert characters_of(chat) == 8
        assert characters_of(Prompt(text="1234")) == 4

    def test_instructions_and_schema_come_on_top_of_each_prompt(self) -> None:
        """They are sent with every call."""
        task = Task(model=MODEL, instructions="12345", schema={"type": "object"})
        assert task_characters(task) == 5 + len('{"type":"object"}')
        assert estimate_tokens(Prompt(text="12"), task) == 6
        assert estimate_tokens(Prompt(text="12"), ECHO) == 1

    @pytest.mark.parametrize("rubbish", [0, -1, 1.5, "10", True])
    def test_rubbish_max_tokens_is_refused(self, rubbish: Any) -> None:
        """Only a whole number bounds an answer."""
        assert max_output_tokens({}) is None
        assert max_output_tokens({"max_tokens": 7}) == 7
        with pytest.raises(UsageError, match="expected max_tokens"):
            max_output_tokens({"max_tokens": rubbish})

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_a_limit_in_the_body_is_one(self, name: str) -> None:
        """Under either name, above the setting; what means no limit to a server is none."""
        assert max_output_tokens({"extra_body": {name: 100}}) == 100
        assert max_output_tokens({"extra_body": {name: 100}, "max_tokens": 7}) == 100
        assert max_output_tokens({"extra_body": {name: -1}}) is None
        assert max_output_tokens({"extra_body": "x", "max_tokens": 7}) == 7
