"""Fixtures of the tests of verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gallery
import pytest
import torch

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources._layer_class import kernel_of


@pytest.fixture
def as_kernel() -> Callable[..., Kernel]:
    def make(cls: Any) -> Kernel:
        return kernel_of(KernelRef("path", "/gallery", cls.__name__), cls, limits=Limits(), content_hash=None)

    return make


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
