"""The values of lbr: what a task's key is made of, and what is stored of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from lbr.core.errors import DatabaseError
from lbr.core.types import KeyMaker, Prompt, Task
from lbr.store.runs import differences

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "answer": {"type": "boolean"}},
    "required": ["reasoning", "answer"],
}
GUIDED = {"type": "object", "properties": {"b": {}, "a": {}}}
TASK = Task(
    model="openai-chat:gpt-4o-mini",
    instructions="judge",
    settings={"top_p": 1.0, "extra_body": {"top_k": 20, "guided_json": GUIDED}, "max_tokens": 9},
    schema=SCHEMA,
)


def reordered(value: Any) -> Any:
    """Return a JSON value with the keys of its objects in another order."""
    if not isinstance(value, dict):
        return value
    return {name: reordered(value[name]) for name in reversed(value)}


@pytest.mark.parametrize("task", [TASK, replace(TASK, settings=reordered(TASK.settings), schema=reordered(SCHEMA))])
def test_keys_stay_what_they_were(task: Task) -> None:
    """Answers of earlier versions are found by these keys, whatever the order of the schema and the settings."""
    maker = KeyMaker(task)
    assert maker.key(Prompt(text="p")).hex() == "c1fef4b580554bea2ea7936aad24dcce"
    messages = ({"role": "user", "content": "p"},)
    assert maker.key(Prompt(messages=messages)).hex() == "65d10c9f03140d74d013973cee29094f"


def test_a_stored_task_keeps_its_order() -> None:
    """What is read back has its schema, settings and the body's fields as they were given."""
    read = Task.from_json(TASK.to_json())
    assert read.to_json() == TASK.to_json()
    assert read.schema is not None
    assert list(read.schema["properties"]) == ["reasoning", "answer"]
    assert list(read.settings) == ["top_p", "extra_body", "max_tokens"]
    assert list(read.settings["extra_body"]["guided_json"]["properties"]) == ["b", "a"]


def test_differences_are_those_of_the_keys() -> None:
    """Another order is no difference; another kind of number is one, for its key differs."""
    assert differences(TASK, replace(TASK, schema=reordered(SCHEMA))) == []
    assert differences(TASK, replace(TASK, settings={**TASK.settings, "top_p": 1})) != []


class TestPromptWithSettings:
    """A prompt may bring settings of its own."""

    MESSAGES = ({"role": "user", "content": "p"},)
    SETTINGS: ClassVar[dict[str, Any]] = {
        "top_p": 1.0,
        "extra_body": {"z": 1, "response_format": GUIDED},
        "max_tokens": 9,
    }

    @pytest.mark.parametrize("prompt", [{"text": "p"}, {"messages": MESSAGES}])
    def test_they_are_part_of_the_key_whatever_their_order(self, prompt: dict[str, Any]) -> None:
        """Only equal settings share a key, and never one with a prompt that looks like what is stored."""
        maker = KeyMaker(TASK)
        own = Prompt(**prompt, settings=self.SETTINGS)
        texts = [Prompt(**prompt), Prompt(own.body()), Prompt(**prompt, settings={**self.SETTINGS, "max_tokens": 8})]
        assert len({maker.key(one) for one in (own, *texts)}) == 4
        assert maker.key(Prompt(**prompt, settings=reordered(self.SETTINGS))) == maker.key(own)
        assert maker.key(Prompt("p", settings={"seed": 1})).hex() == "77df62baba5125359541b7c740dd0c5a"

    @pytest.mark.parametrize("prompt", [{"text": "p"}, {"messages": MESSAGES}])
    def test_they_are_stored_in_the_order_in_which_they_are_sent(self, prompt: dict[str, Any]) -> None:
        """The order of a schema's properties counts for a model."""
        own = Prompt(**prompt, settings=self.SETTINGS)
        read = Prompt.from_body(own.body(), chat=True)
        assert (read, own.form) == (own, 2)
        assert read.settings is not None
        assert list(read.settings["extra_body"]["response_format"]["properties"]) == ["b", "a"]

    @pytest.mark.parametrize("body", ["{}", '{"text": "p"}', '{"messages": [1], "settings": {}}', '{"settings": {}}'])
    def test_what_another_program_wrote_is_refused(self, body: str) -> None:
        """A body that is neither messages nor one with settings is an error of the database."""
        with pytest.raises(DatabaseError, match="expected stored messages to be a list of objects"):
            Prompt.from_body(body, chat=True)
