"""lbr beside other packages that do the same work, and beside the loop that an author writes, in one run.

Four parts: jobs of 5 ms that are kept, a batch of calls of a chat server in one process, that batch killed in the middle
and started again, and the whole of larger batches, from the start of a command to the file of answers. The server runs
on one core, the client on another. Every rival has an environment of its own under .venv-rivals, which is made when it
is first needed; one that cannot be installed or fails is reported, and the others go on. Every answer is checked.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench_baselines import CHAT_SLOTS, BenchError, Sizes, Took, chat_prompts, conditions, nap_prompts
from bench_baselines import measure as measure_lbr
from rival_environments import RIVALS, NotMeasuredError, Rival
from rival_runs import WHOLE, Crash, crashed_lbr, crashed_rival, measured, whole_lbr

from lbr.cli.app import collect_garbage_rarely

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PARTS = ("naps", "chat", "crash", WHOLE)
TITLES = {
    "naps": "jobs of 5 ms, 100 at a time, kept",
    "chat": "chat calls of 50 ms, 200 at a time, end to end",
    "crash": "killed at 0.4 of those calls and started again",
    WHOLE: "chat calls of 50 ms, 200 at a time, from the start of the command to the file of answers",
}
LBR = "lbr"
THREE = "lbr, three commands"
GATHER = "a bare aiohttp gather"
WHOLE_CALLS = (3_000, 15_000)
MAX_MS = 0.4
"""The most that the client's processor is to take for a prompt of the largest batch."""
FIRST_CALL_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure."""

    parts: list[str]
    rivals: list[Rival]
    sizes: Sizes
    repeat: int
    folder: Path
    json: Path | None


@dataclass(slots=True)
class Found:
    """What was measured: by part and system, a value for each turn, or why there is none; versions by system."""

    speeds: dict[tuple[str, str], list[Took]] = field(default_factory=lambda: defaultdict(list))
    crashes: dict[str, list[Crash]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def took(self, part: str, system: str) -> Took | None:
        """Return the medians of a system, None where it was not measured."""
        turns = self.speeds.get((part, system))
        if not turns:
            return None
        return Took(statistics.median(t.seconds for t in turns), statistics.median(t.cpu for t in turns))

    def crash(self, system: str) -> Crash | None:
        """Return the medians of a system, and the most calls that it repeated; None where it was not measured."""
        turns = self.crashes.get(system)
        if not turns:
            return None
        return Crash(
            statistics.median(t.first for t in turns),
            max(t.repeated for t in turns),
            statistics.median(t.second for t in turns),
        )


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench rivals", description=(__doc__ or "").partition("\n")[0])
    keys = [one.key for one in RIVALS]
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--only", default=",".join(keys), help=f"some of {','.join(keys)}, or none")
    parser.add_argument("--calls", type=int, default=Sizes().calls, help="calls of the chat server")
    parser.add_argument("--naps", type=int, default=Sizes().naps, help="jobs of 5 ms")
    parser.add_argument("--whole", type=_numbers, default=WHOLE_CALLS, help="calls of the wholes, such as 3000,15000")
    parser.add_argument("--repeat", type=int, default=1, help="measure so often, and take medians")
    parser.add_argument("--folder", type=Path, default=Path(), help="put what is kept, and removed, on this disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to a file as well")
    given = parser.parse_args(arguments)
    if min(given.calls, given.naps, given.repeat) < 1:
        parser.error("expected --calls, --naps and --repeat to be at least 1")
    parts = _some(parser, given.parts, PARTS)
    if WHOLE in parts:
        parts[-1:] = [f"{WHOLE}-{calls}" for calls in given.whole]
    chosen = _some(parser, given.only, keys)
    rivals = [one for one in RIVALS if one.key in chosen]
    sizes = Sizes(naps=given.naps, calls=given.calls)
    return Options(parts, rivals, sizes, given.repeat, given.folder, given.json)


def _numbers(text: str) -> list[int]:
    numbers = [int(one) if one.isdecimal() else 0 for one in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, such as 3000,15000, got: {text!r}")
    return sorted(numbers)


def _some(parser: argparse.ArgumentParser, text: str, known: Sequence[str]) -> list[str]:
    names = [] if text in {"", "none"} else text.split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"expected some of {', '.join(known)}, got: {', '.join(unknown)}")
    return [name for name in known if name in names]


def measure(options: Options) -> Found:
    """Measure everybody, part by part, so that a slow minute hits those that are compared alike."""
    found = Found()
    for turn in range(options.repeat):
        for part in options.parts:
            for system in (None, *(one for one in options.rivals if kind_of(part) in one.ways)):
                print(
                    f"measuring {part}, {turn + 1} of {options.repeat}: {name_of(system)}",
                    file=sys.stderr,
                    flush=True,
                )
                attempt(found, part, system, options)
    return found


def kind_of(part: str) -> str:
    """Return a part's name without the number of its calls: `whole` for `whole-3000`."""
    return part.partition("-")[0]


