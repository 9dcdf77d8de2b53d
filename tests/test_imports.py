"""The front door is small, and heavy things arrive late."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import kernelwise


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """The modules that each step brings in, in a process of their own."""
    code = """
import sys, torch
known = set(sys.modules)
def step(name):
    global known
    print(name, *set(sys.modules) - known)
    known = set(sys.modules)
import kernelwise
step("import")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
kernelwise.unkernelize(kernelwise.kernelize(model))
step("kernelize")
print(kernelwise.report(kernelwise.kernelize(model)) and "report")
"""
    path = ":".join(filter(None, sys.path))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": path, "PATH": ""})
    steps = [line.split() for line in done.stdout.splitlines()]
    return {name: set(modules) for name, *modules in steps}


def test_importing_brings_nothing_heavy(brought: dict[str, set[str]]) -> None:
    assert "kernelwise._api" in brought["import"]
    heavy = {"triton", "transformers", "huggingface_hub", "kernels", "accelerate", "rich", "typer"}
    assert heavy & brought["import"] == set()


def test_kernelizing_with_builtin_kernels_needs_neither_the_hub_nor_transformers(brought: dict[str, set[str]]) -> None:
    assert {"transformers", "huggingface_hub", "kernels", "triton"} & brought["kernelize"] == set()


def test_the_public_names_are_few_and_all_there() -> None:
    assert len(kernelwise.__all__) <= 20
    assert sorted(kernelwise.__all__) == list(kernelwise.__all__)
    assert len(set(kernelwise.__all__)) == len(kernelwise.__all__)
    for name in kernelwise.__all__:
        assert getattr(kernelwise, name) is not None


def test_no_public_name_stands_outside_the_list() -> None:
    public = {
        name
        for name, value in vars(kernelwise).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"annotations", "TYPE_CHECKING", "Any"} == set(kernelwise.__all__) - {"Mode"}


def test_public_things_say_what_they_are() -> None:
    for name in set(kernelwise.__all__) - {"Mode"}:
        assert (getattr(kernelwise, name).__doc__ or "").strip(), name


def test_errors_are_one_family() -> None:
    for name in ("KernelConfigError", "KernelLoadError", "PlanError", "ApplyError"):
        assert issubclass(getattr(kernelwise, name), kernelwise.KernelwiseError)
    assert issubclass(kernelwise.KernelConfigError, ValueError)
