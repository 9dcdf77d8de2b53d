"""The kernels as layer classes, as repositories of the `kernels` library have them: stateless, with only a forward.

Each forward runs with the replaced module as `self` and reads that module's parameters. The folder that this file stands
in is thereby the content of a kernel repository; in one, only the backend it was built for is beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn


def _by_device(operation: str) -> dict[str, Callable[..., Any]]:
    """The function of an operation for each device type whose backend is here and can be imported."""
    found: dict[str, Callable[..., Any]] = {}
    for device, backend in (("cpu", "cpu"), ("cuda", "triton")):
        try:
            found[device] = getattr(import_module(f".{backend}.{operation}", __package__), operation)
        except ImportError:
            continue
    return found


_RMS_NORM, _GATED_MLP, _ROTARY, _LINEAR = map(_by_device, ("rms_norm", "gated_mlp", "rotary", "linear"))


def _choose(functions: dict[str, Callable[..., Any]], x: torch.Tensor) -> Callable[..., Any]:
    function = functions.get(x.device.type)
    if function is None:
        raise RuntimeError(f"this kernel has no build for {x.device.type}; it has {', '.join(functions) or 'none'}")
    return function


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, rounded to the input's dtype before the weight, as Llama has it."""

    can_torch_compile = True
    has_backward = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] → [..., H]."""
        y: torch.Tensor = _choose(_RMS_NORM, hidden_states)(hidden_states, self.weight, self.variance_epsilon)
        return y


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the three projections are the module's own."""

    can_torch_compile = True
    has_backward = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] → [..., H]."""
        y: torch.Tensor = _choose(_GATED_MLP, x)(x, self.gate_proj, self.up_proj, self.down_proj)
        return y


class Linear(nn.Module):
    """A linear layer with bfloat16 or float16 weights, for CPUs."""

    can_torch_compile = True
    has_backward = True
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] → [..., N] for a weight [N, K]."""
        y: torch.Tensor = _choose(_LINEAR, input)(input, self.weight, self.bias)
        return y


class rotary_pos_emb(nn.Module):  # noqa: N801  (the layer's name in transformers)
    """Rotary position embedding of queries and keys, half layout."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [B, heads, S, D] (heads at `unsqueeze_dim`), cos and sin [B or 1, S, D] → q and k, rotated."""
        rotated: tuple[torch.Tensor, torch.Tensor] = _choose(_ROTARY, q)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotated
