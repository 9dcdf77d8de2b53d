"""A model that has kernels is recognised as it was before: what a layer computes is what its own code computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
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


class Holder:
    def __init__(self, eps: float) -> None:
        self.eps = eps


class Configured(nn.Module):
    """A norm whose epsilon stands in an object, or in a list, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64))
        self.config, self.numbers = Holder(1e-6), [1e-6]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + max(self.config.eps, self.numbers[0]))
        return self.weight * y.to(x.dtype)


class Dropped(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.more = nn.Dropout(0.9), nn.Sequential(nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.drop(self.more(self.gate_proj(x)) * self.up_proj(x)))


def change_config(layer: Any) -> None:
    layer.config.eps = 1.0


def change_list(layer: Any) -> None:
    layer.numbers[0] = 1.0


def train_child(layer: Any) -> None:
    layer.drop.train()


def append_to_child(layer: Any) -> None:
    layer.more.append(nn.Tanh())


def replace_in_child(layer: Any) -> None:
    layer.more[0] = nn.Tanh()


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (Configured, change_config),
        (Configured, change_list),
        (Dropped, train_child),
        (Dropped, append_to_child),
        (Dropped, replace_in_child),
    ],
)
def test_what_a_layer_was_recognised_by_may_change_while_a_kernel_is_in(
    cls: type[nn.Module], change: Callable[[Any], None]
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(cls()).eval(), torch.randn(2, 6, 64 if cls is Configured else 8)
    own = copy.deepcopy(model)
    kw.kernelize(model)
    assert "builtin:" in {row.kernel[:8] for row in kw.report(model).rows if row.kernel}
    for layer in (model, own):
        with torch.no_grad():
            layer(x)
        change(layer[0])
    with torch.no_grad():
        torch.manual_seed(1)
        found = model(x)
        torch.manual_seed(1)
        expected = own(x)
    torch.testing.assert_close(found, expected)
    state = model[0]._kernelwise
    assert any("since the kernel went in" in reason for reason in state.fallbacks)
