"""Shapes, dtypes and strides of the operators' results, without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
MaybeTensor = Tensor | None


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _gradient(parameter: MaybeTensor, grad: Tensor, wanted: bool) -> Tensor:
    """That of a parameter, or an empty tensor in its place."""
    if parameter is None or not wanted:
        return grad.new_empty(0, dtype=torch.float32)
    return _like(parameter)


def _rms_norm(x: Tensor, weight: MaybeTensor, eps: float, offset: float = 0.0, cast_after: bool = False) -> Tensor:
    return _like(x, x.dtype if weight is None or cast_after else weight.dtype)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: MaybeTensor, eps: float, offset: float = 0.0, cast_after: bool = False
) -> tuple[Tensor, Tensor]:
    return _rms_norm(x, weight, eps, offset, cast_after), _like(x)


def _rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    eps: float,
    offset: float,
    cast_after: bool,
    weight_grad: bool,
    grad_sum: MaybeTensor = None,
) -> tuple[Tensor, Tensor]:
    return _like(x), _gradient(weight, grad, weight_grad)


def _layer_norm(x: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, offset: float = 0.0) -> Tensor:
    return _like(x)


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    eps: float,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
    grad_sum: MaybeTensor = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _gradient(weight, grad, weight_grad), _gradient(bias, grad, bias_grad)


def _activation(x: Tensor, activation: int) -> Tensor:
    return _like(x)


def _activation_backward(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    return _like(x)


def _gated_activation(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return _like(gate)


def _gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(gate)


def _rotated(x: Tensor, unsqueeze_dim: int, dtype: torch.dtype) -> Tensor:
    """Results lie in memory as [batch, positions, heads, width]."""
    if unsqueeze_dim == 2:
        return x.new_empty(x.shape, dtype=dtype)
    batch, heads, positions, width = x.shape
    return x.new_empty((batch, positions, heads, width), dtype=dtype).transpose(1, 2)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    return _rotated(q, unsqueeze_dim, dtype), _rotated(k, unsqueeze_dim, dtype)


def _rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _rotated(grad_q, unsqueeze_dim, dtype), _rotated(grad_k, unsqueeze_dim, dtype)


def _qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: MaybeTensor,
    k_weight: MaybeTensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_after: bool = False,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    if q_weight is not None and not cast_after:
        dtype = torch.promote_types(dtype, q_weight.dtype)
    return _rotated(q, unsqueeze_dim, dtype), _rotated(k, unsqueeze_dim, dtype)


def _qk_norm_rotary_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: MaybeTensor,
    k_weight: MaybeTensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast_after: bool,
    unsqueeze_dim: int,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _rotated(q, unsqueeze_dim, q.dtype),
        _rotated(k, unsqueeze_dim, k.dtype),
        _gradient(q_weight, grad_q, weight_grads),
        _gradient(k_weight, grad_q, weight_grads),
    )


def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    num = logits.shape[0]
    return logits.new_empty(num, dtype=torch.float32), logits.new_empty((num, 2), dtype=torch.float32)


def _cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    return _like(logits)


def _cross_entropy_in_place(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> None:
    return None


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    labels: Tensor,
    grad: MaybeTensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    gradients = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    dh, dw, db = (_gradient(t, losses, wanted and grad is not None) for t, wanted in gradients)
    return losses, dh, dw, db


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: MaybeTensor = None, causal: bool = False
) -> Tensor:
    batch, heads, positions, _ = q.shape
    return q.new_empty((batch, positions, heads, v.shape[-1])).transpose(1, 2)


SHAPES: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "activation": _activation,
    "activation_backward": _activation_backward,
    "gated_activation": _gated_activation,
    "gated_activation_backward": _gated_activation_backward,
    "rotary": _rotary,
    "rotary_backward": _rotary_backward,
    "qk_norm_rotary": _qk_norm_rotary,
    "qk_norm_rotary_backward": _qk_norm_rotary_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "cross_entropy_backward_": _cross_entropy_in_place,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear": _linear,
    "linear_grad_x": _linear_grad_x,
    "linear_grad_weight": _linear_grad_weight,
    "attention": _attention,
}
