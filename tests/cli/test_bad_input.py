"""Rubbish in: a clear error, the right exit code, no traceback, and nothing half written."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
import psutil
import pytest

from lbr.store.migrations import LATEST
from tests.support import Cli, forks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

pytestmark = pytest.mark.processes

PATIENCE_SECONDS = 90
LATIN = "latin-\udcff"
PASSWORD = "hunter2"
DEEP_TEMPLATE = "{{" + "(" * 3_000 + "prompt" + ")" * 3_000 + "}}"
GOOD_LINES = "".join(f'{{"prompt": "p{n}"}}\n' for n in range(16))
FUNCTIONS = {
    "fns.py": "def fn(text): return text\n",
    "broken.py": "1/0\n",
}
CSV = {"p.csv": "city,state\nBend,OR\n"}


@dataclass(frozen=True)
class Case:
    """A command that must be refused: with which words, and which exit code."""

    arguments: tuple[str, ...]
    says: tuple[str, ...]
    code: int = 2
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""


def case(command: str, *says: str, code: int = 2, name: str = "", **more: Any) -> Any:
    """Return a parameter; `command` is split at white space, § is a space that stays, '' an empty argument."""
    arguments = tuple(word.replace("§", " ").replace("''", "") for word in command.split())
    return pytest.param(Case(arguments, says, code, **more), id=name or command[:60])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all that a folder holds, byte for byte; a folder in it, or what cannot be read, is None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Make files, and the folders that they are in."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def lbr(
    folder: Path,
    *arguments: str,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> tuple[int, str, str]:
    """Run the command in a folder, with a clean environment; return exit code, stdout and stderr."""
    clean = Cli(folder).environment | {"PYTHONDONTWRITEBYTECODE": "1", "MODEL": "offline:echo"}
    whole = clean | dict(environment or {})
    if not prefix and forks.can_run(whole):
        done = forks.run(arguments, cwd=folder, env=whole, stdin=stdin, timeout=PATIENCE_SECONDS)
    else:
        done = subprocess.run(
            [*prefix, sys.executable, "-m", "lbr", *arguments],
            cwd=folder,
            env=whole,
            input=stdin,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    out, error = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in error, error
    return done.returncode, out, error


def refuse(folder: Path, wrong: Case, prefix: tuple[str, ...] = ()) -> None:
    """Check that a command is refused as it should be, and that everything in the folder is as it was."""
    write(folder, wrong.files)
    before = contents(folder)
    code, out, error = lbr(folder, *wrong.arguments, stdin=wrong.stdin, environment=wrong.environment, prefix=prefix)
    assert (code, out) == (wrong.code, ""), error
    missing = [words for words in wrong.says if words not in error]
    assert not missing, (missing, error)
    assert PASSWORD not in error
    assert contents(folder) == before


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a queue that holds the run `p` of three prompts."""
    folder = tmp_path_factory.mktemp("queue")
    write(folder, {"p.txt": "one\ntwo\nthree\n"})
    assert lbr(folder, "enqueue", "p.txt", "--model", "offline:echo")[0] == 0
    return (folder / "runs.db").read_bytes()


@pytest.fixture
def held(tmp_path: Path, queue: bytes) -> Path:
    """Return a folder with a run `p`, its input, and an older output."""
    write(tmp_path, {"runs.db": queue, "p.txt": "one\ntwo\nthree\n", "o.jsonl": "older\n"})
    return tmp_path


@pytest.fixture
def mortal() -> tuple[str, ...]:
    """Return what to put before a command so that permissions apply to it, also where the tests run as root."""
    if os.geteuid() != 0:
        return ()
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root may read and write everything, and there is no setpriv to take that away")
    return (setpriv, "--bounding-set=-dac_override,-dac_read_search")


