"""What the tests of verify share: one layer with one kernel, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gallery
import pytest
import torch
from torch import nn

from kernelwise import discover, register_layer
from kernelwise._data import Check, Decision, Kernel, KernelRef, Layer, Limits
from kernelwise._verify import Options, _made, check_kernel, own_code
from kernelwise.sources._layer_class import kernel_of

for cls, name in ((gallery.Norm, "RMSNorm"), (gallery.LateNorm, "RMSNorm"), (gallery.Clone, "Clone")):
    register_layer(cls, name)


def decision(module: nn.Module, kernel: Kernel, *, mode: str = "inference") -> tuple[Decision, nn.Module]:
    """The decision for the first layer of a module that has a name."""
    model = nn.Sequential(module)
    wanted = [layer for layer in discover(model) if layer.name != "Linear" and layer.path.startswith("0")]
    return Decision(wanted[0], mode, kernel, "test"), module


HERE = Options(isolate=False)


def checks_of(decided: Decision, module: nn.Module, *, seed: int = 0, options: Options = HERE) -> Iterator[Check]:
    layer: Layer = decided.layer
    sample = _made(layer, module, decided.mode, seed)
    assert sample is not None
    return check_kernel(decided, own_code(module, layer), sample, options=options)


@pytest.fixture
def as_kernel() -> Callable[..., Kernel]:
    def make(cls: Any) -> Kernel:
        return kernel_of(KernelRef("path", "/gallery", cls.__name__), cls, limits=Limits(), content_hash=None)

    return make


@pytest.fixture(autouse=True)
def nothing_stale() -> Iterator[None]:
    gallery.STALE.clear()
    gallery.LEAKED.clear()
    yield
    torch._dynamo.reset()
