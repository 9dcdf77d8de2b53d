"""Residual addition and layer norm in one pass, forward and backward: s = x + residual, y = layer_norm(s)."""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from torch import Tensor

from . import layer_norm as norm
from ._launch import needs_grad, watched


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual, rounded to their dtype.

    `x` and `residual` are [..., H], of one shape and dtype; all else is as for `layer_norm`. Both results are
    contiguous. Raises ValueError for anything else.
    """
    if watched(x, residual, weight, bias):
        y, total, _ = norm._add_operation(x, residual, weight, bias, eps, offset)
        return y, total
    if needs_grad(x, residual, weight, bias):
        y, total = norm._Function.apply(x, residual, weight, bias, eps, offset)
        return y, total
    y, total, _ = norm._forward(x, residual, weight, bias, eps, offset, False)
    return y, total
