"""Which CPU kernels are put in by themselves: those that beat the layers' own code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernelwise
from kernelwise.kernels import cpu

if reason := cpu.why_unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    ("layer", "kernel"),
    [
        (nn.GELU(), "builtin:GeLU"),
        (nn.GELU(approximate="tanh"), "builtin:GeluTanh"),
        ("gelu_new", "builtin:NewGELU"),
        ("gelu_fast", "builtin:FastGELU"),
        ("quick_gelu", "builtin:QuickGELU"),
        (nn.SiLU(), None),
        (nn.LayerNorm(64), None),
        (nn.ReLU(), None),
    ],
    ids=str,
)
def test_what_an_activation_or_norm_gets(layer, kernel):
    if isinstance(layer, str):
        layer = pytest.importorskip("transformers.activations").ACT2FN[layer]
    model = nn.Sequential(nn.Linear(64, 64), layer).eval()
    x = torch.randn(3, 2000, 64)
    with torch.no_grad():
        own = model(x)
        kernelwise.kernelize(model)
        rows = {row.path: row for row in kernelwise.report(model).rows}
        assert (rows["1"].kernel if "1" in rows else None) == kernel
        assert torch.allclose(model(x), own, atol=1e-6)


def test_a_linear_layer_keeps_its_own_code_in_training_in_dtypes_that_gain_nothing(monkeypatch):
    from kernelwise.kernels.cpu import linear

    monkeypatch.setattr(linear, "why_not_worthwhile", lambda dtype: None)
    monkeypatch.setattr(linear, "gains_in_training", lambda dtype: dtype != torch.float16)
    half = kernelwise.plan(nn.Linear(128, 128, dtype=torch.float16)).decisions
    assert {d.mode: d.kernel is not None for d in half} == {"inference": True, "training": False}
    assert "takes bfloat16 in training; the layer has float16" in str([d.reason for d in half])
    monkeypatch.setattr(linear, "gains_in_training", lambda dtype: False)
    none = kernelwise.plan(nn.Linear(128, 128, dtype=torch.bfloat16)).decisions
    assert "takes nothing in training; the layer has bfloat16" in str([d.reason for d in none])
    monkeypatch.setattr(linear, "gains_in_training", lambda dtype: True)
    for dtype, trained in ((torch.float32, False), (torch.bfloat16, True)):
        decisions = kernelwise.plan(nn.Linear(128, 128, dtype=dtype)).decisions
        assert {d.mode: d.kernel is not None for d in decisions} == {"inference": True, "training": trained}
    small = kernelwise.plan(nn.Linear(112, 112, bias=False)).decisions
    assert not any(d.kernel for d in small)
    assert "fewer than 16,384 numbers; the layer has 12,544" in str(small[0].reason)
