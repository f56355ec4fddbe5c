"""Endpoints that speak OpenAI's chat completions, called with aiohttp and orjson.

What is out of the ordinary is left to `lbr.models.pydantic_ai`, which serves every provider.
"""

from lbr.models.chat.endpoints import endpoint_of, knows, serves, words_of
from lbr.models.chat.model import ChatModel

__all__ = ["ChatModel", "endpoint_of", "knows", "serves", "words_of"]
