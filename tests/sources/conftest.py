from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakehub import FakeHub, forget_kernels

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import _import, _kernels_compat, load

NORM = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states)
"""


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


def process_state(folder: Path) -> object:
    """What loading a kernel may change in the process: modules from below a folder, and the registries."""
    modules = {n for n, m in list(sys.modules.items()) if str(folder) in str(getattr(m, "__file__", None) or "")}
    registry = dict(_kernels_compat.loaded_kernels())
    return modules, registry, dict(_import._imported), sys.pycache_prefix, sys.dont_write_bytecode, list(sys.path)


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
