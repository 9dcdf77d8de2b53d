"""Liger's kernels on a GPU: those that are right are never rejected, and those that are not always for the same reason.

    python -m pytest -m gpu tests/verify/test_liger.py -s

Needs liger-kernel; `docs/findings.md` tells what the second list means for a user.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import gallery
import pytest
import torch
from checking import checks_of, decision
from torch import nn

from kernelwise import register_layer
from kernelwise._data import Check
from kernelwise._verifying import _check
from kernelwise._verifying._check import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel"),
]


class GemmaNorm(gallery.Norm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class GeluMLP(gallery.MLP):
    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class PlainLayerNorm(nn.LayerNorm):
    """With weights that are not all ones."""

    def __init__(self) -> None:
        super().__init__(48)
        with torch.no_grad():
            self.weight.copy_(torch.linspace(0.5, 1.5, 48))
            self.bias.copy_(torch.linspace(-1, 1, 48))


for cls, name in ((GemmaNorm, "GemmaNorm"), (GeluMLP, "GeluMLP"), (PlainLayerNorm, "PlainLayerNorm")):
    register_layer(cls, name)


class RmsNorm(nn.Module):
    def forward(self, hidden_states):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class RmsNormInPlace(nn.Module):
    """As LigerRMSNorm has it by default."""

    def forward(self, hidden_states):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", True)


class OffsetRmsNorm(nn.Module):
    def forward(self, x):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 1.0, "gemma", False)


class LayerNormKernel(nn.Module):
    def forward(self, input):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(input, self.weight, self.bias, self.eps)


class SwiGlu(nn.Module):
    def forward(self, x):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class GeGlu(nn.Module):
    def forward(self, x):
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class Rotary(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)


class RotaryOfCopies(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin, None, unsqueeze_dim)


class SwiGluForward(SwiGlu):
    has_backward = False


class GeGluForward(GeGlu):
    has_backward = False


RIGHT: list[tuple[type[nn.Module], type[nn.Module]]] = [
    (RmsNorm, gallery.Norm),
    (OffsetRmsNorm, GemmaNorm),
    (LayerNormKernel, PlainLayerNorm),
    (SwiGluForward, gallery.MLP),
    (GeGluForward, GeluMLP),
]
WRONG: list[tuple[type[nn.Module], type[nn.Module], set[str]]] = [
    (RmsNormInPlace, gallery.Norm, {"input_overwritten"}),
    (SwiGlu, gallery.MLP, {"wrong_gradient"}),
    (GeGlu, GeluMLP, {"wrong_gradient"}),
    (Rotary, gallery.Attention, {"input_overwritten", "missing_gradient", "wrong_values"}),
    (
        RotaryOfCopies,
        gallery.Attention,
        {"missing_gradient", "wrong_values", "input_overwritten", "non_finite", "no_cuda_graph"},
    ),
]


def checks_for(kernel: Any, layer: type[nn.Module], seed: int, dtype: torch.dtype) -> list[Check]:
    torch.manual_seed(seed)
    decided, module = decision(layer().to("cuda", dtype), kernel)
    return list(checks_of(decided, module, options=Options(isolate=False, seed=seed)))


def assert_right(seed: int, as_kernel: Callable[..., Any], cases: frozenset[str] = frozenset()) -> None:
    for kernel, layer in RIGHT:
        for dtype in (torch.bfloat16, torch.float32):
            checks = checks_for(as_kernel(kernel), layer, seed, dtype)
            assert [str(check) for check in checks if check.failed] == [], kernel.__name__
            passed = [check.case for check in checks if check.status == "passed"]
            assert len(passed) > 15
            assert cases <= set(passed), kernel.__name__


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("seed", range(20), ids=[f"s{seed:02}" for seed in range(20)])
def test_kernels_of_liger_that_are_right_are_not_rejected(seed: int, as_kernel: Callable[..., Any]) -> None:
    assert_right(seed, as_kernel)


@pytest.mark.alone
def test_they_are_right_beyond_indices_of_32_bits_too(as_kernel: Callable[..., Any]) -> None:
    assert_right(0, as_kernel, frozenset({"more than 2^31 elements"}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("kernel", "layer", "statuses"), WRONG, ids=[kernel.__name__ for kernel, *_ in WRONG])
def test_kernels_of_liger_that_are_not_right_are_rejected(
    kernel, layer, statuses, dtype, as_kernel, monkeypatch
) -> None:
    # Whether there is memory for the case beyond 2^31 elements depends on the dtype and on what else is on the GPU.
    monkeypatch.setattr(_check, "beyond", lambda *_: None)
    checks = checks_for(as_kernel(kernel), layer, 0, dtype)
    failed = [check for check in checks if check.failed]
    print(f"\n{kernel.__name__} {dtype}: {len(failed)} of {len(checks)} failed")
    for status in dict.fromkeys(check.status for check in failed):
        print(f"  {status}:", "; ".join(check.case for check in failed if check.status == status))
        print("    ", next(check for check in failed if check.status == status))
    assert {check.status for check in failed} == statuses
