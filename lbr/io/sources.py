"""Inputs as a caller gives them, files or prompts in memory, behind one class."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lbr.core.config import one_of
from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import readers
from lbr.io.records import Place, Template, check_storable, item_of, not_finite, not_json, shortened
from lbr.io.samples import ALL
from lbr.io.writers import check_output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbr.core.types import Json
    from lbr.io.samples import Sample

PROMPTS = "prompts"
CHECKED_AT_ONCE = 5_000
"""Inputs that are checked before a caller may be cancelled."""


def chunks(items: Iterator[Item], size: int, *, characters: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`, or fewer if they reach this number of characters."""
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
        place = Place(PROMPTS, number)
        if compiled is None and isinstance(prompt, str) and _is_plain(prompt):
            yield Item(Prompt(prompt), None, None, *place)
            continue
        if isinstance(prompt, str):
            fields = {"prompt": prompt}
        elif isinstance(prompt, dict):
            fields = _json_of(prompt, place)
        else:
            raise place.error(f"expected a string or a dict, got: {shortened(repr(prompt))}")
        yield item_of(fields, place, compiled, None)


def _is_plain(text: str) -> bool:
    """Return whether a text needs no further check to be a prompt, as nearly all texts do not."""
    return text.isascii() and "\x00" not in text and text != "" and not text.isspace()


def _json_of(prompt: dict[str, Any], place: Place) -> dict[str, Json]:
    """Return a dict as JSON has it: NaN becomes null, and values of pandas, numpy and others what JSON has for them."""
    try:
        fields = orjson.loads(orjson.dumps(_finite(prompt), default=_as_json))
    except TypeError as error:
        raise not_json(error, place) from error
    check_storable(fields, place)
    return dict(fields)


def _finite(value: Any) -> Any:
    """Return a value; TypeError for an infinity in it, which JSON does not have."""
    for name, number in not_finite(value):
        if math.isinf(number):
            raise TypeError(f"{name or 'a number'} is {number}")
    return value


def _as_json(value: Any) -> Any:
    """Return a value that orjson does not know as one that it does; TypeError if there is none."""
    if type(value).__name__ in {"NAType", "NaTType"} or str(value) == "NaT":  # of pandas and numpy
        return None
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy: an array, or a scalar
        if value.dtype.kind == "M":  # a time, which would become a number without its unit
            return list(value) if value.shape else str(value)
        return _finite(value.tolist())
    if isinstance(value, Decimal):
        number = float(value)
        return number if value.is_nan() or Decimal(repr(_finite(number))) == value else str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")


class Source:
    """Files (`Path`, or several) or prompts: files are read twice, to check them first, streams and prompts as they come.

    Raises UsageError for a mixture, for a frame or a mapping, and for flags that do not fit.
    """

    def __init__(
        self,
        given: PathLike[str] | Iterable[PathLike[str] | str | dict[str, Json]],
        *,
        input_format: str | None = None,
        template: str | None = None,
        prompt_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        skip_bad: PathLike[str] | str | None = None,
        skip_empty: bool = False,
        sample: Sample = ALL,
    ) -> None:
        if input_format is not None:
            one_of("input_format", input_format, tuple(readers.InputFormat))
        self.bad = readers.BadRows()
        self._begun: Iterator[Item] | None = None
        self._files, self._prompts = _files_and_prompts(given)
        self._template, self._sample = template, sample
        self._how: dict[str, Any] = {"prompt_column": prompt_column, "delimiter": delimiter, "encoding": encoding}
        self._skip: dict[str, Any] = {
            "skip_bad": None if skip_bad is None else str(Path(skip_bad)),
            "skip_empty": skip_empty,
        }
        if self._files:
            self._check_files(self._skip["skip_bad"])
            self._how["format"] = None if input_format is None else readers.InputFormat(input_format)
        elif flag := next(
            (name for name, value in (self._how | self._skip).items() if value not in (None, False)), None
        ):
            raise UsageError(f"expected {flag} with files, got: prompts")

    def _check_files(self, bad_file: str | None) -> None:
        readers.check_sources(self._files)
        if bad_file is not None:
            check_output(bad_file)
            if any(Path(bad_file).resolve() == Path(one).resolve() for one in self._files):
                raise UsageError(f"{bad_file} is the input; name a new file for the bad rows")

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a file nor a prompt."""
        return not self._files and not self._prompts

    def run_name(self, given: str | None) -> str:
        """Return the run's name: the given one, or the first file's stem; that of a picked sample ends with `-pick`."""
        name = given
        if name is None:
            name = Path(self._files[0]).stem if self._files and not readers.is_stream(self._files[0]) else ""
            if not name:
                raise UsageError("the run needs a name; set --run")
        return f"{name}-pick" if name and self._sample.pick is not None else name

    async def check(self) -> None:
        """Read everything that can be read twice, of a stream its first input, so that bad input leaves no trace.

        Raises InputError for the bad inputs, of a stream for the first one, and if there is no input at all.
        """
        count = 0
        if any(map(readers.is_stream, self._files)):
            rest = self.read()
            head = list(itertools.islice(rest, 1))
            self._begun, count = itertools.chain(head, rest), len(head)
        else:
            for count, _ in enumerate(self.read(at_once=False), start=1):
                if not count % CHECKED_AT_ONCE:
                    await asyncio.sleep(0)
        if not count:
            raise self.nothing()

    def read(self, *, at_once: bool = True, dry: bool = False) -> Iterator[Item]:
        """Read the inputs from their beginning. Bad ones are reported at the first one (`at_once`), or all at the end.

        With `dry`, they are counted in `bad`, and nothing is written.
        """
        if not self._files:
            return self._sample.of(items_of(self._prompts, template=self._template))
        how, self.bad = self._how, readers.BadRows(**self._skip, at_once=at_once and not dry, dry=dry)
        return readers.read_items(self._files, template=self._template, bad=self.bad, sample=self._sample, **how)

    def nothing(self) -> InputError:
        """Return the error for a source without inputs."""
        return InputError("there is no input", source=", ".join(self._files) or PROMPTS)

    def __iter__(self) -> Iterator[Item]:
        """Read the inputs from their beginning; of a stream, once."""
        return self.read() if self._begun is None else self._begun


def _files_and_prompts(given: object) -> tuple[list[str], list[Any]]:
    if isinstance(given, PathLike):
        return [str(Path(given))], []
    advice = None
    if isinstance(given, Mapping):
        advice = "its texts as a list, or a list with the dict in it for one record"
    elif hasattr(type(given), "columns"):  # no library of frames is imported here
        advice = 'df["prompt"].to_list(), or for records df.to_dict("records") in pandas, df.to_dicts() in polars'
    if advice or isinstance(given, str) or not isinstance(given, Iterable):
        wrong = f"the string {given[:60]!r}" if isinstance(given, str) else f"a {type(given).__name__}"
        raise UsageError(f"expected a list of prompts or a Path, got: {wrong}{f'; give {advice}' if advice else ''}")
    everything = list(given)
    files = [str(Path(one)) for one in everything if isinstance(one, PathLike)]
    if files and len(files) < len(everything):
        raise UsageError("expected files or prompts, got: both")
    return files, [] if files else everything