@pytest.mark.parametrize(
    "wrong",
    [
        case("enqueue none.txt", "cannot read 'none.txt'", "No such file", "check the path"),
        case("enqueue d", "d is a folder; name the files", files={"d/a.txt": "a\n"}),
        case(
            "enqueue p.jsonl",
            "p.jsonl, line 17",
            "not a JSON object",
            "(character 12)",
            "fix it",
            files={"p.jsonl": GOOD_LINES + '{"prompt": oops}\n'},
            name="line 17 not JSON",
        ),
        case(
            "enqueue p.jsonl",
            "p.jsonl, line 17",
            "prompt and messages",
            "'text'",
            "--prompt-column",
            files={"p.jsonl": GOOD_LINES + '{"text": "a"}\n'},
            name="no prompt field",
        ),
        case(
            "enqueue p.jsonl",
            "p.jsonl, line 17",
            "prompt is empty",
            "Use --skip-empty, or fill it in",
            files={"p.jsonl": GOOD_LINES + '{"prompt": ""}\n'},
            name="empty prompt",
        ),
        case(
            "enqueue p.txt",
            "p.txt, line 2",
            "UTF-8",
            "0xff as byte 2",
            "--encoding cp1252",
            files={"p.txt": b"a\nb\xff\n"},
            name="not UTF-8",
        ),
        case(
            "enqueue p.txt",
            "p.txt, line 2",
            "a NUL character",
            "remove it",
            files={"p.txt": b"a\nb\x00\n"},
            name="NUL",
        ),
        case(
            "enqueue p.txt",
            "p.txt",
            "there is no input",
            files={"p.txt": ""},
            name="empty input",
        ),
        case(
            "enqueue p.csv",
            "p.csv, line 3",
            "2 cells",
            "3",
            files={"p.csv": "prompt,b\n1,2\n1,2,3\n"},
            name="ragged rows",
        ),
        case(
            "enqueue p.csv",
            "p.csv, line 3: column prompt is empty (and 6 more bad rows)\np.csv, line 4: ",
            "p.csv, line 7: ",
            "Use --skip-empty, or fill them in",
            files={"p.csv": "prompt,b\na,1\n" + ",2\n" * 7},
            name="several bad rows",
        ),
        case(
            "enqueue p.csv --skip-bad p.csv",
            "p.csv is the input; name a new file for the bad rows",
            files=CSV,
        ),
        case("enqueue p.csv --encoding utf-9", "--encoding", "'utf-9'", "cp1252", files=CSV),
        case("estimate p.csv --delimiter ::", "--delimiter", "one character", "'::'", files=CSV),
        case("enqueue p.csv --model offline:echo --skip-bad runs.db", "than the queue", files=CSV),
        case("run p.csv -o o.csv --skip-bad o.csv", "o.csv is an input, or the file for bad rows", files=CSV),
        case("enqueue p.csv", "p.csv", "no column 'prompt'", "'city', 'state'", "--template", files=CSV),
        case("enqueue - --run r", "there is no input", name="stdin empty"),
        case(
            "enqueue - --run r --format jsonl",
            "stdin, line 1",
            "JSON object",
            stdin=b"oops\n",
            name="stdin bad from its start",
        ),
        case("enqueue - - --run r", "- (stdin) can be read only once"),
        case("enqueue -", "the run needs a name; set --run", stdin=b"a\n"),
    ],
)
def test_bad_inputs_are_refused_with_file_and_line(wrong: Case, tmp_path: Path) -> None:
    """What cannot be read, or is not what it should be, is named with its place before a database is made."""
    refuse(tmp_path, wrong)


def parquet(**columns: Any) -> bytes:
    """Return a Parquet file."""
    file = io.BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    return file.getvalue()


def batch(body: str = '{"messages": [{"role": "user", "content": "Hi"}]}', url: str = "/v1/chat/completions") -> str:
    """Return a line of OpenAI's batch input."""
    return f'{{"custom_id": "a", "method": "POST", "url": "{url}", "body": {body}}}\n'


MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'
BAD_ROWS: dict[str, tuple[str, str | bytes, str, str]] = {
    "not UTF-8": ("p.txt", b"a\nb\xff\n", "line 2: the line is not UTF-8", ""),
    "NUL": ("p.txt", b"a\n\0\n", "line 2: the line has a NUL character", ""),
    "UTF-16 cut off": ("p.txt", "a\nb\n".encode("utf-16")[:-1], "line 2: cannot be read", ""),
    "empty text": ("p.txt", "\n \n", "there is no input", ""),
    "gzip cut off": ("p.txt.gz", gzip.compress(b"a\nb\n" * 999)[:-9], "the compressed file is cut off", ""),
    "gzip damaged": ("p.csv.gz", b"\x1f\x8b\x08" + b"\xff" * 99, "line 1: cannot be read", ""),
    "JSON": ("p.jsonl", GOOD_LINES + "{oops}\n", "line 17: the line is not a JSON object", ""),
    "JSON cut off": ("p.jsonl", GOOD_LINES + '{"prompt": "x', "line 17: the line is not a JSON object", ""),
    "a JSON array": ("p.jsonl", '["a"]\n', "line 1: expected a JSON object", ""),
    "NaN": ("p.jsonl", '{"prompt": "a", "x": NaN}\n', "line 1: the line is not a JSON object", ""),
    "long number": ("p.jsonl", f'{{"prompt": "a", "x": {"9" * 30}}}\n', "line 1: the number in 'x'", ""),
    "half a pair": ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: the line is not a JSON object", ""),
    "escaped NUL": ("p.jsonl", '{"prompt": "a", "x": "\\u0000"}\n', "line 1: a field has a NUL character", ""),
    "no prompt": ("p.jsonl", '{"text": "a"}\n', "line 1: expected one of the fields prompt and messages", ""),
    "no such field": ("p.jsonl", '{"prompt": "a"}\n', "line 1: there is no field 'x'", "--prompt-column x"),
    "prompt a number": ("p.jsonl", '{"prompt": 1}\n', "line 1: expected prompt to be a string", ""),
    "prompt a chat": (
        "p.jsonl",
        '{"prompt": [{}]}\n',
        "line 1: expected prompt to be a string, got: [{}]; name chat",
        "",
    ),
    "prompt null": ("p.jsonl", '{"prompt": null}\n', "line 1: prompt is empty", ""),
    "id a list": ("p.jsonl", '{"prompt": "a", "id": [1]}\n', "line 1: expected the id to be a string", ""),
    "two ids": ("p.jsonl", '{"prompt": "a", "id": 1, "custom_id": 2}\n', "line 1: both id and custom_id", ""),
    "no user": ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1: no message is of", ""),
    "image": ("p.jsonl", '{"messages": [{"role": "user", "content": [{"type": "file"}]}]}\n', "line 1: ", ""),
    "gz": ("p.jsonl.gz", gzip.compress(b'{"prompt": 1}\n'), "line 1: expected prompt to be a string", ""),
    "batch url": ("p.jsonl", batch() + batch(url="/v1/embeddings"), "line 2: expected the url /v1/chat", ""),
    "batch stream": ("p.jsonl", batch(f'{{{MESSAGES}, "stream": true}}'), "line 1: the body asks for a stream", ""),
    "batch n": ("p.jsonl", batch(f'{{{MESSAGES}, "n": 2}}'), "line 1: the body asks for 2 answers", ""),
    "batch empty": ("p.jsonl", batch("{}"), "line 1: expected messages to be a list", ""),
    "batch model": ("p.jsonl", batch(f'{{{MESSAGES}, "model": 1}}'), "line 1: expected the model of the body", ""),
    "ragged": ("p.csv", "prompt,b\n1,2\n1,2,3\n", "line 3: expected 2 cells", ""),
    "quote": ("p.csv", 'prompt,b\n1,2\n"1,2\n', "line 3: the row is not valid CSV", ""),
    "names twice": ("p.csv", "prompt,a,a\n1,2,3\n", "line 1: several columns have the same name: 'a'", ""),
    "empty cell": ("p.csv", "prompt,b\n,2\n", "line 2: column prompt is empty", ""),
    "header only": ("p.csv", "prompt,b\n", "there is no input", ""),
    "nothing": ("p.csv", "", "the file is empty; the first line must name the columns", ""),
    "no column": ("p.csv", "a,b\n1,2\n", "there is no column 'prompt'; there are: 'a', 'b'", ""),
    "no id column": ("p.csv", "prompt\n1\n", "there is no column 'x'", "--id-column x"),
    "tabs": ("p.tsv", "prompt\tb\n1\t2\t3\n", "line 2: expected 2 cells", ""),
    "template": ("p.csv", "prompt\n1\n", "line 2: the template cannot be rendered", "--template {{prompt/0}}"),
    "null": ("p.parquet", parquet(prompt=["a", None]), "line 2: prompt is empty", ""),
    "infinity": ("p.parquet", parquet(prompt=["a"], x=[math.inf]), "line 1: a field cannot be written as JSON", ""),
    "numbers": ("p.parquet", parquet(prompt=[1]), "line 1: expected prompt to be a string", ""),
    "bytes": ("p.parquet", parquet(prompt=["a"], x=[b"\0"]), "cannot read column 'x', which has the type Binary", ""),
    "Parquet column": ("p.parquet", parquet(a=["a"]), "there is no column 'prompt'; there are: 'a'", ""),
    "no Parquet": ("p.parquet", "prompt\na\n", "cannot read p.parquet as Parquet", ""),
    "Parquet cut off": ("p.parquet", parquet(prompt=["a"])[:-20], "cannot read p.parquet as Parquet", ""),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_of_any_format_leaves_nothing(bad: str, tmp_path: Path) -> None:
    """A whole run names the file, and the line if there is one, and ends with 2 before it writes anything."""
    name, content, says, flags = BAD_ROWS[bad]
    place = f"{name}, {says}" if says.startswith("line") else name
    command = f"run {name} -o out.csv {flags}"
    refuse(tmp_path, Case(tuple(command.split()), (place, says), files={name: content}))


def test_a_bad_row_in_the_last_of_many_files_leaves_nothing(tmp_path: Path) -> None:
    """The file is named, and no earlier one is enqueued; nor is a pattern without a match an empty input."""
    files = {"in/1.jsonl": GOOD_LINES, "in/2.jsonl": GOOD_LINES + "{oops}\n"}
    for output in ("out.jsonl", "out.parquet", "out.sqlite", "out.db"):
        refuse(tmp_path, Case(("run", "in/*.jsonl", "--run", "r", "-o", output), ("in/2.jsonl, line 17",), files=files))
    refuse(tmp_path, Case(("run", "in/*.csv", "-o", "out.csv"), ("no file matches 'in/*.csv'",)))


def test_bad_and_empty_rows_are_left_out_on_request(tmp_path: Path) -> None:
    """The counts and the file say what was left out; the same command again adds nothing and leaves the file the same."""
    rows = 'id;prompt\n1;grün\n2;\n3;x;y\n4;b\n5;"c\n'
    write(tmp_path, {"p.csv": rows.encode("cp1252")})
    command = ("enqueue", "p.csv", "--encoding", "cp1252", "--skip-bad", "bad.jsonl", "--skip-empty")
    for counts in ("2 new, 0 duplicate, 0 reused, 0 known", "0 new, 0 duplicate, 0 reused, 2 known"):
        code, out, error = lbr(tmp_path, *command)
        assert (code, out) == (0, f"run p: 2 inputs, {counts}, 1 empty skipped, 2 bad skipped\n"), error
        bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert [(row["source"], row["line"], row["text"]) for row in bad] == [
            ("p.csv", 4, "3;x;y"),
            ("p.csv", 6, '5;"c'),
        ]
    code, out, error = lbr(tmp_path, *command, "--json")
    assert {"inputs": 2, "skipped_bad": 2, "skipped_empty": 1}.items() <= json.loads(out).items(), error
    code, out, error = lbr(
        tmp_path,
        *command[:1],
        "-",
        *command[2:],
        "--format",
        "csv",
        "--run",
        "q",
        stdin=rows.encode("cp1252"),
    )
    assert (code, out.endswith(" 1 empty skipped, 2 bad skipped\n")) == (0, True), error
    code, out, error = lbr(tmp_path, "enqueue", "p.csv", "--encoding", "cp1252")
    assert (code, error.splitlines()[0]) == (
        2,
        "lbr: p.csv, line 3: column prompt is empty (and 2 more bad rows)",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        case("enqueue p.csv --template {{town}}", "p.csv", "'town'; there are: 'city', 'state'"),
        case("enqueue p.csv --template {{city", "not valid Jinja", "(line 1)"),
        case("enqueue p.csv --template {{city}}{{1/0}}", "p.csv, line 2", "ZeroDivisionError"),
        case("enqueue p.csv --template {{city.__class__}}", "p.csv, line 2", "SecurityError"),
        case(
            f"enqueue p.csv --template {DEEP_TEMPLATE}",
            "the template does not compile: RecursionError",
            name="deep",
        ),
        case("enqueue p.csv --template @none.j2", "cannot read a template from none.j2", "No such file"),
    ],
)
def test_bad_templates_are_refused(wrong: Case, tmp_path: Path) -> None:
    """A template that does not compile, does not fit, fails or attacks the sandbox makes no run."""
    write(tmp_path, CSV)
    refuse(tmp_path, wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        case("enqueue p.txt --model nobody:x", "nobody:x"),
        case("enqueue p.txt --model gpt-9", "'openai-chat:gpt-4o-mini'", "got: 'gpt-9'", "provider"),
        case("enqueue p.txt --model openrouter:a/b", "no key for openrouter:a/b", "set OPENROUTER_API_KEY"),
        case(
            "enqueue p.txt",
            "no key for openrouter:a/b",
            "--model",
            environment={"MODEL": "a/b"},
            name="MODEL",
        ),
        case("enqueue p.txt --function none.mod:fn", "'none.mod:fn'", "No module named 'none'"),
        case("enqueue p.txt --function os:name", "'os:name' to be a function", "got: str"),
        case("enqueue p.txt --function broken:fn", "'broken:fn'", "ZeroDivisionError"),
        case("enqueue p.txt --function fns:fn --set a=1", "a function takes none", "remove a"),
        case("enqueue p.txt --result-type fns:fn", "'fns:fn'", "pydantic BaseModel class", "function"),
        case("enqueue p.txt --schema s.json", "s.json, line 2", "JSON", files={"s.json": "{\n oops"}),
        case(
            "enqueue p.txt --schema s.json",
            "s.json",
            "$.type",
            '"strin"',
            files={"s.json": '{"type": "strin"}'},
        ),
        case("enqueue p.txt --set latency", "--set NAME=VALUE", "got: 'latency'"),
        case("enqueue p.txt --set latency=NaN", "latency", "0 or more", "'NaN'"),
        case("enqueue p.txt --set temperature=1", "latency, failure_rate", "got: 'temperature'"),
        case(
            "enqueue p.txt --model openai-chat:gpt-4o-mini --set temprature=1",
            "the setting temprature is not sent",
            "did you mean 'temperature'",
        ),
    ],
)
def test_bad_tasks_are_refused(wrong: Case, tmp_path: Path) -> None:
    """A model, function, schema, type or setting that no worker could serve makes no run."""
    write(tmp_path, {"p.txt": "a\n"} | FUNCTIONS)
    refuse(tmp_path, wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        case(f"enqueue p.txt --max-attempts {'9' * 30}", "--max-attempts", "is not in the range"),
        case(f"enqueue p.txt --run {'x' * 201}", "a run name of 1 to 200", "--run", name="long run name"),
        case("enqueue p.txt --run §a", "a run name of 1 to 200", "' a'", "--run"),
        case(f"enqueue p.txt --instructions {LATIN}", "UTF-8", "LC_ALL", name="instructions not UTF-8"),
        case("worker --concurrency 0", "concurrency", "from 1 to 10000", "got: 0"),
        case("worker --processes 1001", "processes", "from 1 to 1000", "got: 1001"),
        case("run p.txt -o out.jsonl --model offline:echo --processes 1001", "processes", "from 1 to 1000"),
        case("worker --concurrency 10001", "concurrency", "from 1 to 10000", "got: 10001"),
        case("worker", "--concurrency", "'abc'", environment={"LBR_WORKER_CONCURRENCY": "abc"}, name="twin"),
        case("worker --lease -1", "lease", "above 0", "got: -1"),
        case("worker --lease nan", "lease", "got: nan"),
        case("worker --processes 0", "processes", "from 1 to", "got: 0"),
        case("run p.txt -o a.jsonl --lease -1", "lease", "above 0", "got: -1"),
        case("run p.txt -o runs.db", "runs.db is the queue; name a new file"),
        case("enqueue p.txt --model offline:echo --limit 0", "limit", "from 1 to", "got: 0"),
        case("enqueue p.txt --model offline:echo --pick 1000001", "pick", "from 1 to 1000000", "got: 1000001"),
        case("run p.txt -o out.jsonl --model offline:echo --seed 1", "--seed needs --pick"),
        case("status --interval nan", "interval", "above 0", "got: nan"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused(wrong: Case, tmp_path: Path) -> None:
    """A flag, or the environment variable that stands for it, is checked before anything is done."""
    write(tmp_path, {"p.txt": "a\n"})
    refuse(tmp_path, wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        case("collect none", "no run named 'none'", "runs here: p"),
        case("worker --run none", "no run named 'none'", "runs here: p"),
        case(
            "enqueue p.txt",
            "p.txt, line 2",
            "holds a different input 1",
            "--run",
            "--append",
            files={"p.txt": "one\nTWO\nthree\n"},
            name="changed line",
        ),
        case(
            "enqueue p.txt --instructions x",
            "already exists with a different task",
            'instructions: none there, "x" here',
            "--run",
            "`lbr rm p`",
        ),
        case("show p 99", "an input of run 'p'", "got: 99", "0 to 2"),
        case("show p -- -1", "IDX", "-1 is not in the range"),
        case(f"show p {'9' * 30}", "IDX", "is not in the range"),
        case(
            "collect p -o ./runs.db --format csv",
            "runs.db is a database with other tables than answers",
            "name another",
        ),
        case("run p.jsonl -o ./p.jsonl", "p.jsonl is an input, or the file", files={"p.jsonl": GOOD_LINES}),
        case("collect p -o o.txt", "cannot write o.txt", ".jsonl", ".csv"),
        case("collect p -o no/o.jsonl", "there is no folder ", "create it"),
        case("collect p -o d.jsonl", "the output d.jsonl is a folder", files={"d.jsonl/a": ""}),
        case("collect p -o ''", "the output . is a folder; add a file name"),
        case("collect p -o /dev/stdout", "/dev/stdout is a device or a pipe", "-o -`"),
        case("run p.jsonl -o /dev/null", "/dev/null is a device or a pipe", "-o -`"),
    ],
)
def test_a_known_run_and_older_outputs_stay_as_they_are(wrong: Case, held: Path) -> None:
    """Whatever is asked wrongly of a run that exists, the queue and every file stay byte for byte the same."""
    refuse(held, wrong)
    assert not list(held.glob(".*.tmp"))


@pytest.mark.parametrize(
    "wrong",
    [
        case("retry nobody --where status=done", "no run named 'nobody'", "runs here: p"),
        case("retry p --where length", "family=transient|", "error~TEXT", "finish_reason=WORD", "got: 'length'"),
        case("retry p --where family=bad", "bad_answer", "got: 'family=bad'"),
        case("retry p --where status=pending", "status=failed|cancelled|done", "got: 'status=pending'"),
        case("retry p --where error~", "error~TEXT", "got: 'error~'"),
        case("retry p --where ''", "a condition of the form", "got: ''"),
        case(f"retry p --where error~{LATIN}", "UTF-8", "LC_ALL", name="condition not UTF-8"),
        case(
            "retry p --where status=cancelled --where finish_reason=length",
            "no job can meet all of these conditions",
            "conditions: status=cancelled and finish_reason=length",
        ),
        case("retry p --set seed", "--set NAME=VALUE", "got: 'seed'"),
        case("retry p --where status=done --set max_tokens=5", "a setting of offline:echo", "'max_tokens'"),
        case("retry p --set failure_rate=2", "failure_rate", "a number from 0 to 1", "got: 2"),
        case("retry p --reparse", "a run with an output schema", "run 'p'", "free text"),
        case(
            "retry p --reparse --where status=failed",
            "--reparse checks all bad answers",
            "without --where, --set and --model",
        ),
        case(
            "retry p --reparse --set seed=1", "--reparse checks all bad answers", "without --where, --set and --model"
        ),
        case("retry p --result-type fns:fn", "--result-type needs --reparse", "lbr worker"),
        case("retry p --reparse --result-type none:T", "'none:T'", "No module named 'none'"),
        case("retry p --reparse --result-type fns:fn", "'fns:fn'", "pydantic BaseModel", files=FUNCTIONS),
    ],
)
def test_bad_retries_are_refused(wrong: Case, held: Path) -> None:
    """A condition, a setting or a type that cannot be meant puts no job back."""
    refuse(held, wrong)


def test_another_name_of_the_queue_is_no_output(held: Path) -> None:
    """Answers never replace a queue, by whatever name it goes."""
    (held / "answers.db").symlink_to(held / "runs.db")
    refuse(held, Case(("collect", "p", "-o", "answers.db"), ("answers.db", "other tables than answers")))
    assert lbr(held, "status", "p")[0] == 0


def _another_program(path: Path, _: bytes) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE accounts (id)")


def _newer_version(path: Path, queue: bytes) -> None:
    path.write_bytes(queue)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, 'from the future', 0)")


