"""Everything that the documentation shows is run: README, docs, examples, docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernelwise
from kernelwise._cli import app, main
from kernelwise._register import unregister_op
from kernelwise.ops import OPERATIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    "kernelize.py": "identical after undo: True",
    "plan_for_another_machine.py": "builtin:SwiGLUMLP",
    "config_file.py": "did you mean 'RMSNorm'",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documentation works in any directory, and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    if page.name == "README.md":
        hub = "kernels-community/layer_norm@v1:LlamaRMSNorm"
        assert sum(hub in block for block in blocks(page, "python")) == 1  # for another device: nothing is downloaded
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.fixture(autouse=True)
def own_operations() -> Iterator[None]:
    """Operations that a page adds are gone after it."""
    before = set(OPERATIONS)
    yield
    for name in set(OPERATIONS) - before:
        unregister_op(name)


def test_the_pages_that_should_have_examples_have_them() -> None:
    counts = {page.name: len(blocks(page, "python")) for page in PAGES}
    assert counts["README.md"] == 2
    assert counts["index.md"] == 6


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert EXAMPLES[name] in capsys.readouterr().out


def test_every_example_is_run() -> None:
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def test_the_commands_of_the_docs_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels.toml").write_text('[kernels]\nRMSNorm = "none"\n')
    lines = [line for block in blocks(ROOT / "docs" / "cli.md", "sh") for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "kernelwise"
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert not exit_.value.code, line
    assert "builtin:RMSNorm" in capsys.readouterr().out


def test_every_command_and_option_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    commands = [command.name for command in app.registered_commands]
    assert {"layers", "plan", "demo", "doctor"} <= set(commands)
    for command in commands:
        assert f"kernelwise {command}" in text
    source = "".join(file.read_text() for file in (ROOT / "src" / "kernelwise" / "_cli").glob("*.py"))
    for option in set(re.findall(r'"(--[a-z-]+)"', source)) - {"--version"}:
        assert f"`{option}" in text, option


def modules_with_examples() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(kernelwise.__path__, "kernelwise.")]
    files = {name: Path(ROOT / "src" / (name.replace(".", "/") + ".py")) for name in names if ".triton" not in name}
    return [name for name, file in files.items() if file.is_file() and ">>>" in file.read_text()]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_figures_of_the_readme_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summary = runpy.run_path(str(ROOT / "benchmarks" / "summary.py"))
    assert summary["BEGIN"] + summary["table"]() + summary["END"] in (ROOT / "README.md").read_text()
