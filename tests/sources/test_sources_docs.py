from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def test_the_examples_of_the_docs_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
