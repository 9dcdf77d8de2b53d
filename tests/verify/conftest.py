"""Fixtures of the tests of verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gallery
import pytest
import torch
from proving import write_repository

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise._verifying import _cases, _check, _prove
from kernelwise.sources._layer_class import kernel_of


@pytest.fixture
def as_kernel() -> Callable[..., Kernel]:
    def make(cls: Any) -> Kernel:
        return kernel_of(KernelRef("path", "/gallery", cls.__name__), cls, limits=Limits(), content_hash=None)

    return make


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two cases of 2^31 elements, for tests that share the GPU: those that have it alone are about these."""
    monkeypatch.setattr(_check, "beyond", lambda *_: None)
    monkeypatch.setattr(_cases, "_far_apart", lambda *_: {})


@pytest.fixture(autouse=True)
def proofs_of_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered in the cache of whoever runs the tests."""
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path_factory.getbasetemp() / "proofs"))


@pytest.fixture(autouse=True)
def nothing_stale() -> Iterator[None]:
    gallery.STALE.clear()
    gallery.LEAKED.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def empty_cache(empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proven yet, in this process or on disk."""
    monkeypatch.setattr(_prove, "_remembered", {})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "proved")


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about what is remembered, not about what is checked."""
    monkeypatch.setattr(_cases, "_SIZES", ())
    monkeypatch.setattr(_cases, "_MANY_ROWS", {**_cases._MANY_ROWS, "S": 101})
