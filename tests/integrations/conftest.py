from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakehub import FakeHub, forget_kernels
from tiny import build, repository


@pytest.fixture(autouse=True)
def no_kernels_from_other_tests() -> Iterator[None]:
    forget_kernels()
    yield
    forget_kernels()
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small Llama, saved."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def norm(tmp_path: Path) -> str:
    """The local path of a kernel repository, with the colon: `norm + "MarkedNorm"`."""
    return f"{repository(tmp_path)}:"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with one trusted organisation, `good`, which this process uses."""
    with FakeHub(trusted={"good"}) as hub, hub.patched(tmp_path / "cache"):
        yield hub
