"""The examples of docs/recognition.md run and print what stands there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from kernelwise import ops

PAGE = Path(__file__).parents[2] / "docs" / "recognition.md"


def test_examples_print_what_the_page_says():
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert sum(kind == "text" for kind, _ in blocks) == 3
    space: dict[str, object] = {"__name__": "recognition_page"}
    try:
        printed = ""
        for kind, block in blocks:
            if kind == "text":
                assert printed == block
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, str(PAGE), "exec"), space)
            printed = out.getvalue()
    finally:
        ops.unregister_op("scaled_tanh")


def test_page_names_every_operation():
    named = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    assert set(ops.OPERATIONS) <= named
