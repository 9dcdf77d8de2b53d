"""The last linear layer and its cross-entropy in one, in C++, forward and backward: the logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch

from .._autograd import plain_gradients, wants_graph
from . import cross_entropy as loss
from . import linear as product
from ._library import load

_op = load().linear_cross_entropy.default
_CHUNK_BYTES = 64 << 20
_FEW_ROWS = 16  # fewer have all their logits at once, from products that are faster for them


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: loss.Reduction = "mean",
    num_items: float | torch.Tensor | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)`, of which only some rows of logits exist at a time.

    `hidden` is [N, H], `weight` [V, H] and `bias` [V] or None, of one dtype (float32, bfloat16, float16); `labels` is [N]
    int64. The options and the result are those of `cross_entropy`. Logits are float32 and take at most `chunk_bytes`
    (64 MiB unless given, at least one row); rows whose label is ignored are left out of every product.

    Fewer than 16 rows have all their logits at once, in the dtype of hidden, unless `chunk_bytes` is given.

    Gradients are computed in forward, those alone that are needed, and scaled in backward (with reduction "none":
    computed in backward). Where the rows take more than one chunk, the gradient of a bfloat16 or float16 weight is summed
    in float32 memory of its shape, for that long. Raises as `cross_entropy` does.

    >>> hidden, weight, labels = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([1, 2, -100, 9])
    >>> whole = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    >>> torch.allclose(linear_cross_entropy(hidden, weight, labels), whole)
    True
    """
    if hidden.shape[0] < _FEW_ROWS and hidden.dim() == 2 and chunk_bytes is None:
        return loss.cross_entropy(
            product.linear(hidden, weight, bias),
            labels,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            reduction=reduction,
            num_items=num_items,
        )
    options = ignore_index, label_smoothing, softcap or 0.0, z_loss
    chunk_bytes = chunk_bytes or _CHUNK_BYTES
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if reduction == "none" and num_items is not None:
        raise ValueError('num_items divides a sum: it needs reduction "mean" or "sum", not "none"')
    if not needs:
        losses = _losses(hidden, weight, bias, labels, options, chunk_bytes)
        if reduction == "none":
            return losses
        scale = loss.scale_of(labels, ignore_index, reduction, num_items)
        return losses.sum() if scale is None else losses.sum() / scale
    if reduction == "none":
        result: torch.Tensor = _Losses.apply(hidden, weight, bias, labels, options, chunk_bytes)  # type: ignore[no-untyped-call]
        return result
    scale = loss.scale_of(labels, ignore_index, reduction, num_items)
    divisor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32)
    result = _Loss.apply(hidden, weight, bias, labels, divisor.detach(), options, chunk_bytes)  # type: ignore[no-untyped-call]
    return result


Options = tuple[int, float, float, float]


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    options: Options,
    chunk_bytes: int,
) -> torch.Tensor:
    losses: torch.Tensor = _op(hidden, weight, bias, labels, None, *options, chunk_bytes, False, False, False)[0]
    return losses


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, options: Options
) -> torch.Tensor:
    return loss.plain(torch.nn.functional.linear(hidden, weight, bias), labels, *options)


class _Losses(torch.autograd.Function):
    """The loss of every row. What each row's gradient is multiplied with is known in backward alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: Options,
        chunk_bytes: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.chunk_bytes = options, chunk_bytes
        return _losses(hidden, weight, bias, labels, options, chunk_bytes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *leaves, labels = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if wants_graph():
            found = plain_gradients(lambda h, w, b: _plain(h, w, b, labels, ctx.options), leaves, (grad,))
        else:
            found = _op(*leaves, labels, grad, *ctx.options, ctx.chunk_bytes, *need)[1:]
        return *(g if wanted else None for g, wanted in zip(found, need, strict=True)), None, None, None


class _Loss(torch.autograd.Function):
    """The sum of the losses over a divisor."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        divisor: torch.Tensor,
        options: Options,
        chunk_bytes: int,
    ) -> torch.Tensor:
        grad = divisor.reciprocal().expand(labels.shape[0])
        losses, *found = _op(hidden, weight, bias, labels, grad, *options, chunk_bytes, *ctx.needs_input_grad[:3])
        ctx.options, ctx.chunk_bytes = options, chunk_bytes
        if torch.compiler.is_compiling():  # tracing follows saved tensors alone
            ctx.save_for_backward(hidden, weight, bias, labels, divisor, *found)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, divisor)
            ctx.found = found
        total: torch.Tensor = losses.sum() / divisor
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, divisor, *found = ctx.saved_tensors
        leaves, need = (hidden, weight, bias), ctx.needs_input_grad[:3]
        if wants_graph():
            scaled = plain_gradients(
                lambda h, w, b: _plain(h, w, b, labels, ctx.options).sum() / divisor, leaves, (grad,)
            )
        else:
            if not torch.compiler.is_compiling():
                # Given away, as large as they are, and scaled in place; a second backward computes them again.
                found, ctx.found = ctx.found, None
                if found is None:
                    rows = divisor.reciprocal().expand(labels.shape[0])
                    found = _op(*leaves, labels, rows, *ctx.options, ctx.chunk_bytes, *need)[1:]
                if grad != 1:
                    found = [g.mul_(grad) for g in found]
            else:
                found = [g * grad for g in found]
            scaled = found
        return *(g if wanted else None for g, wanted in zip(scaled, need, strict=True)), *[None] * 4
