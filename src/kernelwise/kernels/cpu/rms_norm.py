"""RMSNorm over the last dimension, in C++, forward and backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from .._layout import inverse, leading_order
from ._library import direct, load

_ops = load()
_forward = _ops.rms_norm.default
_direct = direct(_forward)
_backward = _ops.rms_norm_backward.default
_CAST_AFTER = {"before": False, "after": True}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Literal["before", "after"] = "before",
) -> torch.Tensor:
    """(offset + weight) * x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32.

    `x` is [..., H] in float32, bfloat16 or float16 with any strides (copied where rows are not evenly spaced); `weight`
    is [H] in x's dtype or float32, or None. `cast` says when the normalised numbers are rounded to x's dtype: "before"
    the weight is applied (the result then has the dtype to which PyTorch promotes x and weight) or "after".
    The result lies in memory in the order of x. Raises RuntimeError for other shapes and dtypes.

    >>> x, weight = torch.randn(2, 8), torch.rand(8)
    >>> torch.allclose(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
    True
    """
    if not x.is_contiguous() and (order := leading_order(x)) is not None:
        return rms_norm(x.permute(order), weight, eps, offset=offset, cast=cast).permute(inverse(order))
    if is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        y: torch.Tensor = _RmsNorm.apply(x, weight, eps, offset, _CAST_AFTER[cast])  # type: ignore[no-untyped-call]
        return y
    forward = _forward if is_dynamo_compiling() else _direct
    usual = offset == 0.0 and cast == "before"  # every number less saves 0.2 us
    y = forward(x, weight, eps) if usual else forward(x, weight, eps, offset, _CAST_AFTER[cast])
    return y


def plain(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_after: bool) -> torch.Tensor:
    """The same in plain PyTorch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_after:
        return ((offset + weight.float()) * normed).to(x.dtype)
    return (weight + offset if offset else weight) * normed.to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_after: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = eps, offset, cast_after
        y: torch.Tensor = _forward(x, weight, eps, offset, cast_after)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if wants_graph():
            return (
                *plain_gradients(lambda x, weight: plain(x, weight, *ctx.options), (x, weight), (grad,)),
                None,
                None,
                None,
            )
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = _backward(grad, x, weight, *ctx.options, need_weight)
        return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None
