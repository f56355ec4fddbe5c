"""Inputs however a caller hands them over, files or prompts in memory, as one kind of thing."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.core.config import one_of
from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.records import Place, Template, check_finite, check_storable, is_plain, item_of, shortened
from lbr.io.writers import check_output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from lbr.core.types import Json

PROMPTS = "prompts"
AT_ONCE = 5_000
"""So many inputs are checked before a caller may be cancelled."""


def chunks(items: Iterator[Item], size: int, *, characters: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`, or fewer where they hold so many characters; the last one is shorter."""
    chunk: list[Item] = []
    room = characters
    for item in items:
        chunk.append(item)
        room -= len(item.prompt.text or "") if item.prompt.messages is None else len(item.prompt.body())
        if len(chunk) == size or room <= 0:
            yield chunk
            chunk, room = [], characters
    if chunk:
        yield chunk


def items_of(prompts: Iterable[str | dict[str, Json]], *, template: str | None = None) -> Iterator[Item]:
    """Yield the items of prompts in memory: strings, or dicts like the lines of a JSONL file.

    Raises InputError that counts prompts from 1, as lines are.
    """
    compiled = None if template is None else Template(template)
    for number, prompt in enumerate(prompts, start=1):
        if compiled is None and isinstance(prompt, str) and is_plain(prompt):
            yield Item(Prompt(prompt), None, None, PROMPTS, number)
        else:
            yield _item(prompt, Place(PROMPTS, number), compiled)


async def _count(items: Iterator[Item]) -> int:
    """Return how many items there are; InputError for the first that is none."""
    count = 0
    for count, _ in enumerate(items, start=1):
        if not count % AT_ONCE:
            await asyncio.sleep(0)
    return count


async def _check_prompts(prompts: Sequence[str | dict[str, Json]], *, template: str | None) -> int:
    """Return how many prompts there are; InputError for the first that is none. Items are made of the doubtful only."""
    compiled = None if template is None else Template(template)
    for number, prompt in enumerate(prompts, start=1):
        if compiled is not None or not isinstance(prompt, str) or not is_plain(prompt):
            _item(prompt, Place(PROMPTS, number), compiled)
    return len(prompts)


def _item(prompt: object, place: Place, template: Template | None) -> Item:
    if isinstance(prompt, str):
        return item_of({"prompt": prompt}, place, template, None)
    if not isinstance(prompt, dict):
        raise place.error(f"expected a string or a dict, got: {shortened(repr(prompt))}")
    fields = {name: _as_json(value) for name, value in prompt.items()}
    check_storable(fields, place)
    check_finite(fields, place)
    return item_of(fields, place, template, None)


