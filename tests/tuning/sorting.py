"""A norm of no known kind that has two functions as kernels."""

from __future__ import annotations

import torch
from torch import nn

import kernelwise as kw


def sorting(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """A norm of no known kind, with some work that nobody needs."""
    for _ in range(2):
        torch.sort(x, dim=-1)
    return weight * x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps) + torch.tanh(x)


def straight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if torch.compiler.is_compiling():
        for _ in range(40):  # so slow that it shows on a busy machine
            x = x + 0 * torch.sort(x, dim=-1).values
    return weight * x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps) + torch.tanh(x)


def crooked(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    for _ in range(8):
        torch.sort(x, dim=-1)
    return straight(x, weight, eps)


straight.can_torch_compile = True  # type: ignore[attr-defined]


class Sorting(nn.Module):
    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(256) + 0.5)
        self.eps = eps

    def forward(self, x):
        return sorting(x, self.weight, self.eps)


def register_sorting() -> None:
    """Two functions for these layers, which are checked and timed in this process: that is quick."""
    kw.register_op(
        sorting,
        roles={"x": "argument B S H", "weight": "attribute H", "eps": "number"},
        name="sorting_norm",
        layer_name="SortingNorm",
        kernels=[straight, crooked],
    )
