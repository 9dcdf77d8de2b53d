"""An activation applied to every number, in C++, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from .._layout import by_stride, inverse
from ._activations import CODES, Activation, plain
from ._library import direct, load

_ops = load()
_forward = _ops.activation.default
_direct = direct(_forward)
_backward = _ops.activation_backward.default
_PLAIN_BELOW = 4096  # with gradients, fewer numbers go to plain PyTorch: autograd in Python costs more than is gained
# More half-precision numbers than this go to torch's own GELU, which takes two thirds of the time for 400,000 with AVX2 and as
# long with AVX-512; for 16,384 it takes 1.2 to 1.7 times as long. One thread, torch 2.13.
_GELU_IS_TORCHS_ABOVE = 32768


def activation(x: torch.Tensor, *, activation: Activation = "gelu") -> torch.Tensor:
    """The activation of every number of x, computed in float32 and rounded once.

    `x` is of any shape and strides, in float32, bfloat16 or float16; the result lies in memory in the order of x. "gelu"
    is the erf form, "gelu_tanh" the tanh form. Without gradients, many half-precision numbers go to torch's own "gelu".
    Raises KeyError for an unknown activation, RuntimeError for other dtypes.

    >>> x = torch.randn(3, 16)
    >>> torch.allclose(activation(x, activation="gelu"), torch.nn.functional.gelu(x), atol=1e-6)
    True
    """
    if not x.is_contiguous():
        order = by_stride(x, x.dim())
        if order != tuple(range(x.dim())):
            return _apply(x.permute(order), activation).permute(inverse(order))
    return _apply(x, activation)


def _apply(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if x.dim() == 0:
        return plain(x, activation)
    if is_grad_enabled() and x.requires_grad:
        if x.numel() < _PLAIN_BELOW:
            return plain(x, activation)
        y: torch.Tensor = _Activation.apply(x, activation)  # type: ignore[no-untyped-call]
    elif activation == "gelu" and x.numel() > _GELU_IS_TORCHS_ABOVE and x.dtype != torch.float32:
        y = torch.nn.functional.gelu(x)
    else:
        y = (_forward if is_dynamo_compiling() else _direct)(x, CODES[activation])
    return y


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        y: torch.Tensor = _forward(x, CODES[activation])
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if wants_graph():
            return *plain_gradients(lambda x: plain(x, ctx.activation), (x,), (grad,)), None
        return _backward(grad, x, CODES[ctx.activation]), None
