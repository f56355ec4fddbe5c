"""Compare runs with the same inputs: how often their answers agree, which differ, and what they took."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING, Any

from lbr.api.arguments import checked
from lbr.api.status import printable
from lbr.core.config import DB_URL_DEFAULT
from lbr.core.errors import UsageError
from lbr.core.pricing import NANOS, dollars
from lbr.core.text import aligned, duration
from lbr.core.types import JobState, Report, Shape
from lbr.io.records import shortened, shown
from lbr.io.table import answer_fields
from lbr.store import reads, taken
from lbr.store.database import opened
from lbr.store.runs import check_not_removing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from lbr.core.types import AnswerRow, Json, PathOrUrl, Run
    from lbr.store.database import Database

HEADER = ("run", "model or function", "answered", "failed", "tokens in", "tokens out", "cost", "p50", "p95")


@dataclass(frozen=True, slots=True)
class Comparison(Report):
    """How the answers of runs agree, and what they took.

    `runs` have `run` and `answerer`, the numbers of inputs `answered`, `failed` and `unfinished`, and of the answers,
    each distinct input once and without failed attempts: the means of `input_tokens` and `output_tokens`, `cost_usd`
    without the `unpriced` answers, and the latencies `p50_ms` and `p95_ms`; None if nothing is known. Of the `inputs`,
    `answered` have an answer in all runs, and `equal` of them equal ones, a share of `agreement`; `fields` has that of
    each field, if all runs have one schema for objects, and `pairs` that of two `runs` each, if there are more. JSON is
    compared as values, text without the white space around it. `differing` are the first rows that differ.
    """

    runs: list[dict[str, Json]]
    inputs: int
    answered: int
    equal: int
    agreement: float | None
    fields: dict[str, float | None]
    pairs: list[dict[str, Json]]
    differing: list[dict[str, Json]]


@checked
async def compare(
    runs: Sequence[str], *, rows: int = 10, db_url: PathOrUrl = DB_URL_DEFAULT, allow_network_fs: bool = False
) -> Comparison:
    """Compare the answers of two or more runs with the same inputs, with the first `rows` that differ.

    Raises UsageError, with the first difference, for runs of different inputs.
    """
    names = list(dict.fromkeys(map(str, runs)))
    if len(names) < 2:
        raise UsageError(f"expected two or more runs to compare, got: {', '.join(names) or 'none'}")
    if rows < 0:
        raise UsageError(f"expected --rows to be at least 0, got: {rows}")
    async with opened(db_url, allow_network_fs=allow_network_fs) as database:
        found = [await database.read(reads.find_run, name) for name in names]
        for run in found:
            check_not_removing(run)
        if len({run.samples for run in found}) > 1:
            counts = ", ".join(f"{run.name} {run.samples}" for run in found)
            raise UsageError(f"runs with different numbers of samples cannot be compared: {counts}")
        tally = _Tally(found, rows)
        async for page in _in_step(database, found):
            tally.add(page)
        took = [await database.read(taken.by_latency, run) for run in found]
    return tally.comparison([_figures(*one) for one in zip(found, tally.statuses, took, strict=True)])


async def _in_step(database: Database, runs: list[Run]) -> AsyncIterator[list[tuple[AnswerRow, ...]]]:
    """Yield the rows of all runs side by side. Raises UsageError at the first input that is not the same."""
    streams = [reads.rows(database, run, Shape.ORIGINAL) for run in runs]
    pages: list[list[AnswerRow]] = [[] for _ in runs]
    while True:
        pages = [page or await anext(stream, []) for page, stream in zip(pages, streams, strict=True)]
        count = min(map(len, pages))
        together = list(zip_longest(*(page[: count or 1] for page in pages)))
        for rows in together:
            inputs = [row and (row.idx, row.sample, row.prompt.text, row.prompt.messages) for row in rows]
            for run, row, one in zip(runs, rows, inputs, strict=True):
                if one != inputs[0]:
                    first, second = ("missing" if one is None else shown(one.prompt.body()) for one in (rows[0], row))
                    raise UsageError(
                        f"runs {runs[0].name} and {run.name} have different inputs: input {(rows[0] or row).idx} is "
                        f"{first} in the first and {second} in the second; compare runs of the same inputs"
                    )
        if not count:
            return
        yield together
        pages = [page[count:] for page in pages]


class _Tally:
    """Counts equal answers: of all runs, of each pair of them, and by field."""

    def __init__(self, runs: list[Run], rows: int) -> None:
        fields = [answer_fields(run.task.schema or {}).keys() for run in runs]
        self._names = tuple(run.name for run in runs)
        self._rows = rows
        self._answered = Counter[tuple[str, ...]]()
        self._equal = Counter[tuple[str, ...]]()
        self._differ = dict.fromkeys(fields[0] if all(one == fields[0] for one in fields) else (), 0)
        self._groups = [self._names, *(combinations(self._names, 2) if len(runs) > 2 else ())]
        self._differing: list[dict[str, Json]] = []
        self.statuses: list[Counter[str]] = [Counter() for _ in runs]

    def add(self, page: list[tuple[AnswerRow, ...]]) -> None:
        """Add rows, those of all runs for each input."""
        for statuses, rows in zip(self.statuses, zip(*page, strict=True), strict=True):
            statuses.update(row.status for row in rows)
        for rows in page:
            texts = {name: row.result for name, row in zip(self._names, rows, strict=True)}
            convert = _comparable if len({*texts.values()}) > 1 else str  # most are equal as they are
            values = {name: convert(text) for name, text in texts.items() if text is not None}
            for group in self._groups:
                if values.keys() >= {*group}:
                    self._answered[group] += 1
                    self._equal[group] += len({values[name] for name in group}) == 1
            if len(values) == len(texts) and len({*values.values()}) > 1:
                self._add_different(rows[0], texts)

    def _add_different(self, row: AnswerRow, texts: dict[str, Any]) -> None:
        objects = [_parsed(text) for text in texts.values()] if self._differ else []
        for name in self._differ:
            self._differ[name] += len({json.dumps(one.get(name), sort_keys=True) for one in objects}) > 1
        if len(self._differing) < self._rows:
            fields = row.to_dict()
            place = {name: fields[name] for name in ("idx", "sample", "prompt") if name in fields}
            self._differing.append(place | {"answers": texts})

    def comparison(self, runs: list[dict[str, Json]]) -> Comparison:
        """Return what was counted."""
        every, *pairs = self._groups
        answered, equal = self._answered, self._equal
        fields = {name: _per(answered[every] - differ, answered[every]) for name, differ in self._differ.items()}
        shares = [
            {"runs": list(pair), "answered": answered[pair], "agreement": _per(equal[pair], answered[pair])}
            for pair in pairs
        ]
        inputs, agreement = self.statuses[0].total(), _per(equal[every], answered[every])
        return Comparison(runs, inputs, answered[every], equal[every], agreement, fields, shares, self._differing)


def _per(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _comparable(text: str) -> str:
    """Return what is the same text for equal answers."""
    text = text.strip()
    with suppress(ValueError, RecursionError):
        return json.dumps(_parsed(text), sort_keys=True) if text.startswith(("{", "[")) else text
    return text


def _parsed(text: str) -> Json:
    """Parse JSON in which 1.0 is 1."""
    return json.loads(text, parse_float=lambda digits: int(one) if (one := float(digits)).is_integer() else one)


def _figures(run: Run, statuses: Counter[str], took: list[tuple[int, ...]]) -> dict[str, Json]:
    sums = [sum(column) for column in zip(*took, strict=True)] or [0] * 8
    _, answers, read, read_known, written, written_known, nanos, priced = sums
    return {
        "run": run.name,
        "answerer": run.task.answerer,
        "answered": statuses[JobState.DONE],
        "failed": statuses[JobState.FAILED] + statuses[JobState.CANCELLED],
        "unfinished": statuses[JobState.PENDING] + statuses[JobState.INFLIGHT],
        "input_tokens": _per(read, read_known),
        "output_tokens": _per(written, written_known),
        "cost_usd": _per(nanos, NANOS * bool(priced)),
        "unpriced": answers - priced,
        **{f"p{percent}_ms": _percentile([row for row in took if row[0] >= 0], percent) for percent in (50, 95)},
    }


def _percentile(took: list[tuple[int, ...]], percent: int) -> int | None:
    """Return the latency that this percentage of the answers did not exceed; None without an answer."""
    hundredths = percent * sum(row[1] for row in took)
    for latency_ms, answers, *_ in took:
        if (hundredths := hundredths - 100 * answers) <= 0:
            return latency_ms
    return None


def describe(found: Comparison) -> str:
    """Return the report that `lbr compare` prints."""
    counts = f"inputs {found.inputs}, answered by all {found.answered}, equal answers {found.equal}"
    shares = [(f"{counts}: agreement", found.agreement)]
    shares += [(f"  {name}", share) for name, share in found.fields.items()]
    shares += [(f"  {' and '.join(pair['runs'])}", pair["agreement"]) for pair in found.pairs]
    lines = [f"{printable(name)} {'-' if share is None else f'{share:.1%}'}" for name, share in shares]
    for row in found.differing:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        sample = f", sample {row['sample']}" if "sample" in row else ""
        lines.append(f"input {row['idx']}{sample}: {printable(shortened(prompt))}")
        lines += [f"  {run}: {printable(shortened(text))}" for run, text in row["answers"].items()]
    return "\n".join([aligned([HEADER, *map(_cells, found.runs)]), *lines])


def _cells(run: dict[str, Json]) -> list[str]:
    def cell(name: str, words: Callable[[float], str]) -> str:
        return "-" if run[name] is None else words(run[name])

    cells = [run["run"], printable(run["answerer"]), str(run["answered"]), str(run["failed"])]
    cells += [cell(name, "{:,.1f}".format) for name in ("input_tokens", "output_tokens")]
    cells.append(cell("cost_usd", lambda amount: dollars(round(amount * NANOS))))
    return cells + [cell(name, lambda ms: duration(ms / 1000)) for name in ("p50_ms", "p95_ms")]
