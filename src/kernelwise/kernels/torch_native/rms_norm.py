"""RMSNorm over the last dimension with `torch.nn.functional.rms_norm`."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, cast: Literal["before", "after"] = "after"
) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 and rounded once.

    `x` is [..., H]; `weight` is [H] in x's dtype, or None. With `cast` "before" the layer rounds before the weight as well:
    this function is then the more exact one. Raises RuntimeError for a weight of another dtype: the result would have
    another dtype than the layer's.
    """
    if weight is not None and weight.dtype != x.dtype:
        raise RuntimeError(f"the weight is {weight.dtype}, the input {x.dtype}")
    return F.rms_norm(x, x.shape[-1:], weight, eps)