def jobs_of(part: str, sizes: Sizes) -> int:
    """Return the number of jobs of a part."""
    calls = part.partition("-")[2]
    return int(calls) if calls else sizes.naps if part == "naps" else sizes.calls


def name_of(system: Rival | None) -> str:
    """Return what a system is called in the tables; None is lbr."""
    return LBR if system is None else system.name


def attempt(found: Found, part: str, system: Rival | None, options: Options) -> None:
    """Measure one system once in a folder of its own, or note why it could not be done."""
    with tempfile.TemporaryDirectory(prefix="lbr-rivals-", dir=options.folder, ignore_cleanup_errors=True) as folder:
        try:
            _measure(found, part, system, options.sizes, Path(folder).absolute())
        except (NotMeasuredError, BenchError) as error:
            found.missing[part, name_of(system)] = str(error)


def _measure(found: Found, part: str, system: Rival | None, sizes: Sizes, folder: Path) -> None:
    """Measure one system; raises NotMeasuredError or BenchError."""
    prompts = (nap_prompts if part == "naps" else chat_prompts)(jobs_of(part, sizes))
    if part == "crash":
        crash = crashed_lbr(prompts, folder) if system is None else crashed_rival(system, prompts, folder)
        found.crashes[name_of(system)].append(crash)
    elif system is None and kind_of(part) == WHOLE:
        for name, commands in ((LBR, ["run"]), (THREE, ["enqueue", "worker", "collect"])):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                found.speeds[part, name].append(whole_lbr(prompts, Path(own), commands))
    elif system is None:
        [row] = measure_lbr(folder, sizes, [part], log=lambda _: None)
        found.speeds[part, LBR].append(row.lbr)
        found.speeds[part, row.by].append(row.least)
    else:
        took, versions = measured(system, kind_of(part), prompts, folder)
        found.speeds[part, system.name].append(took)
        found.versions[system.name] = versions


def speed_rows(found: Found, part: str, jobs: int) -> Iterator[list[str]]:
    """Yield the lines of a part: a system, how fast it was, and how many times faster lbr was."""
    yield ["system", "seconds", "jobs/s", "CPU ms/job", "lbr is"]
    ours = found.took(part, LBR)
    for at, system in found.speeds:
        took = found.took(part, system)
        if at != part or took is None:
            continue
        ratio = "-" if ours is None or system == LBR else f"{took.seconds / ours.seconds:.2f}x"
        cpu = f"{1000 * took.cpu / jobs:.3f}" if took.cpu else "-"
        yield [system, f"{took.seconds:.2f}", f"{jobs / took.seconds:.0f}", cpu, ratio]


