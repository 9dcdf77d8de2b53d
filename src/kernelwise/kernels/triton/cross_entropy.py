"""Cross-entropy of logits and labels, forward and backward, without logits in float32 and without waiting for the GPU.

Forward reads the logits once and keeps two numbers for each row, the logarithm of its sum of exponentials; backward reads
them again and writes the gradient. Where the caller allows the logits to be consumed, forward replaces them by their
gradient while the second-level cache still has the row, and backward is a multiplication that a factor of one skips.
"""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._launch import NAMESPACE, Launcher, Launchers, check, fresh, needs_grad, num_processors, power_of_2, watched
from ._loss_kernels import gradient_kernel, multiply_kernel, reduce_kernel, rows_kernel

Reduction = Literal["mean", "sum", "none"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")

# Elements that a program reads at a time, into how many rows it folds them, and elements of one thread; measured on sm_90.
_FORWARD = (16384, 4, 32)
_CONSUMING = (32768, 4, 32)
_UNALIGNED = (4096, 2, 16)  # the first and the last block are read element by element, so they are small
_GRADIENT = (4096, 1, 32)
_GRADIENT_UNALIGNED = (1024, 1, 8)
_REDUCE_BLOCK = 4096
_MULTIPLY_BLOCK = 4096


class Options(NamedTuple):
    """What is computed of each row: the label that is not counted, label smoothing, softcap (0: none), z-loss."""

    ignore_index: int
    smoothing: float
    softcap: float
    z_loss: float


_rows_launchers = Launchers()
_gradient_launchers = Launchers()
_reduce_launchers = Launchers()
_multiply_launchers = Launchers()


def check_options(options: Options, reduction: str, num_items: Any) -> None:
    """Raise ValueError for options that make no sense."""
    check(reduction in REDUCTIONS, lambda: f"reduction is one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    check(
        num_items is None or reduction != "none",
        lambda: "num_items divides a sum; with reduction='none' there is none, divide the losses instead",
    )
    check(0.0 <= options.smoothing <= 1.0, lambda: f"label_smoothing is between 0 and 1, not {options.smoothing}")
    check(options.softcap >= 0.0, lambda: f"softcap is a positive number or None, not {options.softcap}")
    check(options.z_loss >= 0.0, lambda: f"z_loss is not negative, but {options.z_loss} is")


def check_labels(labels: Tensor, num_rows: Any, device: torch.device) -> None:
    """Raise ValueError for labels that do not fit."""
    check(labels.dtype == torch.int64, lambda: f"labels are int64, not {labels.dtype}")
    check(labels.device == device, lambda: f"logits are on {device}, labels on {labels.device}")
    check(
        labels.dim() == 1 and labels.shape[0] == num_rows,
        lambda: f"labels have shape ({num_rows},), one for each row, not {tuple(labels.shape)}",
    )


def run_rows(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor | None,
    losses: Tensor,
    lse: Tensor | None,
    options: Options,
    traced: Any = None,
) -> None:
    """Write the losses of the rows of `logits` [N, V] with unit last stride.

    With `scale`, [1] or [N], the logits are replaced by their gradient times it; else `lse` [N, 2] is written, the
    logarithm of each row's sum of exponentials in two parts.
    """
    num_rows, width = logits.shape[0], int(logits.shape[1])
    stride = int(logits.stride(0))
    unit, align = _alignment(logits)
    by_rows = scale is not None and num_rows != 1 and scale.shape[0] == num_rows
    key = (logits.get_device(), logits.dtype, width, unit, align, scale is None, by_rows, options)
    launcher = _rows_launchers.get(key)
    if launcher is None:
        block, subrows, warps = _cut(_UNALIGNED if align > 1 else _FORWARD if scale is None else _CONSUMING, width)
        launcher = _rows_launchers[key] = Launcher(
            rows_kernel,
            1,
            WIDTH=width,
            SUBROWS=subrows,
            COLUMNS=block // subrows,
            UNIT=unit,
            ALIGN=align,
            IGNORE=options.ignore_index,
            SMOOTHING=options.smoothing,
            SOFTCAP=options.softcap,
            Z_LOSS=options.z_loss,
            GRADIENT=scale is not None,
            SCALE_ROWS=by_rows,
            num_warps=warps,
        )
    tensors = (logits, labels, logits if scale is None else scale, losses, losses if lse is None else lse)
    launcher(num_rows, 1, tensors, (stride // unit,), traced)


def _cut(config: tuple[int, int, int], width: int) -> tuple[int, int, int]:
    """Elements of a block, its rows, and warps; less than `config` says where a row is shorter than a block."""
    block, subrows, elements = config
    block = max(64, min(block, power_of_2(width)))
    return block, subrows if block >= 1024 else 1, max(1, min(32, block // (32 * elements)))


def _alignment(logits: Tensor) -> tuple[int, int]:
    """UNIT and ALIGN of the kernels for these rows."""
    width, stride = int(logits.shape[1]), int(logits.stride(0))
    if stride % 16 == 0:
        return 16, 1
    return 1, (16 // logits.element_size() if stride == width else 1)


def reduce_losses(
    losses: Tensor | None, labels: Tensor, items: Tensor | None, ignore_index: int, traced: Any = None
) -> tuple[Tensor, Tensor]:
    """The sum of `losses` (if there are any) over `items`, and one over that; None stands for the counted rows."""
    loss, scale = fresh(labels, (), torch.float32), fresh(labels, (1,), torch.float32)
    count, summing = items is None, losses is not None
    key = (labels.get_device(), ignore_index, count, summing)
    launcher = _reduce_launchers.get(key)
    if launcher is None:
        launcher = _reduce_launchers[key] = Launcher(
            reduce_kernel, 1, IGNORE=ignore_index, BLOCK=_REDUCE_BLOCK, COUNT=count, SUM=summing, num_warps=8
        )
    tensors = (labels if losses is None else losses, labels, labels if items is None else items, loss, scale)
    launcher(1, 1, tensors, (labels.shape[0],), traced)
    return loss, scale


def multiply(x: Tensor, factor: Tensor) -> None:
    """Multiply the dense tensor `x` by `factor`, one float32 on its device, in place; a factor of one costs nothing."""
    size = x.numel()
    if size == 0:
        return
    unit = 1 if size % 16 else 16
    key = (x.get_device(), x.dtype, unit)
    launcher = _multiply_launchers.get(key)
    if launcher is None:
        launcher = _multiply_launchers[key] = Launcher(
            multiply_kernel, _MULTIPLY_BLOCK, UNIT=unit, BLOCK=_MULTIPLY_BLOCK, num_warps=8
        )
    grid = min(-(-size // launcher.size), 8 * num_processors(key[0]))
    launcher(grid, 1, (factor, x), (size // unit,))


def items_of(num_items: float | Tensor | None, reduction: str, like: Tensor) -> Tensor | None:
    """What the sum of losses is divided by, float32 [1] on the device of `like`; None where rows are to be counted."""
    if isinstance(num_items, Tensor):
        return num_items.detach().to(like.device, torch.float32).reshape(1)
    if num_items is not None:
        return torch.full((1,), float(num_items), device=like.device)
    return None if reduction == "mean" else torch.ones(1, device=like.device)


def plain_losses(logits: Tensor, labels: Tensor, options: Options) -> Tensor:
    """The loss of each row in plain PyTorch, float32."""
    x = logits.float()
    if options.softcap:
        x = options.softcap * torch.tanh(x / options.softcap)
    lse = x.logsumexp(-1)
    counted = labels != options.ignore_index
    losses = lse - x.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    if options.smoothing:
        losses = (1 - options.smoothing) * losses + options.smoothing * (lse - x.mean(-1))
    if options.z_loss:
        losses = losses + options.z_loss * lse.square()
    return losses.where(counted, 0.0)


def plain(logits: Tensor, labels: Tensor, items: Tensor | None, options: Options, reduction: str) -> Tensor:
    """Cross-entropy in plain PyTorch; `items` as from `items_of`."""
    losses = plain_losses(logits, labels, options)
    if reduction == "none":
        return losses
    return losses.sum() / ((labels != options.ignore_index).sum() if items is None else items[0])


def _forward(
    logits: Tensor, labels: Tensor, items: Tensor | None, options: Options, reduction: str, traced: Any = (None, None)
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the logarithm of each row's sum of exponentials, and what gradients are multiplied by."""
    losses = fresh(logits, (logits.shape[0],), torch.float32)
    lse = fresh(logits, (logits.shape[0], 2), torch.float32)
    run_rows(logits, labels, None, losses, lse, options, traced[0])
    if reduction == "none":
        return losses, lse, torch.ones(1, device=logits.device)
    loss, scale = reduce_losses(losses, labels, items, options.ignore_index, traced[1])
    return loss, lse, scale


def _backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, options: Options, traced: Any = None
) -> Tensor:
    num_rows, width = logits.shape[0], int(logits.shape[1])
    gradient = fresh(logits, (num_rows, width))
    unit, align = _alignment(logits)
    by_rows = dloss.dim() == 1
    if by_rows and not dloss.is_contiguous():
        dloss = dloss.contiguous()
    key = (logits.get_device(), logits.dtype, width, unit, align, by_rows, options)
    launcher = _gradient_launchers.get(key)
    if launcher is None:
        block, _, warps = _cut(_GRADIENT_UNALIGNED if align > 1 else _GRADIENT, width)
        launcher = _gradient_launchers[key] = Launcher(
            gradient_kernel,
            -(-(width + align - 1) // block),
            WIDTH=width,
            BLOCK=block,
            BLOCKS=-(-(width + align - 1) // block),
            UNIT=unit,
            ALIGN=align,
            IGNORE=options.ignore_index,
            SMOOTHING=options.smoothing,
            SOFTCAP=options.softcap,
            Z_LOSS=options.z_loss,
            UPSTREAM_ROWS=by_rows,
            num_warps=warps,
        )
    tensors = (logits, labels, lse, scale, dloss, gradient)
    launcher(num_rows * launcher.size, 1, tensors, (int(logits.stride(0)) // unit,), traced)
    return gradient


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, items: Tensor | None, options: Options, reduction: str
    ) -> Tensor:
        loss, lse, scale = _forward(logits, labels, items, options, reduction)
        ctx.save_for_backward(logits, labels, lse, scale)
        ctx.options, ctx.reduction = options, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            loss = plain(logits, labels, 1 / scale, ctx.options, ctx.reduction)
            return *torch.autograd.grad(loss, logits, dloss, create_graph=True), None, None, None, None
        return _backward(dloss, logits, labels, lse, scale, ctx.options), None, None, None, None


class _Consuming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, items: Tensor | None, options: Options) -> Tensor:
        _, scale = reduce_losses(None, labels, items, options.ignore_index)
        losses = fresh(logits, (logits.shape[0],), torch.float32)
        run_rows(logits, labels, scale, losses, None, options)
        torch.autograd.graph.increment_version(logits)  # whoever has saved them learns that they are gone
        ctx.gradient = logits.detach()
        return reduce_losses(losses, labels, items, options.ignore_index)[0]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the logits were consumed: no second backward pass; call with consume_logits=False")
        multiply(gradient, dloss)
        return gradient, None, None, None


@torch.library.triton_op(f"{NAMESPACE}::cross_entropy", mutates_args={})
def _operation(
    logits: Tensor,
    labels: Tensor,
    items: Tensor | None,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(int(ignore_index), float(smoothing), float(softcap), float(z_loss))
    kernels = (torch.library.wrap_triton(rows_kernel), torch.library.wrap_triton(reduce_kernel))
    return _forward(logits, labels, items, options, reduction, kernels)


@torch.library.triton_op(f"{NAMESPACE}::cross_entropy_backward", mutates_args={})
def _backward_operation(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    options = Options(int(ignore_index), float(smoothing), float(softcap), float(z_loss))
    return _backward(dloss, logits, labels, lse, scale, options, torch.library.wrap_triton(gradient_kernel))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    ctx.options = inputs[3:7]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _operation_backward(ctx: Any, dloss: Tensor | None, _: Any, __: Any) -> tuple[Tensor | None, ...]:
    gradient = None if dloss is None else _backward_operation(dloss, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    consume_logits: bool = False,
) -> Tensor:
    """Cross-entropy as `F.cross_entropy(logits.float(), labels, ...)` has it, with what language models add to it.

    `logits` [N, V] are float32, bfloat16 or float16; `labels` [N] are int64. Rows labelled `ignore_index` count nothing,
    and what they hold is not read; any other label outside of the vocabulary makes the loss NaN. With `softcap` c,
    logits are c * tanh(logits / c). With `z_loss` z, every counted row adds z * logsumexp(row)^2. The result is float32:
    the mean over counted rows (NaN if there is none), their sum, or [N] losses. With `num_items`, a number or a tensor
    with one element, the sum is divided by that, whether "mean" or "sum" is asked for.

    `consume_logits=True` lets the call overwrite the logits, which saves the memory of the gradient and a third of the
    time; there is one backward pass then and no second derivative. It is a permission: the logits are preserved all the
    same where they need no gradient, in float16 (whose gradients need the scale that backward brings), with
    reduction="none", where they are not contiguous, and under torch.compile. Raises ValueError for anything else.
    """
    options = Options(int(ignore_index), float(label_smoothing), float(softcap or 0.0), float(z_loss))
    check_options(options, reduction, num_items)
    check(logits.dim() == 2, lambda: f"logits have shape [rows, vocabulary], not {tuple(logits.shape)}")
    check(logits.dtype in DTYPES, lambda: f"cross_entropy takes float32, bfloat16 or float16, not {logits.dtype}")
    check_labels(labels, logits.shape[0], logits.device)
    items = items_of(num_items, reduction, logits)
    num_rows: Any = logits.shape[0]
    if isinstance(num_rows, int) and (num_rows == 0 or logits.shape[1] == 0):
        return plain(logits, labels, items, options, reduction)
    labels = labels.contiguous()
    loss: Tensor
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if watched(logits, labels):
        loss = _operation(logits, labels, items, *options, reduction)[0]
    elif not needs_grad(logits):
        loss = _forward(logits, labels, items, options, reduction)[0]
    elif consume_logits and reduction != "none" and logits.dtype is not torch.float16 and logits.is_contiguous():
        loss = _Consuming.apply(logits, labels, items, options)
    else:
        loss = _Function.apply(logits, labels, items, options, reduction)
    return loss
