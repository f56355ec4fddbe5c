"""`lbr failures` and `lbr show`, from the outside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support import Cli

FUNCTION = """
import lbr

def answer(prompt):
    if prompt.startswith("bad"):
        raise lbr.Permanent(f"refused {prompt}\\nrun x: finished \\x1b[2J", text="half\\nof it")
    return {"name": prompt, "n": 1}
"""


def enqueue(cli: Cli) -> None:
    """Have a run of three inputs answered; two of them fail alike."""
    (cli.folder / "fn.py").write_text(FUNCTION)
    lines = [{"prompt": "good", "id": "g"}, {"prompt": "bad 1", "id": 5}, {"prompt": "bad 2"}]
    (cli.folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    cli("enqueue", "in.jsonl", "--function", "fn:answer")
    cli("worker", "--function", "fn:answer", check=False)


def test_failures_in_groups_and_in_rows(cli: Cli) -> None:
    """Data go to stdout and advice to stderr; a message stays on its line and steers no terminal."""
    enqueue(cli)
    told = cli("failures", "in")
    assert told.stdout == (
        "run in: 2 jobs failed\n"
        "\n"
        "2 permanent Permanent: refused bad 1 run x: finished \\x1b[2J\n"
        "  example: `lbr show in 1`\n"
    )
    assert told.stderr == "lbr: `lbr retry in` puts these jobs back\n"
    rows = cli("failures", "in", "--rows").stdout.splitlines()
    assert [line.split(": permanent")[0] for line in rows] == ["input 1 (id 5)", "input 2"]
    (group,) = map(json.loads, cli("failures", "in", "--json").stdout.splitlines())
    assert (group["count"], group["idx"], "\n" in group["message"]) == (2, 1, True)
    listed = [json.loads(line) for line in cli("failures", "in", "--json", "--rows").stdout.splitlines()]
    assert [(one["idx"], one["id"]) for one in listed] == [(1, "5"), (2, None)]
    cli("retry", "in")
    assert cli("failures", "in").stdout == "run in: 0 jobs failed\n"
    assert cli("failures", "nosuch", check=False).stderr == "lbr: no run named 'nosuch'; runs here: in\n"


def test_show_has_sections(cli: Cli) -> None:
    """An input is found by its index or its id; a JSON answer is written out, and hostile text stays in its section."""
    enqueue(cli)
    good = cli("show", "in", "--id", "g").stdout
    assert good == cli("show", "in", "0").stdout
    assert good.startswith("run in, input 0, id g: done\nkey ")
    assert "\n\nprompt\n  good\n\nanswer: function, " in good
    assert good.endswith('\n  {\n    "name": "good",\n    "n": 1\n  }\n')
    head, *sections = cli("show", "in", "--id", "5").stdout.split("\n\n")
    assert head.splitlines()[0] == "run in, input 1, id 5: failed"
    assert sections[0] == "prompt\n  bad 1"
    assert sections[1].splitlines()[1:] == [
        "  permanent Permanent: refused bad 1",
        "  run x: finished \\u001b[2J",
        "  raw answer",
        "    half",
        "    of it",
    ]
    for wrong in (("in",), ("in", "0", "--id", "g")):
        refused = cli("show", *wrong, check=False)
        assert (refused.returncode, "name one input" in refused.stderr) == (2, True)


def test_show_writes_out_a_chat(cli: Cli) -> None:
    """Each message under its role; images are counted, not printed."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400}}
    parts = [{"type": "text", "text": "What is\nthis?"}, image]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    (cli.folder / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    cli("enqueue", "in.jsonl", "--model", "offline:echo")
    shown = cli("show", "in", "0").stdout
    lines = ["prompt", "  system", "    Be brief.", "  user", "    What is", "    this?"]
    assert "\n".join(lines) in shown
    assert shown.endswith("    [1 part without text]\n")
    assert "AAAA" not in shown
