"""Fixtures of the tests of measuring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernelwise._models import load_model


@pytest.fixture(autouse=True)
def alone(empty_cache: None, offline: None) -> None:
    """With a cache of its own, or a test waits for whoever else measures here; and without the Hub."""


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_model("llama").model


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 250, (1, 16), generator=torch.Generator().manual_seed(1))}
