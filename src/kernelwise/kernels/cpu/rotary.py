"""Rotary position embedding of q and k in the half layout, in C++, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import wants_graph
from ._library import direct, load

_ops = load()
_forward = _ops.rotary.default
_direct = direct(_forward)
_backward = _ops.rotary_backward.default


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + rotate_half(x) * sin for q and k, computed in float32 and rounded once.

    `q` is [B, Hq, S, D] and `k` [B, Hk, S, D], or with `unsqueeze_dim=2` [B, S, H, D]; both of one dtype (float32,
    bfloat16, float16), D even, any strides (copied where the last is not 1). `cos` and `sin` are [B or 1, S, D] in q's
    dtype or float32; their second half need not repeat the first. The results have the dtype to which PyTorch promotes
    q and cos and lie in memory as [B, S, H, D]. Where cos or sin needs a gradient, plain PyTorch computes.
    Raises RuntimeError for other shapes and dtypes.
    """
    if is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            return plain(q, k, cos, sin, unsqueeze_dim)
        if q.requires_grad or k.requires_grad:
            recorded: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-untyped-call]
            return recorded
    forward = _forward if is_dynamo_compiling() else _direct
    rotated: tuple[torch.Tensor, torch.Tensor]
    rotated = forward(q, k, cos, sin) if unsqueeze_dim == 1 else forward(q, k, cos, sin, unsqueeze_dim)
    return rotated


def plain(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * c + _rotate_half(q) * s, k * c + _rotate_half(k) * s


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim, ctx.dtype = unsqueeze_dim, q.dtype
        rotated: tuple[torch.Tensor, torch.Tensor] = _forward(q, k, cos, sin, unsqueeze_dim)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if wants_graph():
            # The map back is again a rotation: with the halves of sin in each other's place, and the other sign.
            cos, sin = ctx.saved_tensors
            first, second = sin.chunk(2, -1)
            back = rotary(grad_q, grad_k, cos, -torch.cat((second, first), -1), unsqueeze_dim=ctx.unsqueeze_dim)
            return back[0].to(ctx.dtype), back[1].to(ctx.dtype), None, None, None
        dq, dk = _backward(grad_q, grad_k, *ctx.saved_tensors, ctx.unsqueeze_dim, ctx.dtype)
        need_q, need_k = ctx.needs_input_grad[:2]
        return dq if need_q else None, dk if need_k else None, None, None, None