def _damaged(path: Path, queue: bytes) -> None:
    path.write_bytes(queue[:4096] + b"\xab" * (len(queue) - 4096))


@pytest.mark.parametrize(
    ("prepare", "command", "code", "says"),
    [
        (lambda path, _: path.mkdir(), "enqueue p.txt", 2, ("name a file", "a directory", "runs.db")),
        (
            lambda path, _: path.write_text("no database\n" * 99),
            "enqueue p.txt",
            1,
            ("runs.db", "not a SQLite"),
        ),
        (
            lambda path, _: path.write_text(""),
            "status",
            2,
            ("runs.db", "there is no lbr queue in", "lbr enqueue"),
        ),
        (lambda *_: None, "worker", 2, ("runs.db", "no such file", "lbr enqueue")),
        (_another_program, "enqueue p.txt", 1, ("another program", "accounts", "name another path")),
        (_newer_version, "enqueue p.txt", 1, (f"schema version {LATEST}", "99", "use that one")),
        (_newer_version, "status", 1, (f"schema version {LATEST}", "99", "use that one")),
        (_damaged, "enqueue p.txt", 1, ("runs.db", "damaged", "restore")),
    ],
    ids=[
        "a directory",
        "not a database",
        "zero bytes",
        "missing",
        "of another program",
        "newer, written",
        "newer, read",
        "damaged",
    ],
)
def test_what_is_no_queue_is_refused_and_left_alone(
    prepare: Callable[[Path, bytes], Any],
    command: str,
    code: int,
    says: tuple[str, ...],
    tmp_path: Path,
    queue: bytes,
) -> None:
    """A database path that holds something else is named with the way out, and not one byte of it changes."""
    prepare(tmp_path / "runs.db", queue)
    refuse(tmp_path, Case(tuple(command.split()), says, code, {"p.txt": "a\n"}))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("no/folder/runs.db", ("a folder for the database", "no/folder", "create it")),
        (f"mysql://lbr:{PASSWORD}@localhost/lbr", ("an sqlite or a postgresql URL", "a mysql URL")),
        (f"postgresql://lbr:{PASSWORD}@localhost:port/lbr", ("host, port or database cannot be read",)),
        (f"postgresql://lbr:{PASSWORD}@localhost/lbr?mode=x", ("options of a PostgreSQL URL", "mode")),
        ("sqlite:///runs.db?mode=ro", ("a path alone", "the options mode")),
        (":memory:", ("name a file", "':memory:'")),
        ("~nobody-here/runs.db", ("~nobody-here/runs.db", "home")),
    ],
)
def test_database_urls_that_name_no_file_are_refused(url: str, says: tuple[str, ...], tmp_path: Path) -> None:
    """A URL of another kind, or a path in a missing folder, is refused; a password is never shown."""
    refuse(tmp_path, Case(("--db", url, "enqueue", "p.txt"), says, 2, {"p.txt": "a\n"}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locked", "mode", "command", "code", "says"),
    [
        ("p.txt", 0o000, "enqueue p.txt", 2, ("cannot read 'p.txt'", "Permission denied")),
        ("runs.db", 0o400, "enqueue p.txt", 1, ("runs.db", "read and written", "permission denied", "mode")),
        ("runs.db", 0o000, "status", 1, ("runs.db", "read", "permission denied", "mode")),
        ("out", 0o500, "collect p -o out/o.jsonl", 1, ("out/o.jsonl", "Permission denied", "-o")),
        ("out", 0o500, "run p.txt -o out/o.jsonl --run q", 1, ("out/o.jsonl", "Permission denied", "-o")),
        ("out", 0o500, "--db out/q.db enqueue p.txt", 1, ("out/q.db", "Permission denied")),
    ],
)
def test_permissions_are_told_of(
    locked: str,
    mode: int,
    command: str,
    code: int,
    says: tuple[str, ...],
    held: Path,
    mortal: tuple[str, ...],
) -> None:
    """What may not be read or written is named before anything is begun."""
    write(held, {"out/kept": ""})
    before = contents(held)
    (held / locked).chmod(mode)
    done, out, error = lbr(held, *command.split(), prefix=mortal)
    (held / locked).chmod(0o700)
    assert (done, out) == (code, "")
    assert all(words in error for words in says), error
    assert contents(held) == before


@pytest.mark.parametrize(
    "wrong",
    [
        case("status", ".env", "UTF-8", files={".env": b"A=\xff\n"}, name=".env not UTF-8"),
        case("status", ".env", "null byte", files={".env": b"A=a\x00b\n"}, name=".env with NUL"),
        case("status", "lbr.toml", "TOML", files={"lbr.toml": "db = ["}, name="not TOML"),
        case("status", "worker in lbr.toml", "a table", "3", files={"lbr.toml": "worker = 3"}, name="no table"),
        case(
            "worker",
            "worker in lbr.toml",
            "'concurency'",
            "concurrency",
            files={"lbr.toml": "[worker]\nconcurency = 3"},
            name="unknown flag",
        ),
        case(
            "status",
            "a flag in lbr.toml, got: 'wroker'",
            "the tables [backup], [batches], [cancel]",
            files={"lbr.toml": "[wroker]\nconcurrency = 3"},
            name="unknown table",
        ),
        case(
            "status",
            "exclusive in worker in lbr.toml to be true or false, got: 'yes'",
            files={"lbr.toml": "[worker]\nexclusive = 'yes'"},
            name="a switch in words",
        ),
        case("status", "none.toml", "No such file", environment={"LBR_CONFIG": "none.toml"}, name="no settings"),
        case("status", "expected . to be TOML", environment={"LBR_CONFIG": "."}, name="settings in a folder"),
        case("status", "UTF-8", "LC_ALL", environment={"LBR_DB": LATIN}, name="twin not UTF-8"),
    ],
)
def test_bad_settings_files_are_refused(wrong: Case, tmp_path: Path) -> None:
    """A `.env` or `lbr.toml` that cannot be understood stops every command, and is named."""
    refuse(tmp_path, wrong)


@pytest.mark.parametrize("name", ["a b?mode=memory.db", "grün%20#&.db"])
def test_every_path_is_the_file_of_that_name(name: str, tmp_path: Path) -> None:
    """What means something in a URL means nothing in a path, neither for the queue nor for an output."""
    write(tmp_path, {"p.txt": "one\ntwo\n"})
    code, _, error = lbr(tmp_path, "--db", name, "run", "p.txt", "--run", "../x", "-o", f"out {name}")
    assert code == 0, error
    assert {path.name for path in tmp_path.iterdir()} == {
        "p.txt",
        name,
        f"{name}.create.lock",
        f"out {name}",
    }
    with closing(sqlite3.connect(tmp_path / f"out {name}")) as connection:
        rows = connection.execute("SELECT run, prompt, result FROM results ORDER BY idx").fetchall()
    assert rows == [("../x", "one", "one"), ("../x", "two", "two")]


@pytest.mark.slow
def test_a_full_or_closed_stdout_is_told_of(held: Path) -> None:
    """A reader that leaves early ends the command quietly, a full disk is an error with its reason."""
    command = f"{sys.executable} -m lbr"
    script = f"{command} status >/dev/full; echo $?; {command} collect p >/dev/full; echo $?; "
    script += f"{command} collect p | true; {command} collect p >&-; echo $?"
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=held,
        env=Cli(held).environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.stdout.split() == ["1", "1", "1"]
    assert done.stderr.count("No space left on device") == 2
    assert "name a file with -o" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("command", ["enqueue p.txt", "run p.txt -o out.jsonl", "estimate p.txt"])
def test_nobody_answers_by_accident(tmp_path: Path, command: str) -> None:
    """Where neither a flag nor the environment says who answers, a cron line must not end well with echoes."""
    says = ("no model given. Use --model",)
    refuse(tmp_path, Case(tuple(command.split()), says, 2, {"p.txt": "a\n"}, environment={"MODEL": ""}))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["enqueue - --run r", "estimate -"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_read_that_waits_for_stdin_can_be_interrupted(number: signal.Signals, command: str, tmp_path: Path) -> None:
    """Ctrl-C ends a command that waits for its first line, quietly and without a trace."""
    with subprocess.Popen(
        [sys.executable, "-m", "lbr", *command.split()],
        cwd=tmp_path,
        env=Cli(tmp_path).environment | {"MODEL": "offline:echo"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdin is not None
        assert waiting.stderr is not None
        # More than a pipe holds, and no end of the line: once it is written, the command waits in its read.
        waiting.stdin.write("a" * 1_000_000)
        waiting.stdin.flush()
        while psutil.Process(waiting.pid).status() != psutil.STATUS_SLEEPING:
            assert waiting.poll() is None
        waiting.send_signal(number)
        code = waiting.wait(timeout=PATIENCE_SECONDS)  # stdin is still open
        error = waiting.stderr.read()
    told = "interrupted"
    if command.startswith("enqueue"):
        told += " at the beginning; run the same command again with the same input to continue"
    assert (code, error) == (130, f"lbr: {told}\n")
    assert not list(tmp_path.iterdir())
