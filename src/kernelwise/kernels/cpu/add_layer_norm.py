"""Residual addition and LayerNorm in one pass, in C++, forward and backward: s = x + residual, y = layer_norm(s)."""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from . import layer_norm as norm
from ._library import direct, load

_ops = load()
_forward = _ops.add_layer_norm.default
_direct = direct(_forward)
_norm_backward = _ops.layer_norm_backward.default
# With gradients, fewer numbers than this go to plain PyTorch: autograd in Python costs more than the kernel gains.
_PLAIN_BELOW = 16384


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(s), s) with s = x + residual, rounded to their dtype.

    `x` and `residual` are [..., H], of one shape and dtype; all else is as for `layer_norm`. Both results are contiguous.
    Raises RuntimeError for other shapes and dtypes.

    >>> x, residual = torch.randn(2, 8), torch.randn(2, 8)
    >>> y, s = add_layer_norm(x, residual, None, None, 1e-5)
    >>> torch.equal(s, x + residual) and torch.allclose(y, torch.nn.functional.layer_norm(s, (8,)), atol=1e-6)
    True
    """
    results: tuple[torch.Tensor, torch.Tensor]
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        if x.numel() < _PLAIN_BELOW and x.shape == residual.shape and x.dtype == residual.dtype:
            total = x + residual
            return norm.plain(total, weight, bias, eps, offset), total
        results = _AddLayerNorm.apply(x, residual, weight, bias, eps, offset)  # type: ignore[no-untyped-call]
        return results
    forward = _forward if is_dynamo_compiling() else _direct
    results = forward(x, residual, weight, bias, eps, offset) if offset else forward(x, residual, weight, bias, eps)
    return results


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        offset: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = _forward(x, residual, weight, bias, eps, offset)
        ctx.save_for_backward(total, weight, bias)
        ctx.options = eps, offset
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight, bias = leaves = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if wants_graph():
            d, dw, db = plain_gradients(lambda *leaves: norm.plain(*leaves, *ctx.options), leaves, (grad,))
            d = grad_sum if d is None else d + grad_sum
        else:
            d, dw, db = _norm_backward(grad, total, weight, bias, *ctx.options, need_weight, need_bias, grad_sum)
        gradients = ((d, need_x), (d, need_residual), (dw, need_weight), (db, need_bias))
        return *(g if need else None for g, need in gradients), None, None
