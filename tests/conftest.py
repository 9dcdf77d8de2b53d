"""What every test of the core needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing of another test's graphs, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
