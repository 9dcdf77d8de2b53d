"""What every test of the core needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# PyTorch notes which functions `with torch.device(...)` is about when it is first used. Were that inside code that has
# replaced one of them for a while (libraries do, to build models without weights), later tests would not get their device.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from before."""
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is not asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing of another test's graphs, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
