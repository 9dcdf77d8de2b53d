"""Residual addition and RMSNorm in one pass, in C++, forward and backward: s = x + residual, y = rms_norm(s)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from . import rms_norm as norm
from ._library import direct, load

_ops = load()
_forward = _ops.add_rms_norm.default
_direct = direct(_forward)
_norm_backward = _ops.rms_norm_backward.default
_CAST_AFTER = {"before": False, "after": True}


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Literal["before", "after"] = "before",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual, rounded to their dtype.

    `x` and `residual` are [..., H], of one shape and dtype; all else is as for `rms_norm`. Both results are contiguous.
    Raises RuntimeError for other shapes and dtypes.

    >>> x, residual, weight = torch.randn(2, 8), torch.randn(2, 8), torch.rand(8)
    >>> y, s = add_rms_norm(x, residual, weight, 1e-6)
    >>> torch.equal(s, x + residual) and torch.allclose(y, torch.nn.functional.rms_norm(s, (8,), weight, 1e-6), atol=1e-6)
    True
    """
    results: tuple[torch.Tensor, torch.Tensor]
    if is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)
    ):
        results = _AddRmsNorm.apply(x, residual, weight, eps, offset, _CAST_AFTER[cast])  # type: ignore[no-untyped-call]
        return results
    forward = _forward if is_dynamo_compiling() else _direct
    if offset or cast != "before":
        results = forward(x, residual, weight, eps, offset, _CAST_AFTER[cast])
    else:
        results = forward(x, residual, weight, eps)  # the most common call; every number less saves 0.2 us
    return results


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_after: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = _forward(x, residual, weight, eps, offset, cast_after)
        ctx.save_for_backward(total, weight)
        ctx.options = eps, offset, cast_after
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if wants_graph():
            d, dw = plain_gradients(lambda *leaves: norm.plain(*leaves, *ctx.options), (total, weight), (grad,))
            d = grad_sum if d is None else d + grad_sum
        else:
            d, dw = _norm_backward(grad, total, weight, *ctx.options, ctx.needs_input_grad[2], grad_sum)
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        return d if need_x else None, d if need_residual else None, dw if need_weight else None, None, None, None
