"""The product of a gated MLP, activation(gate) * up, in C++, forward and backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from ._library import load

Activation = Literal["silu", "gelu", "gelu_tanh"]

_ops = load()
_forward = _ops.gated_activation.default
_backward = _ops.gated_activation_backward.default
_CODE = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # kernels.h: Activation
# With gradients, fewer numbers than this go to plain PyTorch: autograd in Python costs more than the kernel gains.
_PLAIN_BELOW = {"silu": 16384, "gelu": 4096, "gelu_tanh": 4096}


def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, computed in float32 and rounded once.

    `gate` and `up` have one shape and one dtype (float32, bfloat16, float16). Rows of the last dimension may lie apart,
    as the halves of a packed projection do; other strides are copied. "gelu" is the erf form. The result is contiguous.
    Raises KeyError for an unknown activation, RuntimeError for other shapes and dtypes.

    >>> gate, up = torch.randn(3, 16).chunk(2, -1)
    >>> torch.allclose(gated_activation(gate, up), torch.nn.functional.silu(gate) * up)
    True
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        if gate.numel() < _PLAIN_BELOW[activation]:
            return _plain(gate, activation) * up
        y: torch.Tensor = _GatedActivation.apply(gate, up, _CODE[activation])  # type: ignore[no-untyped-call]
    else:
        y = _forward(gate, up, _CODE[activation])
    return y


def _plain(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, code: int) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.code = code
        y: torch.Tensor = _forward(gate, up, code)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_gate, grad_up = _backward(grad, *ctx.saved_tensors, ctx.code)
        need_gate, need_up, _ = ctx.needs_input_grad
        return grad_gate if need_gate else None, grad_up if need_up else None, None
