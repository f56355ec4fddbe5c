"""The command line: flags in, words and exit codes out. Everything it does is a call of `lbr.api`."""

from __future__ import annotations

from lbr.cli import admin, operate, work
from lbr.cli.app import lbr, main
from lbr.cli.collect import collect
from lbr.cli.enqueue import enqueue

for command in (
    *(enqueue, work.worker, work.worker_process, collect, work.run, admin.estimate),
    *(operate.status, operate.show, operate.retry, operate.cancel, operate.rm, operate.pause, operate.resume),
    *(admin.limit, admin.move, admin.doctor),
):
    lbr.add_command(command)

__all__ = ["lbr", "main"]
