"""Inputs as a caller gives them, files or prompts in memory, behind one class."""

from __future__ import annotations

import asyncio
import glob
import itertools
import os
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr.core.config import one_of
from lbr.core.errors import InputError, UsageError
from lbr.core.types import Item, Prompt
from lbr.io import frames, readers
from lbr.io.records import EmptyPromptError, Place, Template, item_of, json_of, shortened
from lbr.io.samples import ALL
from lbr.io.writers import check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbr.core.types import Json
    from lbr.io.samples import Sample

PROMPTS = "prompts"
EMPTY_WAY_OUT = "Fill it in, or leave such prompts out; of a DataFrame, for example with df.dropna(subset=[…])"
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


def items_of(
    prompts: Iterable[str | dict[str, Json]],
    *,
    template: str | None = None,
    prompt_column: str | None = None,
    id_column: str | None = None,
    fit: Callable[[Item], Item] = lambda item: item,
) -> Iterator[Item]:
    """Yield the items of prompts in memory: strings, or dicts like the lines of a JSONL file.

    `prompt_column` and `id_column` are fields of dicts. `fit` may change or refuse an item that has settings of its own. Raises InputError that counts prompts from 1, as
    lines are.
    """
    compiled = None if template is None else Template(template)
    plain = template is None and prompt_column is None and id_column is None
    for number, prompt in enumerate(prompts, start=1):
        if plain and isinstance(prompt, str) and _is_plain(prompt):
            yield Item(Prompt(prompt), None, None, PROMPTS, number)
            continue
        place = Place(PROMPTS, number)
        if isinstance(prompt, str):
            fields = {"prompt": prompt}
        elif isinstance(prompt, dict):
            fields = json_of(prompt, place)[0]
        else:
            raise place.error(f"expected a string or a dict, got: {shortened(repr(prompt))}")
        try:
            item = item_of(fields, place, compiled, prompt_column, id_column)
        except EmptyPromptError as error:
            raise place.error(f"{error.message}. {EMPTY_WAY_OUT}", EmptyPromptError) from error
        yield item if item.prompt.settings is None else fit(item)


def _is_plain(text: str) -> bool:
    """Return whether a text needs no further check to be a prompt, as nearly all texts do not."""
    return text.isascii() and "\x00" not in text and text != "" and not text.isspace()


class Source:
    """Files (`Path`, or several) or prompts: files are read twice, to check them first, streams and prompts as they come.

    A path may be a pattern; the rows of a frame are prompts. `fit` changes or refuses items that have settings of their
    own. Raises UsageError for a mixture, for a mapping, and for flags that do not fit.
    """

    def __init__(
        self,
        given: object,
        *,
        input_format: str | None = None,
        template: str | None = None,
        prompt_column: str | None = None,
        id_column: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        skip_bad: PathLike[str] | str | None = None,
        skip_empty: bool = False,
        sample: Sample = ALL,
    ) -> None:
        if input_format is not None:
            one_of("input_format", input_format, tuple(readers.InputFormat))
        self.bad = readers.BadRows()
        self.fit: Callable[[Item], Item] = lambda item: item
        self.notices: list[str] = []
        self._begun: Iterator[Item] | None = None
        self._files, self._prompts = _files_and_prompts(given)
        self._template, self._sample = template, sample
        self._columns: dict[str, Any] = {"prompt_column": prompt_column, "id_column": id_column}
        self._how: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding}
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
        elif template is not None and prompt_column is not None:
            raise UsageError("--template and --prompt-column exclude each other; name the column in the template")

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
            name = stem_of(self._files[0]) if self._files and not readers.is_stream(self._files[0]) else ""
            if not name:
                raise UsageError("the run needs a name; set --run")
        return f"{name}-pick" if name and self._sample.pick is not None else name

    def first_model(self) -> str | None:
        """Return the model that the first input itself names. A stream is read up to there. Raises InputError."""
        if self._files and (self._how["format"] or readers.format_of(self._files[0])) is not readers.InputFormat.JSONL:
            return None
        is_stream = bool(self._files) and readers.is_stream(self._files[0])
        rest = self.read(dry=not is_stream)
        first = next(rest, None)
        if first is None:
            if refusal := self.bad.refusal():
                raise refusal
            return None
        if is_stream:
            self._begun = itertools.chain([first], rest)
        model: str | None = (first.prompt.settings or {}).get("model")
        return model

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
        if self._begun is not None:
            return map(self.fit, self._begun)
        if not self._files:
            prompts = items_of(self._prompts, template=self._template, fit=self.fit, **self._columns)
            return self._sample.of(prompts)
        self.bad = readers.BadRows(**self._skip, at_once=at_once and not dry, dry=dry)
        how = self._how | self._columns | {"fit": self.fit, "sample": self._sample}
        return readers.read_items(self._files, template=self._template, bad=self.bad, **how)

    def places(self) -> list[int] | None:
        """Return where the picked prompts are among all of them; None if they are the first ones."""
        return None if self._sample.pick is None else [(item.line or 1) - 1 for item in self.read()]

    def nothing(self) -> InputError:
        """Return the error for a source without inputs."""
        return InputError("there is no input", source=", ".join(self._files) or PROMPTS)

    def __iter__(self) -> Iterator[Item]:
        """Read the inputs from their beginning; of a stream, once."""
        return self.read() if self._begun is None else self._begun


def expanded(sources: Iterable[str]) -> list[str]:
    """Return the sources with the files that match in the place of each pattern. Raises UsageError if none does."""
    found: list[str] = []
    for source in sources:
        is_pattern = source != readers.STDIN and glob.has_magic(source) and not os.path.lexists(source)
        matching = sorted(glob.glob(source, recursive=True)) if is_pattern else [source]
        if not matching:
            raise UsageError(f"no file matches {source!r}; check the pattern")
        found += matching
    return found


def stem_of(source: str) -> str:
    """Return a file's name without its ending, which may be two, as in `reviews.csv.gz`."""
    path = Path(source)
    return Path(path.stem if path.suffix.lower() == readers.GZIP_ENDING else path.name).stem


def _files_and_prompts(given: object) -> tuple[list[str], list[Any]]:
    if isinstance(given, PathLike):
        return expanded([str(Path(given))]), []
    if frames.library_of(given) is not None:
        return [], frames.records(given)
    advice = None
    if isinstance(given, Mapping):
        advice = "its texts as a list, or a list with the dict in it for one record"
    elif hasattr(type(given), "columns"):  # no library of frames is imported here
        advice = "a DataFrame of pandas or polars (of a LazyFrame, df.collect()), or a list of dicts"
    if advice or isinstance(given, str) or not isinstance(given, Iterable):
        wrong = f"the string {given[:60]!r}" if isinstance(given, str) else f"a {type(given).__name__}"
        raise UsageError(f"expected a list of prompts or a Path, got: {wrong}{f'; give {advice}' if advice else ''}")
    everything = list(given)
    files = expanded(str(Path(one)) for one in everything if isinstance(one, PathLike))
    if files and len(files) < len(everything):
        raise UsageError("expected files or prompts, got: both")
    return files, [] if files else everything
