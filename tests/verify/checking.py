"""What the tests of verify share: one layer with one kernel, checked."""

from __future__ import annotations

from collections.abc import Iterator

import gallery
from torch import nn

from kernelwise import discover, register_layer
from kernelwise._data import Check, Decision, Kernel, Layer
from kernelwise._verifying._check import Options, check_kernel, own_code
from kernelwise._verifying._verify import _made
from kernelwise._verifying._worker import Worker

for cls, name in (
    (gallery.Norm, "RMSNorm"),
    (gallery.LateNorm, "RMSNorm"),
    (gallery.Clone, "Clone"),
    (gallery.PlainLayerNorm, "PlainLayerNorm"),
):
    register_layer(cls, name)


def decision(module: nn.Module, kernel: Kernel, *, mode: str = "inference") -> tuple[Decision, nn.Module]:
    """The decision for the first layer of a module that has a name."""
    model = nn.Sequential(module)
    wanted = [layer for layer in discover(model) if layer.name != "Linear" and layer.path.startswith("0")]
    return Decision(wanted[0], mode, kernel, "test"), module


HERE = Options(isolate=False)


def checks_of(
    decided: Decision, module: nn.Module, *, seed: int = 0, options: Options = HERE, worker: Worker | None = None
) -> Iterator[Check]:
    layer: Layer = decided.layer
    sample = _made(layer, module, decided.mode, seed)
    assert sample is not None
    if worker is not None:
        options = Options(isolate=True, seed=seed)
    return check_kernel(decided, own_code(module, layer), sample, options=options, worker=worker)
