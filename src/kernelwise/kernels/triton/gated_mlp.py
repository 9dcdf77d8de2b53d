"""The gated MLP block: its three projections stay modules of the model, what lies between them is one kernel."""

from __future__ import annotations

from functools import partial

import torch

from .._recompute import call_recomputing
from .gated_activation import Activation, gated_activation


def gated_mlp(
    x: torch.Tensor,
    gate: torch.nn.Module,
    up: torch.nn.Module,
    down: torch.nn.Module,
    *,
    activation: Activation = "silu",
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) for x [..., H].

    The modules are called, not read, so hooks, adapters and quantised weights keep working. `activation` and the dtypes
    are those of `gated_activation`. Where `down` is a plain linear layer, the product that it would keep for backward is
    computed again there, from what gate and up gave.
    """
    inputs = (gate(x), up(x))
    product = gated_activation(*inputs, activation=activation)
    if not product.requires_grad:
        del inputs  # nobody needs them any more, and what `down` gives may lie where they did
        result: torch.Tensor = down(product)
        return result
    return call_recomputing(down, product, inputs, partial(gated_activation, activation=activation))
