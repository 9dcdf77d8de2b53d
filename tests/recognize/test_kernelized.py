"""A model that has kernels is recognised as it was before: what a layer computes is what its own code computes."""

from __future__ import annotations

import torch
from models import Norm
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
