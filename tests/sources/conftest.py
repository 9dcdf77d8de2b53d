from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakehub import FakeHub, forget_kernels
from loading import process_state

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import load


@pytest.fixture(autouse=True)
def no_kernels_from_other_tests() -> Iterator[None]:
    forget_kernels()
    yield
    forget_kernels()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub with one trusted organisation, `good`, which this process uses."""
    with FakeHub(trusted={"good"}) as hub, hub.patched(tmp_path / "cache"):
        yield hub


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., KernelLoadError]:
    """Load what must not load: one error with a reason in one line, and the process is as it was."""

    def refuse(ref: KernelRef, *, device: str = "cpu") -> KernelLoadError:
        before, names = process_state(tmp_path), set(sys.modules)
        with pytest.raises(KernelLoadError) as caught:
            load(ref, device=device)
        assert process_state(tmp_path) == before
        assert not [name for name in set(sys.modules) - names if name.startswith(("_norm", "_broken"))]
        error = caught.value
        assert error.ref == str(ref)
        assert "\n" not in error.reason
        assert error.reason
        return error

    return refuse
