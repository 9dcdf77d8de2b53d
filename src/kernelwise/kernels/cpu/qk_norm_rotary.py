"""RMSNorm over each head of q and k, then rotary position embedding, in one pass in C++, forward and backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import plain_gradients, wants_graph
from . import rms_norm as norm
from . import rotary as rotation
from ._library import direct, load

_ops = load()
_forward = _ops.qk_norm_rotary.default
_direct = direct(_forward)
_backward = _ops.qk_norm_rotary_backward.default
_CAST_AFTER = {"before": False, "after": True}


def qk_norm_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Literal["before", "after"] = "before",
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin), computed in float32 and rounded once.

    Shapes and dtypes are those of `rms_norm` and `rotary`: q [B, Hq, S, D] and k [B, Hk, S, D] (`unsqueeze_dim=2`:
    [B, S, H, D]), D even and at most 1024; weights [D], both in q's dtype, both float32, or None; cos and sin
    [B or 1, S, D]. The results lie in memory as [B, S, H, D]. Where cos or sin needs a gradient, plain PyTorch computes.
    Raises RuntimeError for other shapes and dtypes.
    """
    cast_after = _CAST_AFTER[cast]
    results: tuple[torch.Tensor, torch.Tensor]
    if is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            return _plain(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, unsqueeze_dim)
        if any(t is not None and t.requires_grad for t in (q, k, q_weight, k_weight)):
            results = _QkNormRotary.apply(  # type: ignore[no-untyped-call]
                q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, unsqueeze_dim
            )
            return results
    forward = _forward if is_dynamo_compiling() else _direct
    if offset or cast_after or unsqueeze_dim != 1:
        results = forward(q, k, q_weight, k_weight, cos, sin, eps, offset, cast_after, unsqueeze_dim)
    else:
        results = forward(q, k, q_weight, k_weight, cos, sin, eps)
    return results


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    cast_after: bool,
    unsqueeze_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    q = norm.plain(q, q_weight, eps, offset, cast_after)
    k = norm.plain(k, k_weight, eps, offset, cast_after)
    return rotation.plain(q, k, cos, sin, unsqueeze_dim)


class _QkNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*arguments[:6])
        ctx.options = arguments[6:]
        results: tuple[torch.Tensor, torch.Tensor] = _forward(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if wants_graph():
            found = plain_gradients(
                lambda *leaves: _plain(*leaves, *saved[4:], *ctx.options), saved[:4], (grad_q, grad_k)
            )
        else:
            found = _backward(grad_q, grad_k, *saved, *ctx.options, need[2] or need[3])
        return *(g if wanted else None for g, wanted in zip(found, need, strict=True)), *[None] * 6
