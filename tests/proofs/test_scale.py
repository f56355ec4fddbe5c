"""Memory and locks at 100,000 prompts: constant memory in every process, no lock that reaches a user."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import polars as pl
import psutil
import pytest

if TYPE_CHECKING:
    import subprocess

    from tests.support import Cli

COUNT = 100_000
LIMIT_BYTES = 250 * 1000 * 1000
TABLE_BYTES = 300 * 1000 * 1000


def peak_until_end(*processes: subprocess.Popen[str]) -> list[int]:
    """Wait for processes and return the largest resident size that each was seen with."""
    watched = [psutil.Process(process.pid) for process in processes]
    peaks = [0] * len(watched)
    while any(process.poll() is None for process in processes):
        for n, one in enumerate(watched):
            try:
                peaks[n] = max(peaks[n], one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
    return peaks


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_hundred_thousand_prompts(cli: Cli) -> None:
    """100,000 prompts through two workers: each process stays under 250 MB, and nobody hears of a locked database."""
    with (cli.folder / "in.txt").open("w") as file:
        file.writelines(f"prompt number {n} of a hundred thousand\n" for n in range(COUNT))
    enqueue = cli.start("enqueue", "in.txt", "--model", "offline:echo")
    peaks = peak_until_end(enqueue)
    workers = [cli.start("worker", "--concurrency", "200") for _ in range(2)]
    peaks += peak_until_end(*workers)
    collect = cli.start("collect", "in", "-o", "out.jsonl")
    peaks += peak_until_end(collect)
    cli("enqueue", "in.txt", "--run", "again", "--model", "offline:echo")
    compare = cli.start("compare", "in", "again")
    peaks += peak_until_end(compare)
    told = [process.communicate() for process in cli.started]
    assert [process.returncode for process in cli.started] == [0, 0, 0, 0, 0], told
    assert f"answered by all {COUNT}, equal answers {COUNT}: agreement 100.0%" in told[-1][0]
    assert "locked" not in "".join(out + err for out, err in told)
    with (cli.folder / "out.jsonl").open() as file:
        for idx, line in enumerate(file):
            row = json.loads(line)
            assert (row["idx"], row["result"]) == (idx, f"prompt number {idx} of a hundred thousand")
    assert idx == COUNT - 1
    assert max(peaks) < LIMIT_BYTES, peaks
    assert min(peaks) > 20_000_000, peaks
    sys.stderr.write(f"peak memory of enqueue, two workers, collect and compare: {[p // 10**6 for p in peaks]} MB\n")


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("db_url", ["sqlite"], indirect=True)
def test_a_parquet_table_of_a_hundred_thousand_rows(cli: Cli) -> None:
    """A table goes through one command, which stays under 300 MB, and comes back with every cell as it was."""
    n = pl.int_range(COUNT, dtype=pl.Int64)
    given = pl.select(sku=n, price=n / 7, in_stock=n % 3 == 0, prompt=pl.format("Is product {} good or bad?", n))
    given.write_parquet(cli.folder / "table.parquet", row_group_size=COUNT // 8)
    command = cli.start("run", "table.parquet", "-o", "out.parquet", "--model", "offline:echo")
    (peak,) = peak_until_end(command)
    told = command.communicate()
    assert command.returncode == 0, told
    got = pl.read_parquet(cli.folder / "out.parquet")
    assert got.columns == [*given.columns, "result", "status", "error"]
    assert given.equals(got.select(given.columns))
    assert (got["result"] == got["prompt"]).all()
    assert 20_000_000 < peak < TABLE_BYTES, peak
    sys.stderr.write(f"peak memory of a run of a table: {peak // 10**6} MB\n")
