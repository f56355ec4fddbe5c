"""Every provider that pydantic-ai speaks to, one plain call at a time.

pydantic-ai takes a second to import, so that happens in the functions that need it; this package costs nothing.
"""

from lbr.models.pydantic_ai.checks import check_model, output_mode, unsent
from lbr.models.pydantic_ai.families import call_error, family_of
from lbr.models.pydantic_ai.model import PydanticAIModel
from lbr.models.pydantic_ai.reference import Reference

__all__ = ["PydanticAIModel", "Reference", "call_error", "check_model", "family_of", "output_mode", "unsent"]
