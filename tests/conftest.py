"""What every test of the core needs."""

from __future__ import annotations

from collections.abc import Iterator

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
def fresh_compiler() -> Iterator[None]:
    """Nothing of another test's graphs, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
