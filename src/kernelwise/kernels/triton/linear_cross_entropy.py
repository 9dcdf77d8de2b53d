"""The head of a language model and its loss in one: cross-entropy of hidden @ weight.T without ever holding all logits.

Rows are taken in chunks whose logits fit a budget. Of each chunk the loss is computed, its logits are replaced by their
gradient, and the gradients of hidden states and weight are added up before the next chunk reuses the memory. That is
done in forward where the gradient is wanted and only a common factor of it is missing, which backward multiplies in
(a factor of one costs nothing). Where each row gets a gradient of its own, in float16 (whose gradients would underflow
without the scale that backward brings), and for a second backward pass, the chunks are gone through again in backward.
"""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import plain_gradients
from ._launch import NAMESPACE, check, needs_grad, watched
from .cross_entropy import (
    DTYPES,
    Options,
    Reduction,
    check_labels,
    check_options,
    items_of,
    multiply,
    plain,
    reduce_losses,
    run_rows,
)

CHUNK_BYTES = 512 << 20
_MOST_CHUNKS = 8  # of the default: each chunk rounds the gradient of the weight once more
_ROWS = 128  # a matrix product wants multiples of this

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check(
        hidden.dtype in DTYPES, lambda: f"linear_cross_entropy takes {', '.join(map(str, DTYPES))}, not {hidden.dtype}"
    )
    check(
        hidden.dim() == 2 and weight.dim() == 2 and weight.shape[1] == hidden.shape[1],
        lambda: f"hidden [N, H] and weight [V, H] have shapes {tuple(hidden.shape)} and {tuple(weight.shape)}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            same = tensor.dtype == hidden.dtype and tensor.device == hidden.device
            check(
                same,
                lambda n=name, t=tensor: f"hidden is {hidden.dtype} on {hidden.device}, {n} {t.dtype} on {t.device}",
            )
    check(
        bias is None or bias.shape == weight.shape[:1],
        lambda: f"bias has shape ({weight.shape[0]},), not {tuple(bias.shape) if bias is not None else ()}",
    )


def _rows_per_chunk(num_rows: int, row_bytes: int, chunk_bytes: int | None) -> int:
    """Rows of a chunk: as many as the budget holds, in chunks of about one size, multiples of 128 where it can be."""
    if chunk_bytes is None:
        chunk_bytes = max(CHUNK_BYTES, num_rows * row_bytes // _MOST_CHUNKS + _ROWS * row_bytes)
    most = max(1, chunk_bytes // row_bytes)
    if most >= num_rows:
        return num_rows
    most = most // _ROWS * _ROWS or most
    rows = -(-num_rows // -(-num_rows // most))
    return min(most, -(-rows // _ROWS) * _ROWS)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    options: Options,
    wanted: tuple[bool, bool, bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, Gradients]:
    """The loss of each row, not scaled; and the gradients of hidden, weight and bias that are wanted, for a loss that
    sums rows times `scale` ([1] or [N])."""
    (num_rows, width), vocabulary = hidden.shape, weight.shape[0]
    padded = -(-vocabulary // 64) * 64  # rows start where wide loads can
    rows = _rows_per_chunk(num_rows, padded * hidden.element_size(), chunk_bytes)
    losses = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    memory = torch.empty(rows, padded, dtype=hidden.dtype, device=hidden.device)
    lse = None if any(wanted) else torch.empty(num_rows, 2, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(num_rows, width, dtype=hidden.dtype, device=hidden.device) if wanted[0] else None
    dweight = torch.empty(vocabulary, width, dtype=weight.dtype, device=weight.device) if wanted[1] else None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=weight.device) if wanted[2] else None
    for start in range(0, num_rows, rows):
        part = slice(start, min(start + rows, num_rows))
        h = hidden[part]
        logits = memory[: h.shape[0], :vocabulary]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        if lse is not None:
            run_rows(logits, labels[part], None, losses[part], lse[part], options)
            continue
        assert scale is not None
        run_rows(logits, labels[part], scale if scale.shape[0] == 1 else scale[part], losses[part], None, options)
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])
        if dweight is not None and start == 0:
            torch.mm(logits.t(), h, out=dweight)
        elif dweight is not None:
            dweight.addmm_(logits.t(), h)
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return losses, (dhidden, dweight, None if dbias is None else dbias.to(weight.dtype))


def _at_once(hidden: Tensor, reduction: str) -> bool:
    """Whether forward can compute the gradients but for one factor."""
    return reduction != "none" and hidden.dtype is not torch.float16


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        items: Tensor | None,
        options: Options,
        reduction: str,
        chunk_bytes: int | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3] if _at_once(hidden, reduction) else (False, False, False)
        _, scale = reduce_losses(None, labels, items, options.ignore_index)
        losses, ctx.gradients = _chunks(hidden, weight, bias, labels, scale, options, wanted, chunk_bytes)
        ctx.save_for_backward(hidden, weight, bias, labels, scale)
        ctx.options, ctx.reduction, ctx.chunk_bytes, ctx.ready = options, reduction, chunk_bytes, any(wanted)
        return losses if reduction == "none" else reduce_losses(losses, labels, items, options.ignore_index)[0]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, scale = ctx.saved_tensors
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated

            def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return plain(F.linear(hidden, weight, bias), labels, 1 / scale, ctx.options, ctx.reduction)

            return *plain_gradients(loss, (hidden, weight, bias), (dloss,)), *nothing
        if ctx.ready:
            gradients, ctx.gradients, ctx.ready = ctx.gradients, None, False
            for gradient in gradients:
                if gradient is not None:
                    multiply(gradient, dloss)
            return *gradients, *nothing
        wanted = ctx.needs_input_grad[:3]
        _, gradients = _chunks(
            hidden, weight, bias, labels, (dloss * scale).reshape(-1), ctx.options, wanted, ctx.chunk_bytes
        )
        return *gradients, *nothing


def _packed(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An operation returns tensors: an empty one where a gradient is not wanted."""
    first, second, third = (like.new_empty(0) if g is None else g for g in gradients)
    return first, second, third


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", mutates_args=())
def _operation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    items: Tensor | None,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the scale, and the gradients that are wanted for a gradient of one."""
    options = Options(ignore_index, smoothing, softcap, z_loss)
    _, scale = reduce_losses(None, labels, items, options.ignore_index)
    wants = (wanted[0], wanted[1], wanted[2])
    losses, gradients = _chunks(hidden, weight, bias, labels, scale, options, wants, chunk_bytes or None)
    loss = losses if reduction == "none" else reduce_losses(losses, labels, items, options.ignore_index)[0]
    return loss, scale, *_packed(gradients, hidden)


def _shapes(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    gradients = (
        hidden.new_empty(hidden.shape) if wanted[0] else None,
        weight.new_empty(weight.shape) if wanted[1] else None,
        weight.new_empty(weight.shape[:1]) if wanted[2] else None,
    )
    return _packed(gradients, hidden)


@_operation.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    items: Tensor | None,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = hidden.shape[:1] if reduction == "none" else ()
    loss = hidden.new_empty(shape, dtype=torch.float32)
    return loss, hidden.new_empty((1,), dtype=torch.float32), *_shapes(hidden, weight, wanted)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_backward", mutates_args=())
def _backward_operation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(ignore_index, smoothing, softcap, z_loss)
    wants = (wanted[0], wanted[1], wanted[2])
    return _packed(_chunks(hidden, weight, bias, labels, scale, options, wants, chunk_bytes or None)[1], hidden)


@_backward_operation.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(hidden, weight, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, _, *options, _, chunk_bytes, wanted = inputs
    ctx.ready = any(wanted)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:])
    ctx.options, ctx.chunk_bytes = options, chunk_bytes
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _operation_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if dloss is None:
        return None, None, None, *nothing
    hidden, weight, bias, labels, scale, *gradients = ctx.saved_tensors
    wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    if ctx.ready:
        gradients = [(g * dloss).to(g.dtype) if w else None for g, w in zip(gradients, wanted, strict=True)]
        return *gradients, *nothing
    found = _backward_operation(
        hidden, weight, bias, labels, (dloss * scale).reshape(-1), *ctx.options, ctx.chunk_bytes, wanted
    )
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *nothing


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """`cross_entropy(F.linear(hidden, weight, bias), labels, ...)` without holding the logits.

    `hidden` [N, H], `weight` [V, H] and `bias` [V] are of one dtype (float32, bfloat16 or float16), or are made so by
    autocast; `labels` [N] are int64. The options are those of `cross_entropy`. Only gradients that are needed are
    computed: a frozen head costs two matrix products, not three. `chunk_bytes` bounds the logits that exist at one time
    (by default 512 MiB, or an eighth of all where that is more); the gradient of the weight is rounded once for each
    chunk. Raises ValueError for anything else.
    """
    options = Options(int(ignore_index), float(label_smoothing), float(softcap or 0.0), float(z_loss))
    check_options(options, reduction, num_items)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(hidden, weight, bias)
    check_labels(labels, hidden.shape[0], hidden.device)
    check(
        chunk_bytes is None or chunk_bytes > 0, lambda: f"chunk_bytes is a positive number of bytes, not {chunk_bytes}"
    )
    items = items_of(num_items, reduction, hidden)
    num_rows: Any = hidden.shape[0]
    if isinstance(num_rows, int) and (num_rows == 0 or weight.numel() == 0):
        return plain(F.linear(hidden, weight, bias), labels, items, options, reduction)
    labels = labels.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        if watched(hidden, weight, bias, labels):
            grad = torch.is_grad_enabled() and _at_once(hidden, reduction)
            wanted = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
            arguments = (*options, reduction, chunk_bytes or 0, wanted)
            loss: Tensor = _operation(hidden, weight, bias, labels, items, *arguments)[0]
            return loss
        if needs_grad(hidden, weight, bias):
            loss = _Function.apply(hidden, weight, bias, labels, items, options, reduction, chunk_bytes)
            return loss
        losses, _ = _chunks(hidden, weight, bias, labels, None, options, (False, False, False), chunk_bytes)
        if reduction == "none":
            return losses
        return reduce_losses(losses, labels, items, options.ignore_index)[0]
