"""Every provider that pydantic-ai supports, one plain call at a time.

Importing pydantic-ai takes seconds, so `lbr.models.build` imports this package when it needs it.
"""

from lbr.models.pydantic_ai.model import PydanticAIModel, Transport
from lbr.models.pydantic_ai.settings import check_model, unsent

__all__ = ["PydanticAIModel", "Transport", "check_model", "unsent"]
