"""Endpoints that speak OpenAI's chat completions, called with aiohttp and orjson; pydantic-ai serves all others."""

from lbr.models.chat.model import ChatModel
from lbr.models.chat.request import endpoint_of, fields_of, knows, serves

__all__ = ["ChatModel", "endpoint_of", "fields_of", "knows", "serves"]
