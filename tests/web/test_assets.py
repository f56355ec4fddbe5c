"""The files of the dashboard that a browser loads: vendored ones unchanged, own ones few, and no text becomes markup."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

ASSETS = ROOT / "lbr" / "web" / "assets"
VENDORED = dict(re.findall(r"^\| `(.+?)` .*`([0-9a-f]{64})` \|$", (ASSETS / "VENDORED.md").read_text(), re.MULTILINE))
OWN = sorted(file for file in ASSETS.iterdir() if file.name not in {*VENDORED, "VENDORED.md"})
MAX_LINES = 1_200
MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bparseFromString|createContextualFragment|\beval\(|new Function|\bstyle=|setAttribute\(\"(style|on)|javascript:|\bon\w+=[\"']"
FOREIGN = r"(https?:)?//[a-z]"


def test_vendored_files_are_those_that_the_note_names() -> None:
    assert VENDORED.keys() == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, digest in VENDORED.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_a_file_makes_no_markup_and_names_no_other_host(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(MARKUP, text)
    assert not re.findall(FOREIGN, text)


def test_the_page_is_small() -> None:
    assert sum(len(file.read_text().splitlines()) for file in OWN) <= MAX_LINES
