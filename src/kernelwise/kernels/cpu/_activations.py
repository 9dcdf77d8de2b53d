"""The activations that the kernels know, and the same in plain PyTorch."""

from __future__ import annotations

from typing import Literal

import torch

Activation = Literal["silu", "gelu", "gelu_python", "gelu_tanh", "gelu_new", "gelu_fast", "quick_gelu"]

# kernels.h: Activation. Names that differ by roundings alone share a formula: all are computed in float32.
CODES = {
    "silu": 0,
    "gelu": 1,
    "gelu_python": 1,
    "gelu_tanh": 2,
    "gelu_new": 2,
    "gelu_fast": 2,
    "quick_gelu": 3,
}


def plain(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of every number of x."""
    code = CODES[activation]
    if code == 0:
        return torch.nn.functional.silu(x)
    if code == 3:
        return x * torch.sigmoid(1.702 * x)
    return torch.nn.functional.gelu(x, approximate="tanh" if code == 2 else "none")
