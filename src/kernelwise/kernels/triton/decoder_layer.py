"""A pre-norm decoder layer whose first residual sum is taken with the norm that follows it, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .add_layer_norm import add_layer_norm
from .add_rms_norm import add_rms_norm
from .layer_norm import layer_norm
from .rms_norm import rms_norm

Module = Callable[[torch.Tensor], torch.Tensor]
SumAndNorm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# A norm's operation → its kernel, and the kernel that takes the sum before it.
SUMS = {"rms_norm": (rms_norm, add_rms_norm), "layer_norm": (layer_norm, add_layer_norm)}


LEAST = 1 << 20
"""Elements of the hidden states from which on the sum and the norm run in one pass (chosen: below, launches are all)."""


def decoder_layer(
    x: torch.Tensor,
    input_norm: Module,
    attention: Module,
    attention_out: Module | None,
    mlp_norm: Module,
    mlp: Module,
    mlp_out: Module | None,
    multiplier: float | None,
    *,
    sum_norm: SumAndNorm,
) -> torch.Tensor:
    """Return `h + mlp(mlp_norm(h))` with `h = x + attention(input_norm(x))`; x: [..., H].

    The children are called as they are, but for `mlp_norm`: `sum_norm(a, x)` gives `mlp_norm(x + a)` and `x + a`.
    """
    added = attention(input_norm(x))
    if attention_out is not None:
        added = attention_out(added)
    if multiplier is not None:
        added = added * multiplier
    normed, h = sum_norm(added, x)
    added = mlp(normed)
    if mlp_out is not None:
        added = mlp_out(added)
    if multiplier is not None:
        added = added * multiplier
    return h + added