def crash_rows(found: Found) -> Iterator[list[str]]:
    """Yield the lines of the part with the kill."""
    yield ["system", "first call after s", "calls repeated", "second try s"]
    for system in found.crashes:
        if (crash := found.crash(system)) is not None:
            yield [system, f"{crash.first:.2f}", str(crash.repeated), f"{crash.second:.2f}"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return lines of cells as aligned text."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def targets(found: Found, rivals: Sequence[Rival]) -> list[str]:
    """Return a line for each target of what was measured: whether lbr meets it, and by how much."""
    lines = [_times(found, "naps", one.name, 10) for one in rivals if one.keeps]
    lines.append(_times(found, "chat", GATHER, 0.5))
    # The fastest keeps nothing; to be ahead of it is to be ahead of those that keep something as well.
    deluge = [one.name for one in rivals if one.key == "deluge"]
    lines += [_times(found, "chat", name, 1) for name in deluge]
    wholes = [part for part, system in found.speeds if kind_of(part) == WHOLE and system == LBR]
    for part in sorted(wholes, key=lambda part: jobs_of(part, Sizes()))[-1:]:
        lines += [_times(found, part, GATHER, 0.6), *(_times(found, part, name, 1) for name in deluge)]
        lines.append(_cpu(found, part))
    if (crash := found.crash(LBR)) is not None:
        lines += [
            (
                f"calls repeated after a kill at most the {CHAT_SLOTS} in flight: "
                f"{_met(crash.repeated <= CHAT_SLOTS)} ({crash.repeated})"
            ),
            (
                f"first call within {FIRST_CALL_SECONDS} s of the second start: "
                f"{_met(crash.first <= FIRST_CALL_SECONDS)} ({crash.first:.2f} s)"
            ),
        ]
    return [line for line in lines if line]


def _cpu(found: Found, part: str) -> str:
    ours, jobs = found.took(part, LBR), jobs_of(part, Sizes())
    took = 0.0 if ours is None else 1000 * ours.cpu / jobs
    return f"{title_of(part)}, CPU of each at most {MAX_MS:g} ms: {_met(took <= MAX_MS)} ({took:.3f})"


def _times(found: Found, part: str, system: str, target: float) -> str:
    ours, other = found.took(part, LBR), found.took(part, system)
    if ours is None or other is None:
        return ""
    ratio = other.seconds / ours.seconds
    return f"{title_of(part)}, at least {target:g} times {system}: {_met(ratio >= target)} ({ratio:.2f})"


def title_of(part: str) -> str:
    """Return a part's name in the targets."""
    if kind_of(part) == WHOLE:
        return f"{jobs_of(part, Sizes())} chat calls, command to file"
    return TITLES[part].partition(",")[0]


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def report(found: Found, options: Options) -> None:
    """Print everything, and write it where a file is asked for."""
    about = conditions()
    for label, versions in {"": about, **found.versions}.items():
        line = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"{label}: {line}" if label and line else line, end="\n" if line else "")
    for part in options.parts:
        jobs = jobs_of(part, options.sizes)
        print(f"\n{TITLES[kind_of(part)]}; {jobs} jobs")
        print(table(crash_rows(found) if part == "crash" else speed_rows(found, part, jobs)))
        for (at, system), why in found.missing.items():
            if at == part:
                print(f"{system} not measured: {why}")
    print()
    print("\n".join(targets(found, options.rivals)))
    if options.json is not None:
        options.json.write_text(json.dumps(written(found, options, about), indent=2) + "\n", encoding="utf-8")


def written(found: Found, options: Options, about: dict[str, str]) -> dict[str, object]:
    """Return what goes to the file: every turn of everybody."""
    return {
        "about": about,
        "versions": found.versions,
        "sizes": asdict(options.sizes),
        "speeds": [
            {"part": part, "system": system, "turns": [asdict(one) for one in turns]}
            for (part, system), turns in found.speeds.items()
        ],
        "crashes": [
            {"system": system, "turns": [asdict(one) for one in turns]} for system, turns in found.crashes.items()
        ],
        "not measured": [{"part": part, "system": system, "why": why} for (part, system), why in found.missing.items()],
        "targets": targets(found, options.rivals),
    }


def main() -> None:
    """Run the benchmark."""
    options = read_options()
    # So that everything is put away on this signal too: `with` blocks end on SystemExit, not on a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    collect_garbage_rarely()  # as the command that is measured does
    report(measure(options), options)


if __name__ == "__main__":
    main()
