"""The rows that `prompt_map` and `stream` return, and their other forms: texts, pairs, and frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lbr.api.call import warn
from lbr.core.errors import UsageError
from lbr.core.schema import import_type, problems_of
from lbr.core.types import JobState, Part
from lbr.io import frames
from lbr.io.table import Kinds, make_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lbr.api.task import ResolvedTask
    from lbr.core.types import AnswerRow, Json
    from lbr.io.table import Table

T = TypeVar("T")
RETURN_DTYPES = ("list[dict]", "list[str]", "list[tuple[str,str]]", *frames.LIBRARIES)


class Row(dict[str, Any], Generic[T]):
    """One answer: a dict of idx, key, prompt, status, result and error, and id and metadata if the prompt had them."""

    def __init__(self, fields: Mapping[str, Json], result_type: Any = None) -> None:
        super().__init__(fields)
        self._result_type = result_type

    @cached_property
    def parsed(self) -> T | None:
        """The result as an instance of the call's `result_type`; None if it had none, or if the row has no result.

        Raises UsageError for an answer that was kept and does not fit, because the class has changed.
        """
        result = self["result"]
        if self._result_type is None or result is None:
            return None
        try:
            parsed: T = _adapter(self._result_type).validate_json(result)
        except Exception as error:  # a user's validator may raise anything
            raise UsageError(
                f"the answer of input {self['idx']} does not fit the result type as it is now: {problems_of(error)[0]}. Kept "
                f"answers are not validated again; `fresh=True` with another `run` asks again"
            ) from error
        return parsed


@lru_cache(maxsize=8)
def _adapter(result_type: Any) -> Any:
    from pydantic import TypeAdapter  # noqa: PLC0415 - only for typed rows

    return TypeAdapter(import_type(result_type) if isinstance(result_type, str) else result_type)


@dataclass(frozen=True, slots=True)
class Form:
    """What a call returns its rows as, one of RETURN_DTYPES. `frame` is the one to put the answers beside, if any.

    Raises UsageError for a library that is not installed.
    """

    dtype: str
    resolved: ResolvedTask
    result_type: Any
    unnest: bool
    samples: int
    frame: Any

    def __post_init__(self) -> None:
        """Find out whether it can be made before any call is paid for."""
        if self.dtype in frames.LIBRARIES:
            frames.library(self.dtype)

    def of(self, rows: list[AnswerRow], inputs: Sequence[tuple[Part, str]], places: list[int] | None = None) -> Any:
        """Return the rows. `inputs` are the columns of the prompts, `places` the rows of the frame if only some were taken."""
        match self.dtype:
            case "list[dict]":
                return [Row(row.to_dict(), self.result_type) for row in rows]
            case "list[str]":
                return [row.result or "" for row in rows]
            case "list[tuple[str,str]]":
                return [(row.prompt.body(), row.result or "") for row in rows]
        if self.frame is not None:
            taken = [row.idx if places is None else places[row.idx] for row in rows]
            return self._beside(rows, taken)
        kinds, ids = Kinds(), Kinds()
        for row in rows:
            kinds.note(row.metadata or {})
            ids.note({"id": row.custom_id})
        return self._framed(self._table(inputs, kind_of=kinds.of, id_kind=ids.of("id")), rows)

    def _beside(self, rows: list[AnswerRow], taken: list[int]) -> Any:
        """Return these rows of the frame with the answers behind their columns."""
        own = [(Part.METADATA, name) for name in frames.names(self.frame)]
        table = self._table(own)
        del table.columns[: len(own)]
        return frames.beside(frames.taken(self.frame, taken), self._framed(table, rows))

    def _table(self, inputs: Sequence[tuple[Part, str]], **kinds: Any) -> Table:
        kinds |= {"unnest": self.unnest, "include": self.resolved.keep, "samples": self.samples}
        return make_table(self.resolved.task, inputs, **kinds)

    def _framed(self, table: Table, rows: list[AnswerRow]) -> Any:
        frame = frames.frame(table, rows, self.dtype)
        if table.left_out:
            shown = ", ".join(sorted(table.left_out)[:5])
            warn(f"fields that the schema does not name have no column: {shown}; unnest=False keeps them")
        return frame


def settled(row: AnswerRow, reason: str | None = None) -> AnswerRow:
    """Return a row with one of two statuses: done or missing. `reason` is the error of a missing row that has none."""
    return row if row.status == JobState.DONE else replace(row.missing(), error=row.error or reason)
