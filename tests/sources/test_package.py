from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fakehub import write_files
from torch import nn

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import load

Refuse = Callable[..., KernelLoadError]

LAYERS = b"""
import torch
from torch import nn


class FastNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-6

    def extra_repr(self):
        return "fast"

    def forward(self, hidden_states):
        return hidden_states * self.weight


class Helped(FastNorm):
    def _scale(self, x):
        return x

    def forward(self, x):
        return self._scale(super().forward(x))


class Empty(nn.Module):
    pass


def function(x):
    return x
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    files = {
        "fastlayers/__init__.py": b"",
        "fastlayers/norm.py": LAYERS,
        "fastlayers/broken.py": b"import no_such_thing\n",
    }
    monkeypatch.syspath_prepend(str(write_files(tmp_path / "site", files)))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "fastlayers"]:
        del sys.modules[name]


def of(module: str, layer: str = "FastNorm") -> KernelRef:
    return KernelRef("package", module, layer)


def test_a_layer_of_a_package_is_its_forward() -> None:
    kernel = load(of("fastlayers.norm"), device="cpu")
    module = nn.Module()
    module.weight = torch.full((3,), 2.0)
    assert kernel.function is not None
    assert torch.equal(kernel.function(module, torch.ones(3)), torch.full((3,), 2.0))
    assert kernel.reads == ("weight",)
    assert [p.name for p in kernel.signature] == ["hidden_states"]
    assert len(kernel.content_hash or "") == 64
    assert kernel.limits.requires == ("fastlayers",)


def test_methods_and_super_show_in_what_it_reads() -> None:
    assert load(of("fastlayers.norm", "Helped"), device="cpu").reads == ("_scale", "super()")


def test_a_package_that_is_not_installed(refused: Refuse) -> None:
    error = refused(of("liger_kernel_of_tomorrow.transformers.rms_norm", "LigerRMSNorm"))
    assert "not installed" in error.reason
    assert error.fix == "pip install liger-kernel-of-tomorrow"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (of("fastlayers.other"), "no module fastlayers.other"),
        (of("fastlayers.broken"), "no_such_thing"),
        (of("fastlayers.norm", "FasterNorm"), "it has Empty, FastNorm, Helped"),
        (of("fastlayers.norm", "function"), "no torch.nn.Module class"),
        (of("fastlayers.norm", "Empty"), "no forward"),
        (of("no module"), "no module name"),
        (of(".norm"), "no module name"),
        (of(""), "no module name"),
    ],
)
def test_what_a_package_lacks(refused: Refuse, ref: KernelRef, message: str) -> None:
    assert message in refused(ref).reason
    assert load(of("fastlayers.norm"), device="cpu").reads == ("weight",)


def test_a_package_in_use_stays_loaded_when_a_layer_is_missing(refused: Refuse) -> None:
    kernel = load(of("fastlayers.norm"), device="cpu")
    refused(of("fastlayers.norm", "Missing"))
    assert load(of("fastlayers.norm"), device="cpu").function is kernel.function