def _as_json(value: Any) -> Any:
    """Return a value of pandas, numpy or the standard library as JSON has it: what is missing is null, a time ISO text.

    Those libraries are not imported for it. Anything else is returned as it is.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is dict:
        return {name: _as_json(one) for name, one in value.items()}
    if kind is list or kind is tuple:
        return [_as_json(one) for one in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # an array, or a scalar of one
        if value.dtype.kind == "M":  # times, which would become numbers without their unit
            if value.shape:
                return [_as_json(one) for one in value]
            return None if str(value) == "NaT" else str(value)
        return _as_json(value.tolist())
    is_nan = value.is_nan() if isinstance(value, Decimal) else kind is float and math.isnan(value)
    if is_nan or kind.__name__ in {"NAType", "NaTType"}:
        return None
    if isinstance(value, Decimal):
        number = float(value)
        return number if not math.isfinite(number) or Decimal(repr(number)) == value else str(value)
    return value.isoformat() if hasattr(value, "isoformat") else value


def _way_out_of_table(given: object) -> str | None:
    """Return what to give instead of what would be read by its names, a mapping or a frame; None for anything else."""
    kind = type(given)
    if isinstance(given, Mapping):
        return "its texts as a list, or a list with the dict in it for one record"
    # By what they have, for no library of frames is imported here.
    if not hasattr(kind, "columns"):
        return None
    if hasattr(kind, "to_dicts"):
        return 'df["prompt"].to_list(), or df.to_dicts() for records'
    if hasattr(kind, "collect"):
        return 'df.collect()["prompt"].to_list(), or df.collect().to_dicts() for records'
    return 'df["prompt"].tolist(), or df.to_dict("records") for records'


def _name_of(path: PathLike[str]) -> str:
    """Return the name of a file; UsageError for a path in bytes."""
    name = fspath(path)
    if not isinstance(name, str):
        raise UsageError(f"expected a path as text, got: {name!r}; decode it with os.fsdecode")
    return str(Path(name))


def _file_for_bad(path: PathLike[str] | str, files: Sequence[str]) -> str:
    """Return the name of the file for bad rows; UsageError or OutputError if it cannot be written or is an input."""
    name = _name_of(Path(path))
    check_output(name)
    if any(Path(name).resolve() == Path(one).resolve() for one in files):
        raise UsageError(
            f"expected another file for the bad rows than the input, got: {name}; name a new one"
        )
    return name


class Source:
    """Inputs that can be checked before they are read: files are read twice, streams and prompts as they come."""

    def __init__(
        self,
        read: Callable[[readers.BadRows], Iterator[Item]],
        *,
        count: Callable[[], Awaitable[int]] | None = None,
        files: Sequence[str] = (),
        skip_bad: str | None = None,
        skip_empty: bool = False,
    ) -> None:
        self._read_items = read
        self._count = count
        self._files = files
        self._skip: dict[str, Any] = {"skip_bad": skip_bad, "skip_empty": skip_empty}
        self.bad = readers.BadRows()
        self._head: list[Item] = []
        self._begun: Iterator[Item] | None = None

    @classmethod
    def of(
        cls,
        given: PathLike[str] | Iterable[PathLike[str] | str | dict[str, Json]],
        *,
        input_format: str | None = None,
        template: str | None = None,
        prompt_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        skip_bad: PathLike[str] | str | None = None,
        skip_empty: bool = False,
    ) -> Source:
        """Tell files (`Path`, or several) from prompts.

        UsageError for a mixture, for a frame or a mapping, and for flags that do not fit.
        """
        if input_format is not None:
            one_of("input_format", input_format, tuple(readers.InputFormat))
        if isinstance(given, str):
            raise UsageError(f"expected a list of prompts or a Path, got: the string {given[:60]!r}")
        if way_out := _way_out_of_table(given):
            raise UsageError(
                f"expected a list of prompts or a Path, got: a {type(given).__name__}; give {way_out}"
            )
        if not isinstance(given, PathLike) and not can_be_iterated(given):
            raise UsageError(f"expected a list of prompts or a Path, got: {type(given).__name__}")
        everything = [given] if isinstance(given, PathLike) else list(given)
        files = [_name_of(one) for one in everything if isinstance(one, PathLike)]
        prompts = [one for one in everything if not isinstance(one, PathLike)]
        if files and prompts:
            raise UsageError("expected files or prompts, got: both")
        how = {"prompt_column": prompt_column, "delimiter": delimiter, "encoding": encoding}
        if not files:
            given_too = how | {"skip_bad": skip_bad, "skip_empty": skip_empty or None}
            if flag := next((name for name, value in given_too.items() if value is not None), None):
                raise UsageError(f"expected {flag} with files, got: prompts")
            return cls(
                lambda _: items_of(prompts, template=template),
                count=lambda: _check_prompts(prompts, template=template),
            )
        kind = None if input_format is None else readers.InputFormat(input_format)
        readers.check_sources(files)
        bad_file = None if skip_bad is None else _file_for_bad(skip_bad, files)

        def read(bad: readers.BadRows) -> Iterator[Item]:
            return readers.read_items(files, format=kind, template=template, bad=bad, **how)

        return cls(read, files=files, skip_bad=bad_file, skip_empty=skip_empty)

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a file nor a prompt."""
        return not self._files and next(self.read(), None) is None

    def run_name(self) -> str:
        """Return the run's name where none was given: the first file's stem."""
        name = Path(self._files[0]).stem if self._files and not readers.is_stream(self._files[0]) else ""
        if not name:
            raise UsageError("expected a name for the run, got: none; set --run")
        return name

    async def check(self) -> None:
        """Read everything that can be read twice, of a stream its first input, so that rubbish leaves no trace.

        Raises InputError for the bad inputs, of a stream for the first one, and if there is no input at all.
        """
        if any(readers.is_stream(name) for name in self._files):
            self._begun = self.read()
            self._head = list(itertools.islice(self._begun, 1))
            count = len(self._head)
        elif self._count is None:
            count = await _count(self.read(at_once=False))
        else:
            count = await self._count()
        if not count:
            raise self.nothing()

    def read(self, *, at_once: bool = True) -> Iterator[Item]:
        """Read the inputs from their beginning. Bad ones are reported at the first one (`at_once`), or all at the end."""
        self.bad = readers.BadRows(**self._skip, at_once=at_once)
        return self._read_items(self.bad)

    def nothing(self) -> InputError:
        """Return what is to be said of a source without inputs."""
        return InputError("expected at least one input, got: none", source=", ".join(self._files) or PROMPTS)

    def __iter__(self) -> Iterator[Item]:
        """Read the inputs from their beginning; of a stream, once."""
        if self._begun is None:
            return self.read()
        return itertools.chain(self._head, self._begun)


def can_be_iterated(value: object) -> bool:
    """Tell whether a value gives others one by one. An array without a dimension says so and does not."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True
