"""The lines that docs/how-it-works.md shows beside the equations are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_lines_beside_equations_are_in_the_code() -> None:
    page = (ROOT / "docs/how-it-works.md").read_text()
    source, shown = "", 0
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# "):
                source = (ROOT / "src/llama_adapter" / line.removeprefix("# ")).read_text()
                continue
            assert line in source, line
            shown += 1
    assert shown >= 6
