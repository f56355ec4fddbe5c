"""A rival does a task in a process of its own: at full speed, or killed in the middle and started again."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bench_chat as chat
import rival
from bench_baselines import CHAT_SLOTS, NAP_SLOTS, Took
from bench_chat_server import SECONDS as CHAT_SECONDS
from rival_environments import NotMeasuredError, Rival, last_line, surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SECONDS = 600
"""How long anybody may take for a part."""
SHARE_AT_THE_KILL = 0.4
WHOLE = "whole"
"""The part that counts all that a user waits for, from the start of the command to the file of answers."""
STEADY_SECONDS = 0.3
LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Crash:
    """A run that was killed and started again.

    `first` are the seconds from the second start to its first call at the server, `repeated` the calls beyond one for
    each prompt, `second` the seconds of the second try from its start to its end.
    """

    first: float
    repeated: int
    second: float


def measured(one: Rival, part: str, prompts: Sequence[str], folder: Path) -> tuple[Took, dict[str, str]]:
    """Have a rival answer the prompts; return what it took and the versions of its packages.

    What it took is what it reports itself, and for the whole what its process took. Raises NotMeasuredError.
    """
    (folder / rival.PROMPTS).write_text(json.dumps(prompts), encoding="utf-8")
    if part == "naps":
        command = one.command(part, "-", folder, NAP_SLOTS)
        said, outside = _timed(command, surroundings(folder))
    else:
        with chat.chat_server(CHAT_SECONDS) as url, chat.on_one_core():
            command = one.command(part, url, folder, CHAT_SLOTS)
            said, outside = _timed(command, surroundings(folder))
            _check_tally(url, prompts)
    check(folder / rival.ANSWERS, prompts)
    took = json.loads(last_line(said))
    return outside if part == WHOLE else Took(took["seconds"], took["cpu"]), took["versions"]


def whole_lbr(prompts: Sequence[str], folder: Path, commands: Sequence[str]) -> Took:
    """Have lbr answer a file of prompts, with `run` alone or with `enqueue`, `worker` and `collect`.

    Raises NotMeasuredError.
    """
    took = Took(0.0, 0.0)
    with chat.chat_server(CHAT_SECONDS) as url, chat.on_one_core():
        environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": chat.KEY}
        arguments = lbr_arguments(prompts, folder)
        for name in commands:
            _, step = _timed([sys.executable, "-m", "lbr", name, *arguments[name]], environment)
            took = Took(took.seconds + step.seconds, took.cpu + step.cpu)
        _check_tally(url, prompts)
    check(folder / rival.ANSWERS, prompts)
    return took


def lbr_arguments(prompts: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Write the file of prompts and return what each command of lbr is given to answer it."""
    file, answers = folder / "prompts.txt", str(folder / rival.ANSWERS)
    file.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    database = ["--db", str(folder / "lbr.db")]
    model, slots = ["--model", f"openai-chat:{chat.MODEL}"], ["--concurrency", str(CHAT_SLOTS)]
    return {
        "run": [str(file), *model, *slots, "--output", answers, *database],
        "enqueue": [str(file), *model, *database],
        "worker": [*slots, *database],
        "collect": [file.stem, "--output", answers, *database],
    }


def crashed(
    command: Sequence[str], environment: Mapping[str, str], url: str, prompts: Sequence[str], answers: Path
) -> Crash:
    """Kill a run when the server has seen a share of its calls, start it again, and check its answers.

    Raises NotMeasuredError.
    """
    with chat.on_one_core(), _started(command, environment) as process:
        while tally(url)["calls"] < SHARE_AT_THE_KILL * len(prompts):
            if process.poll() is not None:
                raise NotMeasuredError("it ended before it could be killed")
            time.sleep(LOOK_SECONDS)
    # What the killed process had sent may still be read.
    before = -1
    while before != (before := tally(url)["calls"]):
        time.sleep(STEADY_SECONDS)
    with chat.on_one_core():
        started = time.time()
        _run(command, environment)
        ended = time.time()
    _check_tally(url, prompts)
    check(answers, prompts)
    found = tally(f"{url}?since={started}")
    if found["first"] is None:
        raise NotMeasuredError("there was nothing left to call after the kill")
    return Crash(found["first"] - started, found["calls"] - found["distinct"], ended - started)


def crashed_rival(one: Rival, prompts: Sequence[str], folder: Path) -> Crash:
    """Measure a rival; raises NotMeasuredError."""
    (folder / rival.PROMPTS).write_text(json.dumps(prompts), encoding="utf-8")
    with chat.chat_server(CHAT_SECONDS) as url:
        command = one.command("crash", url, folder, CHAT_SLOTS)
        return crashed(command, surroundings(folder), url, prompts, folder / rival.ANSWERS)


def crashed_lbr(prompts: Sequence[str], folder: Path) -> Crash:
    """Measure `lbr run`; raises NotMeasuredError."""
    command = [sys.executable, "-m", "lbr", "run", *lbr_arguments(prompts, folder)["run"]]
    with chat.chat_server(CHAT_SECONDS) as url:
        environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": chat.KEY}
        return crashed(command, environment, url, prompts, folder / rival.ANSWERS)


@contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], output: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a group of its own and kill the whole of it in the end."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command to its end and return what it printed."""
    with _started(command, environment, subprocess.PIPE) as process:
        try:
            said, complained = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise NotMeasuredError(f"it took more than {SECONDS} s") from None
    if process.returncode != 0:
        raise NotMeasuredError(f"it failed: {last_line(complained)}")
    return said


def _timed(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, Took]:
    """Run a command to its end; return what it printed, and what its process took from its start to its end."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    said = _run(command, environment)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return said, Took(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def tally(url: str) -> dict[str, Any]:
    """Return what the server says about its calls."""
    with urllib.request.urlopen(url, timeout=SECONDS) as response:  # noqa: S310 - our own server
        found: dict[str, Any] = json.loads(response.read())
    return found


def _check_tally(url: str, prompts: Sequence[str]) -> None:
    found = tally(url)
    if found["distinct"] != len(prompts):
        raise NotMeasuredError(f"it called for {found['distinct']} of {len(prompts)} prompts")


def check(path: Path, prompts: Sequence[str]) -> None:
    """Compare every answer with its prompt, which is what everybody here answers with; raises NotMeasuredError."""
    if not path.exists():
        raise NotMeasuredError("it wrote no answers")
    with path.open(encoding="utf-8") as lines:
        found = [(row["prompt"], row["result"]) for row in map(json.loads, lines)]
    right = sum(one == (prompt, prompt) for one, prompt in zip(found, prompts, strict=False))
    if not right == len(found) == len(prompts):
        raise NotMeasuredError(f"{right} of its {len(found)} answers to {len(prompts)} prompts are right")
