"""Layers as models have them, to be changed in one detail, and what recognition says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernelwise._recognize import Unknown, recognize


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6
        self.calls = 0
        self.log: list[int] = []
        self.state = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, act: nn.Module | None = None, before: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down, self.act = nn.Linear(48, 32, bias=False), act or nn.SiLU()
        self.before = nn.ModuleList(before)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.before:
            x = module(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Any = None) -> tuple[Tensor, None]:
        return self.q(x), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.attention, self.mlp = Norm(), Norm(), Attention(), MLP()

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = x + self.attention(self.norm(x), mask=mask)[0]
        return x + self.mlp(self.norm2(x))


def with_forward(base: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    return type("Changed", (base,), {"forward": forward})()


def reason(module: nn.Module, training: bool | None = None) -> str:
    answer = recognize(module, training=training)
    assert isinstance(answer, Unknown), answer
    return answer.reason


def operation(module: nn.Module, training: bool | None = None) -> str | None:
    answer = recognize(module, training=training)
    return None if isinstance(answer, Unknown) else answer.op
