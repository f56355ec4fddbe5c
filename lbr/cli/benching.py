"""`lbr bench`."""

from __future__ import annotations

import os
import platform
import sqlite3
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from lbr.api.bench import PARTS
from lbr.cli.app import tell

if TYPE_CHECKING:
    from lbr.api.bench.measures import Measured

PACKAGES = ("lbr", "sqlalchemy", "aiosqlite", "aiohttp")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Measure this part; may be repeated.")
@click.option(
    "--jobs", type=click.IntRange(10, 5_000_000), metavar="N", help="Inputs of the queue; 200,000 if unset."
)
@click.option("--repeat", type=click.IntRange(1, 99), default=1, help="Measure so often, and take medians.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=Path(),
    help="Put the files that are measured on, which are removed, on this disk.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")
def bench(only: tuple[str, ...], jobs: int | None, repeat: int, folder: Path, as_json: bool) -> None:
    """Measure lbr on this machine, beside the same work by hand.

    It fills, works off and collects a queue, runs jobs of 5 ms, and calls a chat server of its own on this machine, each
    beside what could hardly be faster: plain sqlite3 on the same tables, the ceiling of the slots, a bare gather. What
    counts are the ratios. Every answer is checked. Nothing leaves the machine, and the queue at --db is not touched.
    """
    from lbr.api.bench.measures import Sizes, measure  # noqa: PLC0415 - only for this command

    sizes = Sizes() if jobs is None else Sizes(jobs, max(10, jobs // 20), max(10, jobs * 3 // 200))
    with tempfile.TemporaryDirectory(prefix="lbr-bench-", dir=folder) as name:
        chosen = [part for part in PARTS if not only or part in only]
        found = measure(
            Path(name), sizes, chosen, repeat=repeat, tell=lambda words: click.echo(words, err=True)
        )
    about = conditions()
    if as_json:
        rows = [asdict(row) | {"ratio": round(row.ratio, 3)} for row in found]
        tell(orjson.dumps({"about": about, "measured": rows}))
        return
    tell(", ".join(f"{name} {value}" for name, value in about.items()))
    tell(table(found))


def conditions() -> dict[str, str]:
    """Return what the figures depend on: the machine, and versions."""
    about = {"cores": str(os.cpu_count()), "machine": platform.machine(), "system": platform.system()}
    about |= {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    return about | {name: version(name) for name in PACKAGES}


def table(found: list[Measured]) -> str:
    """Return the rows as aligned text."""
    header = ["what", "jobs", "lbr/s", "CPU ms", "at best/s", "CPU ms", "ratio", "target", "at best is"]
    cells = [header] + [
        [
            row.name,
            str(row.jobs),
            f"{row.jobs / row.lbr.seconds:.0f}",
            f"{1000 * row.lbr.cpu / row.jobs:.3f}",
            f"{row.jobs / row.least.seconds:.0f}",
            f"{1000 * row.least.cpu / row.jobs:.3f}",
            f"{row.ratio:.2f}",
            "-" if row.target is None else f"{row.target:.2f}",
            row.by,
        ]
        for row in found
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = {0, len(header) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in text else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
