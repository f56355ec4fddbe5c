"""Endpoints that speak OpenAI's chat completions, called with aiohttp and orjson; pydantic-ai serves all others."""
