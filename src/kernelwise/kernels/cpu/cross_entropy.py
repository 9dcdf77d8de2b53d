"""Cross-entropy of logits, in C++, forward and backward: no float32 copy of the logits, no stored probabilities."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .._autograd import plain_gradients, wants_graph
from ._library import load

_ops = load()
_forward = _ops.cross_entropy.default
_backward = _ops.cross_entropy_backward.default
_backward_in_place = _ops.cross_entropy_backward_.default

# With gradients, fewer numbers than this go to plain PyTorch: autograd in Python costs more than the kernel gains.
_PLAIN_BELOW = 100_000

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: float | torch.Tensor | None = None,
    consume_logits: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy(logits.float(), labels)` with class indices, in float32.

    `logits` is [N, V] in float32, bfloat16 or float16, rows any distance apart; `labels` [N] int64. `softcap` c replaces
    the logits by c tanh(logits / c); `z_loss` z adds z logsumexp(logits)^2 to the loss of every row that counts. With
    `num_items` the sum is divided by that number in place of the number of rows that count. The result is a scalar, or [N]
    with reduction "none". A mean over no row is NaN, as in PyTorch.

    With `consume_logits` backward writes the gradient over the logits, which must not be used afterwards; a second
    backward is then refused. Raises RuntimeError for other shapes and dtypes and for labels out of bounds, ValueError for
    num_items with reduction "none".

    >>> logits, labels = torch.randn(4, 10), torch.tensor([1, 2, -100, 9])
    >>> torch.allclose(cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    True
    """
    options = ignore_index, label_smoothing, softcap or 0.0, z_loss
    losses: torch.Tensor
    if torch.is_grad_enabled() and logits.requires_grad and logits.numel() < _PLAIN_BELOW:
        losses = plain(logits, labels, *options)
    elif torch.is_grad_enabled() and logits.requires_grad:
        losses = _CrossEntropy.apply(logits, labels, options, consume_logits)  # type: ignore[no-untyped-call]
    else:
        losses = _forward(logits, labels, *options)[0]
    if reduction == "none":
        if num_items is not None:
            raise ValueError('num_items divides a sum: it needs reduction "mean" or "sum", not "none"')
        return losses
    scale = scale_of(labels, ignore_index, reduction, num_items)
    return losses.sum() if scale is None else losses.sum() / scale


def scale_of(
    labels: torch.Tensor, ignore_index: int, reduction: Reduction, num_items: float | torch.Tensor | None
) -> float | torch.Tensor | None:
    """What a sum of losses is to be divided by; None: by nothing."""
    if num_items is not None:
        return num_items
    return (labels != ignore_index).sum() if reduction == "mean" else None


def plain(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, smoothing: float, softcap: float, z_loss: float
) -> torch.Tensor:
    """The loss of every row in plain PyTorch."""
    wide = logits.float()
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    losses = torch.nn.functional.cross_entropy(
        wide, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none"
    )
    if z_loss:
        losses = losses + z_loss * wide.logsumexp(-1).square() * (labels != ignore_index)
    return losses


def _has_rows_of_its_own(logits: torch.Tensor) -> bool:
    num, width = logits.shape
    return logits.stride(1) == 1 and (num == 1 or logits.stride(0) >= width)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        options: tuple[int, float, float, float],
        consume_logits: bool,
    ) -> torch.Tensor:
        losses, statistics = _forward(logits, labels, *options)
        ctx.save_for_backward(logits, labels, statistics)
        ctx.options, ctx.consume_logits = options, consume_logits
        result: torch.Tensor = losses
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, statistics = ctx.saved_tensors
        if wants_graph():
            return (
                *plain_gradients(lambda logits: plain(logits, labels, *ctx.options), (logits,), (grad,)),
                None,
                None,
                None,
            )
        if ctx.consume_logits and not torch.compiler.is_compiling() and _has_rows_of_its_own(logits):
            _backward_in_place(grad, logits, labels, statistics, *ctx.options)
            torch.autograd.graph.increment_version(logits)
            return logits.detach(), None, None, None
        return _backward(grad, logits, labels, statistics, *ctx.options), None, None, None
