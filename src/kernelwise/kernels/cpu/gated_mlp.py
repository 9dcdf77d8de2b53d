"""The gated MLP block: its three projections stay modules of the model, what lies between them is one kernel."""

from __future__ import annotations

import torch

from ._activations import Activation
from .gated_activation import gated_activation


def gated_mlp(
    x: torch.Tensor,
    gate: torch.nn.Module,
    up: torch.nn.Module,
    down: torch.nn.Module,
    *,
    activation: Activation = "silu",
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)) for x [..., H].

    The modules are called, not read, so hooks, adapters and quantised weights keep working. `activation` and the dtypes
    are those of `gated_activation`.
    """
    y: torch.Tensor = down(gated_activation(gate(x), up(x), activation=activation))
    return y
