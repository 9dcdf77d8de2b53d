"""LayerNorm over the last dimension, in C++, forward and backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from ._library import direct, load

_ops = load()
_forward = _ops.layer_norm.default
_direct = direct(_forward)
_backward = _ops.layer_norm_backward.default


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    dtype: Literal["own", "float32"] = "own",
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * (offset + weight) + bias over the last dimension.

    `x` is [..., H] in float32, bfloat16 or float16 with any strides (copied where rows are not evenly spaced); `weight`
    and `bias` are [H], both in x's dtype or both in float32, or None. The result has x's dtype and is contiguous. All is
    computed in float32 and rounded once, so `dtype`, which says how the layer's own code does it, makes no difference.
    Raises RuntimeError for other shapes and dtypes.

    >>> x, weight, bias = torch.randn(2, 8), torch.rand(8), torch.rand(8)
    >>> torch.allclose(layer_norm(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (8,), weight, bias), atol=1e-6)
    True
    """
    if is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: torch.Tensor = _LayerNorm.apply(x, weight, bias, eps, offset)  # type: ignore[no-untyped-call]
        return y
    forward = _forward if is_dynamo_compiling() else _direct
    y = forward(x, weight, bias, eps, offset) if offset else forward(x, weight, bias, eps)
    return y


def plain(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float
) -> torch.Tensor:
    """The same in plain PyTorch."""
    scale = weight + offset if weight is not None and offset else weight
    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.options = eps, offset
        y: torch.Tensor = _forward(x, weight, bias, eps, offset)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = leaves = ctx.saved_tensors
        if wants_graph():
            return *plain_gradients(lambda *leaves: plain(*leaves, *ctx.options), leaves, (grad,)), None, None
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx, dw, db = _backward(grad, x, weight, bias, *ctx.options, need_weight, need_bias)
        return dx if need_x else None, dw if need_weight else None, db if need_bias else None, None, None
