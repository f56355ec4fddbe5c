"""The command line: flags in, words and exit codes out. Everything it does is a call of `lbr.api` or `lbr.api.operate`."""

from __future__ import annotations

from lbr.cli.app import lbr, main
from lbr.cli.collect import collect
from lbr.cli.enqueue import enqueue
from lbr.cli.estimating import estimate
from lbr.cli.limiting import limit
from lbr.cli.moving import move
from lbr.cli.operate import cancel, doctor, pause, resume, retry, rm, show, status
from lbr.cli.running import run
from lbr.cli.work import worker, worker_process

for command in (
    enqueue,
    worker,
    worker_process,
    collect,
    run,
    estimate,
    status,
    show,
    retry,
    cancel,
    rm,
    pause,
    resume,
    limit,
    move,
    doctor,
):
    lbr.add_command(command)

__all__ = ["lbr", "main"]
