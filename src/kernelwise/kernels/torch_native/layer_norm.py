"""Layer normalisation over the last dimension with `torch.nn.functional.layer_norm`."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    dtype: Literal["own", "float32"] = "own",
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, computed in float32 and rounded once.

    `x` is [..., H]; `weight` and `bias` are [H] in x's dtype, or None. `dtype` "float32" is what a layer says that casts
    its input by hand: the operator computes so anyway. Raises RuntimeError for parameters of another dtype.
    """
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype != x.dtype:
            raise RuntimeError(f"a parameter is {parameter.dtype}, the input {x.dtype}")
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
