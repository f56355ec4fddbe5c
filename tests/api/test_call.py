"""The options of prompt_map and stream: their types for checkers are those of the real signatures."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import lbr
from lbr.api.call import Call, MapOptions, StreamOptions

POSITIONAL = {"prompts", "worker", "model_name", "openrouter_api_key"}
OF_TYPES = {"result_type", "return_dtype"}


@pytest.mark.parametrize(
    ("function", "options", "others"),
    [
        (lbr.prompt_map, MapOptions, POSITIONAL | OF_TYPES),
        (lbr.prompt_map_sync, MapOptions, POSITIONAL | OF_TYPES),
        (lbr.stream, StreamOptions, {"prompts", "function", "result_type"}),
    ],
)
def test_the_options_for_checkers_are_the_real_ones(function: Any, options: Any, others: set[str]) -> None:
    """Each name and type is in both; words are literals for checkers, and texts for Python."""
    real = {name: str(one.annotation) for name, one in inspect.signature(function).parameters.items()}
    typed = {name: one.__forward_arg__ for name, one in options.__annotations__.items()}
    assert typed.keys() | others == real.keys()
    for name, one in typed.items():
        assert real[name] == (re.sub(r"Literal\[.*?\]", "str", one)), name


def test_a_call_does_not_show_its_key() -> None:
    """Neither in messages nor in a debugger."""
    assert "sk-secret" not in repr(Call(["a"], "offline:echo", None, openrouter_api_key="sk-secret"))
