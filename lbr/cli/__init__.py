"""The command line: flags in, words and exit codes out. Everything it does is a call of `lbr.api`."""

from __future__ import annotations

from lbr.cli import operate, work
from lbr.cli.app import lbr, main
from lbr.cli.enqueue import enqueue, estimate

for command in (
    *(enqueue, work.worker, work.worker_process, work.collect, work.run, estimate),
    *(operate.status, operate.list_runs, operate.show, operate.compare, operate.retry, operate.cancel, operate.rm),
    *(operate.prune, operate.pause, operate.resume, operate.limit, operate.move, operate.backup, operate.doctor),
):
    lbr.add_command(command)

__all__ = ["lbr", "main"]
