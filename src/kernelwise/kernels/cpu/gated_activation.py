"""The product of a gated MLP, activation(gate) * up, in C++, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from ._activations import CODES, Activation, plain
from ._library import direct, load

_ops = load()
_forward = _ops.gated_activation.default
_direct = direct(_forward)
_backward = _ops.gated_activation_backward.default
# With gradients, fewer numbers than this go to plain PyTorch: autograd in Python costs more than the kernel gains.
_PLAIN_BELOW = {"silu": 16384}
_PLAIN_BELOW_ELSE = 4096


def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, computed in float32 and rounded once.

    `gate` and `up` have one shape and one dtype (float32, bfloat16, float16). Rows of the last dimension may lie apart,
    as the halves of a packed projection do; other strides are copied. "gelu" is the erf form. The result is contiguous.
    Raises KeyError for an unknown activation, RuntimeError for other shapes and dtypes.

    >>> gate, up = torch.randn(3, 16).chunk(2, -1)
    >>> torch.allclose(gated_activation(gate, up), torch.nn.functional.silu(gate) * up)
    True
    """
    if is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        if gate.numel() < _PLAIN_BELOW.get(activation, _PLAIN_BELOW_ELSE):
            return plain(gate, activation) * up
        y: torch.Tensor = _GatedActivation.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    else:
        y = (_forward if is_dynamo_compiling() else _direct)(gate, up, CODES[activation])
    return y


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y: torch.Tensor = _forward(gate, up, CODES[activation])
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if wants_graph():
            return *plain_gradients(lambda gate, up: plain(gate, ctx.activation) * up, (gate, up), (grad,)), None
        grad_gate, grad_up = _backward(grad, gate, up, CODES[ctx.activation])
        need_gate, need_up, _ = ctx.needs_input_grad
        return grad_gate if need_gate else None, grad_up if need_up else None, None
