"""prompt_map in a notebook that a real kernel executes."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

nbformat = pytest.importorskip("nbformat")

CELLS = (
    """
import asyncio
import pandas as pd
import lbr

async def answer(prompt):
    await asyncio.sleep(0.3)
    return prompt.upper()
""",
    'frame = await lbr.prompt_map(pd.DataFrame({"prompt": ["a", "b"]}), answer, run="r", version="1")\nframe["result"].tolist()',
    'lbr.prompt_map_sync(["c", "c"], answer, run="s", version="1")',
    '[row["result"] async for row in lbr.stream(["a", "b"], answer, version="1")]',
)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_notebook_is_executed(tmp_path: Path) -> None:
    """Awaited, plain and streamed, beside the kernel's own loop: results, a bar of its own, the last line, notices."""
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())
    shown: list[dict[str, Any]] = [
        {
            "results": [one["data"]["text/plain"] for one in cell.outputs if one.output_type == "execute_result"],
            "bars": [one["data"]["text/plain"] for one in cell.outputs if one.output_type == "display_data"],
            "lines": [
                re.sub(r" in [0-9.]+ s$", "", line)
                for line in "".join(one.text for one in cell.outputs if one.output_type == "stream").splitlines()
            ],
        }
        for cell in notebook.cells
    ]
    bar = shown[1].pop("bars")[0]
    assert bar.startswith(f"r  {'━' * 62}  100 %  2 of 2\n  2 done\n")
    assert shown[1] == {
        "results": ["['A', 'B']"],
        "lines": ["lbr: run r: 2 of 2 jobs done"],
    }
    assert "'result': 'C'" in shown[2]["results"][0]
    assert shown[2]["bars"][0].startswith(f"s  {'━' * 62}  100 %  1 of 1\n")
    assert shown[2]["lines"] == [
        "2 prompts, 1 of them distinct: 1 row; output_shape='original' returns a row for each prompt",
        "lbr: run s: 1 of 1 job done",
    ]
    assert shown[3]["results"] == ["['A', 'B']"]
