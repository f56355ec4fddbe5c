"""The command line: flags in, words and exit codes out. Everything it does is a call of `lbr.api`."""

from __future__ import annotations

from lbr.cli import batches, completion, look, operate, work
from lbr.cli.app import lbr, main
from lbr.cli.dashboard import dashboard
from lbr.cli.enqueue import enqueue, estimate
from lbr.cli.examples import epilog_of

for command in (
    *(enqueue, work.worker, work.worker_process, work.collect, work.run, estimate),
    *(
        operate.status,
        operate.list_runs,
        look.failures,
        look.show,
        operate.compare,
        operate.retry,
        operate.cancel,
        operate.rm,
    ),
    *(operate.prune, operate.pause, operate.resume, operate.limit, operate.move, operate.backup, operate.doctor),
    dashboard,
    batches.batches,
    completion.completion,
):
    if not command.hidden:
        command.epilog = epilog_of(str(command.name))
    lbr.add_command(command)

__all__ = ["lbr", "main"]
