"""Jobs per second of lbr on SQLite and on PostgreSQL, beside two other queues for PostgreSQL.

Everybody runs the same job, which does nothing, in the same number of worker processes, on the same machine and
the same durable server, each on a fresh database. Workers are started and warmed up before the clock starts;
it runs from the moment that the jobs are released until the last is recorded as done. Then every result is
checked, so that a queue that loses jobs does not look fast. pgqueuer is compared at the batch size that is best for it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_lbr
import bench_pgqueuer
import bench_procrastinate
from bench_server import Postgres, postgres

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench_crew import Measured

DATABASES = ("postgresql", "sqlite")
RIVALS = ("pgqueuer", "procrastinate")
PROCRASTINATE_SHARE = 10
"""procrastinate gets one in so many jobs; it takes them one by one, so its rate does not depend on how many."""

PACKAGES = ("lbr", "sqlalchemy", "asyncpg", "psycopg", *RIVALS)
HEADER = ("system", "database", "workers", "jobs", "enqueue/s", "drain/s", "CPU ms/job", *RIVALS)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure."""

    jobs: int
    workers: list[int]
    databases: list[str]
    rivals: list[str]
    concurrency: int
    batches: list[int]
    repeat: int
    json: Path | None


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=_positive, default=20_000, help="jobs of each measurement")
    parser.add_argument("--workers", type=_numbers, default=[1, 2, 4, 8], help="processes, such as 1,2,4,8")
    parser.add_argument("--databases", type=_names(DATABASES), default=list(DATABASES), help="of lbr, or none")
    parser.add_argument("--rivals", type=_names(RIVALS), default=list(RIVALS), help="other queues, or none")
    parser.add_argument("--concurrency", type=_positive, default=1_500, help="calls at a time of an lbr worker")
    parser.add_argument(
        "--batches",
        type=_numbers,
        default=list(bench_pgqueuer.BATCH_SIZES),
        help="sizes of pgqueuer's batches, of which the best counts",
    )
    parser.add_argument("--repeat", type=_positive, default=1, help="measure so often, and take medians")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to a file as well")
    return Options(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got: {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(one) for one in text.split(",")]


def _names(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        names = [] if text in {"", "none"} else text.split(",")
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got: {', '.join(unknown)}")
        return names

    return read


def installed(name: str) -> str | None:
    """Return the version of a package, None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(server: Postgres | None, options: Options) -> dict[str, str]:
    """Return what the figures depend on: machine, versions, how long the disk takes to keep a write."""
    found = {"cores": str(os.cpu_count()), "machine": platform.machine(), "system": platform.system()}
    found |= {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    if server is not None:
        found["PostgreSQL"] = server.version
    found |= {name: version for name in PACKAGES if (version := installed(name)) is not None}
    return found | {
        "fsync": f"{1000 * fsync_seconds():.2f} ms",
        "lbr --concurrency": str(options.concurrency),
    }


def fsync_seconds(times: int = 50) -> float:
    """Return how long an appended page takes to be kept where the databases are: it bounds every commit."""
    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        for _ in range(times):
            file.write(bytes(8192))
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - started) / times


async def measure(system: str, options: Options, server: Postgres | None, workers: int, batch: int) -> Measured:
    """Measure one system, for example `lbr on sqlite`, with a number of worker processes; `batch` is pgqueuer's."""
    share = PROCRASTINATE_SHARE if system == "procrastinate" else 1
    prompts = [f"Prompt {n}" for n in range(max(1, options.jobs // share))]
    # A server of root's gives its folders to another user, which must not matter to what is left behind.
    with tempfile.TemporaryDirectory(prefix="lbr-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if system == "lbr on sqlite":
            return await bench_lbr.measure_sqlite(folder, prompts, workers, options.concurrency)
        if server is None:
            sys.exit(f"expected a PostgreSQL server for {system}, got: none")
        if system == "lbr on postgresql":
            return await bench_lbr.measure_postgres(folder, server, prompts, workers, options.concurrency)
        if system == "pgqueuer":
            return await bench_pgqueuer.measure(folder, server, prompts, workers, batch)
        return await bench_procrastinate.measure(folder, server, prompts, workers)


def measure_all(options: Options, server: Postgres | None, systems: Sequence[str]) -> list[Measured]:
    """Measure everybody; those to be compared one right after the other, so that a slow minute hits them all."""
    found = []
    for turn in range(options.repeat):
        for workers in options.workers:
            for system in systems:
                for batch in options.batches if system == "pgqueuer" else [0]:
                    one = asyncio.run(measure(system, options, server, workers, batch))
                    found.append(one)
                    rate = f"{one.jobs / one.drain:,.0f} jobs/s"
                    print(
                        f"{turn + 1}/{options.repeat} {name_of(one)}, {workers} workers: {rate}",
                        file=sys.stderr,
                        flush=True,
                    )
    return found


def name_of(row: Measured) -> str:
    """Return a system with its database or the size of its batches."""
    return f"{row.system}, batches of {row.batch}" if row.batch else f"{row.system} on {row.database}"


def middle(found: Sequence[Measured]) -> list[Measured]:
    """Return one row for each system and number of workers, with the medians of its measurements.

    Of several sizes of a batch it is the one with the best median.
    """
    groups: defaultdict[tuple[str, str, int, int, int], list[Measured]] = defaultdict(list)
    for one in found:
        groups[one.system, one.database, one.workers, one.jobs, one.batch].append(one)
    rows = [
        replace(
            group[0],
            enqueue=statistics.median(one.enqueue for one in group),
            drain=statistics.median(one.drain for one in group),
            cpu=statistics.median(one.cpu for one in group),
        )
        for _, group in sorted(groups.items())
    ]
    best: dict[tuple[str, str, int], Measured] = {}
    for row in rows:
        key = row.system, row.database, row.workers
        best[key] = min(row, best.get(key, row), key=lambda one: one.drain)
    return list(best.values())


def ratios(rows: Sequence[Measured], row: Measured) -> dict[str, float]:
    """Return how many times faster lbr drained than each rival that had as many workers; nothing for a rival."""
    if row.system != "lbr":
        return {}
    same = {one.system: one for one in rows if one.workers == row.workers and one.system != "lbr"}
    return {name: (row.jobs / row.drain) / (one.jobs / one.drain) for name, one in same.items()}


def table(rows: Sequence[Measured]) -> str:
    """Return the rows as aligned text; the last columns say how many times faster than a rival lbr is."""
    cells = [list(HEADER)]
    for row in rows:
        compared = ratios(rows, row)
        cells.append(
            [f"{row.system} ({row.batch})" if row.batch else row.system, row.database, str(row.workers), str(row.jobs)]
            + [
                f"{row.jobs / row.enqueue:.0f}",
                f"{row.jobs / row.drain:.0f}",
                f"{1000 * row.cpu / row.jobs:.3f}",
            ]
            + [f"{compared[name]:.2f}x" if name in compared else "-" for name in RIVALS]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if n < 2 else cell.rjust(width) for n, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in cells)
    )


def targets(rows: Sequence[Measured]) -> list[str]:
    """Return a line for each comparison: whether lbr is ahead."""
    return [
        f"lbr on {row.database} ahead of {name} at {row.workers} workers: {'yes' if ratio > 1 else 'no'} ({ratio:.2f}x)"
        for row in rows
        for name, ratio in ratios(rows, row).items()
    ]


def report(options: Options, about: dict[str, str], found: Sequence[Measured]) -> None:
    """Print everything, and write it where a file is asked for."""
    rows = middle(found)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(table(rows))
    if "pgqueuer" in {row.system for row in rows}:
        sizes = ", ".join(map(str, options.batches))
        print(f"pgqueuer (N) fetches N jobs at a time, which was best of {sizes}")
    if "procrastinate" in {row.system for row in rows}:
        print(f"procrastinate had 1 in {PROCRASTINATE_SHARE} of the jobs, for it takes them one by one")
    print("\n".join(targets(rows)))
    if options.json is not None:
        written = {"about": about, "measured": [asdict(one) for one in found], "targets": targets(rows)}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    options = read_options()
    # So that everything is put away on this signal too: `with` blocks end on SystemExit, not on a signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rivals = [name for name in options.rivals if installed(name) is not None]
    for name in options.rivals:
        if name not in rivals:
            print(f"{name} is not installed: not measured; ./scripts/bench installs it")
    systems = [*rivals, *(f"lbr on {name}" for name in options.databases)]
    if not systems:
        sys.exit("expected something to measure, got: no database and no rival that is installed")
    with ExitStack() as stack:
        wanted = bool(rivals) or "postgresql" in options.databases
        server = stack.enter_context(postgres()) if wanted else None
        found = measure_all(options, server, systems)
        about = setting(server, options)
    report(options, about, found)


if __name__ == "__main__":
    main()
