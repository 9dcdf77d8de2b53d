"""A pytest plugin for authors of kernels: one test for each check of a kernel on each layer that it could serve.

    pytest -p kernelwise._pytest_plugin --kernelwise ./my-kernel:RMSNorm --kernelwise-model llama

The checks run when tests are collected, in the worker; the tests say what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kernelwise._data import Check
from kernelwise._errors import KernelwiseError


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--kernelwise`, `--kernelwise-model`, `--kernelwise-dtype` and `--kernelwise-device`."""
    group = parser.getgroup("kernelwise")
    group.addoption("--kernelwise", action="append", default=[], metavar="DIR_OR_REPO:LAYER", help="A kernel to check.")
    group.addoption(
        "--kernelwise-model", action="append", default=[], metavar="MODEL", help="Where to look for layers."
    )
    group.addoption("--kernelwise-dtype", default=None, metavar="DTYPE", help="The dtype of those models.")
    group.addoption("--kernelwise-device", default="cpu", metavar="DEVICE", help="Where to run them.")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check the kernels that were named and add a test for each check."""
    for text in config.getoption("--kernelwise"):
        collector = _KernelChecks.from_parent(session, name=text)
        items.extend(collector.collect())


class _KernelChecks(pytest.Collector):
    def collect(self) -> Iterator[pytest.Item]:
        from kernelwise._author import MODELS, read_reference, verify_kernel

        try:
            checks = verify_kernel(
                read_reference(self.name),
                models=tuple(self.config.getoption("--kernelwise-model")) or MODELS,
                dtype=self.config.getoption("--kernelwise-dtype"),
                device=self.config.getoption("--kernelwise-device"),
            )
        except KernelwiseError as error:  # raised here, it would end the run of all tests
            failed: pytest.Item = _NotCheckedItem.from_parent(self, name=f"{self.name}[load]", error=error)
            yield failed
            return
        for check in checks.checks:
            item: pytest.Item = _CheckItem.from_parent(self, name=f"{check.layer}[{check.case}]", check=check)
            yield item


class _NotCheckedItem(pytest.Item):
    """A kernel that no check could be made of, because it does not load or fits no layer: one test that fails."""

    def __init__(self, *, error: KernelwiseError, **options: Any) -> None:
        super().__init__(**options)
        self.error = error

    def runtest(self) -> None:
        raise self.error

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return str(self.error)

    def reportinfo(self) -> tuple[str, None, str]:
        return self.name, None, self.name


class _CheckItem(pytest.Item):
    def __init__(self, *, check: Check, **options: Any) -> None:
        super().__init__(**options)
        self.check = check

    def runtest(self) -> None:
        if self.check.status == "skipped":
            pytest.skip(self.check.detail)
        assert not self.check.failed, str(self.check)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        return f"{self.check.kernel} on {self.check.layer}\n{self.check}"

    def reportinfo(self) -> tuple[str, None, str]:
        return self.check.kernel, None, self.name
