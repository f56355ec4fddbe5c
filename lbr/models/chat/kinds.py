"""What a refusal is called: by status, code, type and message of a server that speaks OpenAI's language.

The names are those of pydantic-ai's classes, for they are what `lbr status` counts and `--where error=…` selects.
"""

from __future__ import annotations

from typing import Any

_QUOTA = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
    }
)
_TOO_LONG = ("maximum context length", "reduce the length of the messages")
_OVERLOADED = ("overloaded", "over capacity")

_BY_STATUS = {
    400: "ModelRequestRejectedError",
    401: "ModelAuthenticationError",
    402: "ModelQuotaExceededError",
    403: "ModelAuthenticationError",
    404: "ModelNotFoundError",
    422: "ModelRequestRejectedError",
    429: "ModelRateLimitError",
    529: "ModelOverloadedError",
}

_WIDER = {
    "ModelOverloadedError": "ModelUnavailableError",
    "ModelContextWindowExceededError": "ModelRequestRejectedError",
    "ModelAuthenticationError": "ModelRequestRejectedError",
    "ModelNotFoundError": "ModelRequestRejectedError",
    "ModelTimeoutError": "ModelConnectionError",
}


def kind_of(status: int, error: Any) -> str:
    """Name a refusal with a status of 400 or more by that and by its error, the body's `error` or the body itself."""
    found: dict[str, Any] = error if isinstance(error, dict) else {}
    code = None if found.get("code") is None else str(found["code"])
    type_, said = found.get("type"), found.get("message")
    message = said.lower() if isinstance(said, str) else ""
    metadata = found.get("metadata")
    if (
        status == 403
        and isinstance(metadata, dict)
        and ("flagged_input" in metadata or "reasons" in metadata)
    ):
        return "ModelRequestRejectedError"  # what was asked is refused, not who asks
    if code in _QUOTA or (isinstance(type_, str) and type_ in _QUOTA):
        return "ModelQuotaExceededError"
    if code == "context_length_exceeded" or any(words in message for words in _TOO_LONG):
        return "ModelContextWindowExceededError"
    if _says_overloaded(code) or _says_overloaded(type_):
        return "ModelOverloadedError"
    if code == "invalid_api_key":
        return "ModelAuthenticationError"
    if status == 503:
        return "ModelOverloadedError" if _says_overloaded(message) else "ModelUnavailableError"
    return _BY_STATUS.get(status) or ("ModelServerError" if 500 <= status < 600 else "ModelHTTPError")


def categories_of(kind: str) -> frozenset[str]:
    """Return the names of a kind and of all that it is a case of."""
    return frozenset({kind, _WIDER.get(kind, kind)})


def _says_overloaded(text: object) -> bool:
    return isinstance(text, str) and any(words in text.lower() for words in _OVERLOADED)
