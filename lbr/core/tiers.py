"""The service tier of a run: what its calls cost and how long they may take, but not what they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbr.core.errors import UsageError

if TYPE_CHECKING:
    from lbr.core.types import Json, Task

STANDARD, FLEX = "standard", "flex"
TIERS = (STANDARD, FLEX)
FLEX_TIMEOUT = 900.0
"""Seconds that a flex call may take by default: OpenAI's advice, because these calls wait for free capacity."""
_OFFER_FLEX = ("openai-chat", "openai", "openai-responses", "azure", "azure-responses", "google", "google-cloud")


def sent_settings(task: Task) -> dict[str, Json]:
    """Return the settings that are sent: the task's, with its tier if the model offers that.

    A job that is redone by another provider's model is processed as that one does.
    """
    return {**task.settings, "service_tier": FLEX} if task.tier == FLEX and _offers_flex(task) else task.settings


def check_tier(task: Task) -> None:
    """Raise UsageError for a tier that the model does not offer, or that a setting contradicts."""
    if task.tier is None:
        return
    if task.tier == FLEX and not _offers_flex(task):
        raise UsageError(
            f"{task.answerer} has no flex tier: only OpenAI, Azure and Gemini offer it ({':, '.join(_OFFER_FLEX)}:). Use "
            f"one of their models, or leave out --tier"
        )
    body = task.settings.get("extra_body")
    if "service_tier" in task.settings or (isinstance(body, dict) and "service_tier" in body):
        raise UsageError("expected --tier or the setting service_tier, got: both")


def _offers_flex(task: Task) -> bool:
    return (task.model or "").partition(":")[0] in _OFFER_FLEX
