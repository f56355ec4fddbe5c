"""Functions and objects that are called, of every kind."""

from __future__ import annotations

import functools
from typing import Any


def shout(text: Any) -> Any:
    return text.upper()


def two(left: Any, text: Any) -> Any:
    return left + text


class Caller:
    """Callable, and with every kind of method."""

    def __call__(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    async def later(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    def now(self, text: Any) -> Any:
        """Answer."""
        return text.upper()

    @classmethod
    def of_class(cls, text: Any) -> Any:
        """Answer."""
        return text.upper()

    @staticmethod
    def static(text: Any) -> Any:
        """Answer."""
        return text.upper()


class AsyncCaller:
    """Callable, and asynchronous."""

    async def __call__(self, text: Any) -> Any:
        """Answer."""
        return text.upper()


async def shout_later(text: Any) -> Any:
    return text.upper()


def coroutine_maker(text: Any) -> Any:
    return shout_later(text)


def nested(bound: Any) -> Any:
    def inner(text: Any) -> Any:
        return text + str(bound)

    return inner


def decorate(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(text: Any) -> Any:
        return function(text)

    return wrapper


@decorate
def decorated(text: Any) -> Any:
    return text


@functools.cache
def cached(text: Any) -> Any:
    return text
