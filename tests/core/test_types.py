"""The values of lbr: what a task's key is made of, and what is stored of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lbr.core.types import KeyMaker, Prompt, Task, differences

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
