"""A model that has kernels is recognised as it was before: what a layer computes is what its own code computes."""

from __future__ import annotations

import models
import torch
from models import Norm, tiny
from torch import nn

import kernelwise as kw


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), nn.SiLU()
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def seen(model: nn.Module) -> list[object]:
    return [(layer.path, layer.name, layer.how, layer.recognition, layer.blocked) for layer in kw.discover(model)]


def test_discover_finds_the_same_after_kernelize() -> None:
    model = nn.Sequential(GatedMLP())
    before = seen(model)
    assert {"SwiGLUMLP", "RMSNorm"} <= {layer.name for layer in kw.discover(model)}
    kw.kernelize(model)
    assert {row.kernel for row in kw.report(model).rows} >= {"builtin:SwiGLUMLP", "builtin:RMSNorm"}
    assert seen(model) == before


def test_a_forward_that_the_kernels_library_left_in_place() -> None:
    """Its `kernelize` writes `forward` on every layer and shared function that it looks at, also where nothing changes."""
    from kernels import Mode, use_kernel_mapping
    from kernels import kernelize as library_kernelize

    model = nn.Sequential(GatedMLP(), tiny())
    before = seen(model)
    assert "rotary" in str(before)
    shared = models.apply_rotary_pos_emb
    with kw.expose_hidden_kernels(model), use_kernel_mapping({}, inherit_mapping=False):
        library_kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=True)
    try:
        assert "forward" in shared.__dict__
        assert seen(model) == before
    finally:
        shared.__dict__.pop("forward", None)
