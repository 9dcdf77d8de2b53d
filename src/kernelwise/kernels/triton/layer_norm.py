"""Layer norm over the last dimension, alone and with a residual added first, forward and backward.

y = (x - mean) / sqrt(var + eps) * (offset + weight) + bias. The kernels, and when which form of the backward pass is
taken, are as for RMS norm (`rms_norm`), with two moments for each row and two sums over rows.
"""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .._autograd import plain_gradients
from .._layout import inverse, leading_order
from ._launch import (
    NAMESPACE,
    Launcher,
    Launchers,
    check,
    fresh,
    needs_grad,
    num_processors,
    power_of_2,
    rows_of,
    unit_of,
    watched,
)
from ._layer_norm_kernels import backward_few_rows_kernel, backward_kernel, forward_kernel
from ._norm_configs import backward_config, forward_config, size_class, stages
from ._norm_kernels import sum_partials_kernel

MAX_WIDTH = 32768  # a row lives in the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Backward with programs of two kinds: as long as the rows and their gradients stay in the second-level cache.
_FEW_ROWS = 1024
_FEW_WIDTH = 8192
_FEW_BYTES = 32 << 20

# Up to so many elements PyTorch's own operator, which costs the host less; with gradients it saves the more.
_SMALL = 1 << 17
_SMALL_RECORDED = 1 << 19

Saved = tuple[Tensor, Tensor, Tensor]

_forward_launchers = Launchers()
_backward_launchers = Launchers()
_few_rows_launchers = Launchers()
_sum_launchers = Launchers()


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    check(x.dtype in DTYPES, lambda: f"layer_norm takes float32, bfloat16 or float16, not {x.dtype}")
    check(x.shape[-1] <= MAX_WIDTH, lambda: f"layer_norm takes rows of at most {MAX_WIDTH} elements, not {x.shape[-1]}")
    if residual is not None:
        check(
            residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device,
            lambda: (
                f"x is {tuple(x.shape)}, {x.dtype}, on {x.device}; residual {tuple(residual.shape)}, "
                f"{residual.dtype}, on {residual.device}; they must be alike"
            ),
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check(tensor.device == x.device, lambda n=name, t=tensor: f"x is on {x.device}, the {n} on {t.device}")
            check(
                tensor.dtype in (x.dtype, torch.float32),
                lambda n=name, t=tensor: (
                    f"the {n} of layer_norm has the dtype of x ({x.dtype}) or float32, not {t.dtype}"
                ),
            )
            check(
                tensor.shape == x.shape[-1:],
                lambda n=name, t=tensor: f"the {n} of layer_norm has shape {tuple(x.shape[-1:])}, not {tuple(t.shape)}",
            )


def _fits(x: Tensor, parameter: Tensor | None) -> bool:
    return parameter is None or (parameter.numel() == x.shape[-1] and parameter.get_device() == x.get_device())


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    save: bool,
    traced: Any = None,
) -> Saved:
    """y; the sum that was normalised (y again without a residual); and [N, 2] mean and 1 / sqrt(var + eps) if `save`."""
    width = int(x.shape[-1])
    device = x.get_device()
    if not (_fits(x, weight) and _fits(x, bias)) or (residual is not None and residual.shape != x.shape):
        _check(x, residual, weight, bias)
    y = torch.empty_like(x) if x.is_contiguous() else fresh(x, x.shape)
    total = y if residual is None else fresh(x, x.shape)
    num_rows: Any = y.numel() // width if width else 0
    moments = fresh(x, (num_rows, 2), torch.float32) if save else y
    if isinstance(num_rows, int) and num_rows == 0:
        return y, total, moments
    x = rows_of(x)
    other = x if residual is None else rows_of(residual)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    strides = (x.stride(0), other.stride(0))
    unit = unit_of(*strides)
    many = not isinstance(num_rows, int) or num_rows > 2 * num_processors(device)
    dtypes = (x.dtype, other.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    key = (device, other.get_device(), width, many, unit, dtypes, residual is None, eps, offset, save)
    launcher = _forward_launchers.get(key)
    if launcher is None:
        _check(x, None if residual is None else other, weight, bias)
        config = forward_config(device, width, many, "layer_norm" if residual is None else "add_layer_norm")
        launcher = _forward_launchers[key] = Launcher(
            forward_kernel,
            config.rows,
            EPS=float(eps),
            OFFSET=float(offset),
            WIDTH=width,
            BLOCK=power_of_2(width),
            ROWS=config.rows,
            UNIT=unit,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            SAVE=save,
            num_warps=config.warps,
        )
    tensors = (x, other, x if weight is None else weight, x if bias is None else bias, y, total, moments)
    numbers = (num_rows, strides[0] // unit, strides[1] // unit)
    launcher((num_rows + launcher.size - 1) // launcher.size, 1, tensors, numbers, traced)
    return y, total, moments


def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    offset: float,
    summing: bool,
    traced: tuple[Any, Any, Any] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x (with `dsum` added) and, if `summing`, of weight and bias."""
    width = int(x.shape[-1])
    dx = fresh(x, x.shape)
    num_rows = moments.shape[0]
    parameters = [p for p in (weight, bias) if p is not None]
    summing = summing and bool(parameters)
    has_bias = bias is not None
    dtype = parameters[0].dtype if parameters and parameters[0].dtype is parameters[-1].dtype else torch.float32
    sums = fresh(x, ((2 if has_bias else 1) * width,), dtype) if summing else None
    if isinstance(num_rows, int) and num_rows == 0:
        return dx, *_parts(None if sums is None else sums.zero_(), weight, bias, width)
    dy, x = rows_of(dy), rows_of(x)
    if dsum is not None and not dsum.is_contiguous():
        dsum = dsum.contiguous()
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    device = x.get_device()
    strides = (dy.stride(0), x.stride(0))
    unit = unit_of(*strides)
    numbers = (num_rows, strides[0] // unit, strides[1] // unit)
    size = size_class(num_rows)
    weight_dtype = None if weight is None else weight.dtype
    dsum_dtype = None if dsum is None else dsum.dtype
    key = (device, width, unit, size, dy.dtype, x.dtype, weight_dtype, has_bias, offset, summing, dtype, dsum_dtype)
    block = power_of_2(width)
    if sums is not None and weight is not None and _few(num_rows, x):
        launcher = _few_rows_launchers.get(key)
        if launcher is None:
            rows = max(1, 2048 // block)
            launcher = _few_rows_launchers[key] = Launcher(
                backward_few_rows_kernel,
                rows,
                OFFSET=float(offset),
                WIDTH=width,
                BLOCK=block,
                ROWS=rows,
                UNIT=unit,
                COLUMNS=16 if width <= 2048 else 32,  # enough programs; 64-byte segments where there are enough anyway
                CHUNK=256 if width <= 2048 else 128,
                HAS_BIAS=has_bias,
                HAS_DSUM=dsum is not None,
                num_warps=8 if block <= 8192 else 16,
            )
        grid = triton.cdiv(width, launcher.constants["COLUMNS"]) + triton.cdiv(num_rows, launcher.size)
        launcher(grid, 1, (dy, x, weight, moments, x if dsum is None else dsum, dx, sums), numbers, traced[0])
        return dx, *_parts(sums, weight, bias, width)

    config = backward_config(device, width, size, "layer_norm")
    launcher = _backward_launchers.get(key)
    if launcher is None:
        sizes = dy.element_size() + x.element_size() + (0 if dsum is None else dsum.element_size())
        launcher = _backward_launchers[key] = Launcher(
            backward_kernel,
            config.rows,
            OFFSET=float(offset),
            WIDTH=width,
            BLOCK=block,
            ROWS=config.rows,
            UNIT=unit,
            STAGES=stages(config.stages, device, config.rows * block * sizes),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=has_bias,
            HAS_DSUM=dsum is not None,
            SUMMING=summing,
            num_warps=config.warps,
        )
    grid = config.programs * num_processors(device)
    if isinstance(num_rows, int):
        grid = min(grid, triton.cdiv(num_rows, config.rows))
    partials = moments if sums is None else fresh(x, (grid, sums.shape[0]), torch.float32)
    tensors = (dy, x, x if weight is None else weight, moments, x if dsum is None else dsum, dx, partials)
    launcher(grid, 1, tensors, numbers, traced[1])
    if sums is not None:
        total = int(sums.shape[0])
        adding = _sum_launchers.get((device, total, dtype, config.columns))
        if adding is None:
            adding = _sum_launchers[device, total, dtype, config.columns] = Launcher(
                sum_partials_kernel, config.columns, WIDTH=total, COLUMNS=config.columns, CHUNK=256, num_warps=8
            )
        adding(triton.cdiv(total, config.columns), 1, (partials, sums), (grid,), traced[2])
    return dx, *_parts(sums, weight, bias, width)


def _few(num_rows: Any, x: Tensor) -> bool:
    if not isinstance(num_rows, int):  # symbolic while compiling: no guard on the number of rows
        return False
    width = x.shape[-1]
    return num_rows <= _FEW_ROWS and width <= _FEW_WIDTH and 2 * num_rows * width * x.element_size() <= _FEW_BYTES


def _parts(
    sums: Tensor | None, weight: Tensor | None, bias: Tensor | None, width: int
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias, which lie one behind the other."""
    if sums is None:
        return None, None
    dweight = None if weight is None else sums[:width].to(weight.dtype)
    return dweight, None if bias is None else sums[width:].to(bias.dtype)


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    wide = None if weight is None else offset + weight.float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], wide, shift, eps).to(x.dtype)


def _is_small(x: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float, recorded: bool) -> bool:
    """Whether PyTorch's own operator is the better choice: it takes these inputs, and the host is what takes the time.

    In a CUDA graph the host does not count.
    """
    return (
        x.numel() <= (_SMALL_RECORDED if recorded else _SMALL)
        and x.is_cuda
        and offset == 0.0
        and (weight is None or weight.dtype is x.dtype)
        and (bias is None or bias.dtype is x.dtype)
        and _fits(x, weight)
        and _fits(x, bias)
        and not torch.cuda.is_current_stream_capturing()
    )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total, moments = _forward(x, residual, weight, bias, eps, offset, True)
        ctx.save_for_backward(x if residual is None else total, weight, bias, moments)
        ctx.eps, ctx.offset = eps, offset
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        if dy is None:
            return dsum, dsum, None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            plain = partial(_plain, eps=ctx.eps, offset=ctx.offset)
            dx, dweight, dbias = plain_gradients(plain, (x, weight, bias), (dy,))
            dx = dx if dsum is None or dx is None else dx + dsum
        else:
            summing = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            dx, dweight, dbias = _backward(dy, dsum, x, weight, bias, moments, ctx.offset, summing)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, dbias, None, None


@torch.library.triton_op(f"{NAMESPACE}::layer_norm", mutates_args={})
def _operation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    kernel = torch.library.wrap_triton(forward_kernel)
    y, _, moments = _forward(x, None, weight, bias, float(eps), float(offset), True, kernel)
    return y, moments


@torch.library.triton_op(f"{NAMESPACE}::add_layer_norm", mutates_args={})
def _add_operation(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.library.wrap_triton(forward_kernel)
    return _forward(x, residual, weight, bias, float(eps), float(offset), True, kernel)


@torch.library.triton_op(f"{NAMESPACE}::layer_norm_backward", mutates_args={})
def _backward_operation(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    offset: float,
    summing: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = (
        torch.library.wrap_triton(backward_few_rows_kernel),
        torch.library.wrap_triton(backward_kernel),
        torch.library.wrap_triton(sum_partials_kernel),
    )
    dx, dweight, dbias = _backward(dy, dsum, x, weight, bias, moments, float(offset), summing, kernels)
    nothing = x.new_empty(0)  # an operation gives tensors, each with memory of its own
    return dx, nothing if dweight is None else dweight.clone(), x.new_empty(0) if dbias is None else dbias.clone()


def _gradients(
    ctx: Any, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    summing = any(ctx.needs_input_grad) and (weight is not None or bias is not None)
    summing = summing and any(ctx.needs_input_grad[-4:-2])
    dx, dweight, dbias = _backward_operation(dy, dsum, x, weight, bias, moments, ctx.offset, summing)
    return dx, dweight if summing and weight is not None else None, dbias if summing and bias is not None else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _operation_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    return *_gradients(ctx, dy, None, *ctx.saved_tensors), None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, bias, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, bias, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _add_operation_backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dsum, dsum, None, None, None, None
    dx, dweight, dbias = _gradients(ctx, dy, dsum, *ctx.saved_tensors)
    return dx, dx, dweight, dbias, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)
_add_operation.register_autograd(_add_operation_backward, setup_context=_add_setup_context)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """Layer norm of the rows of `x` [..., H], computed in float32 and rounded once.

    (x - mean) / sqrt(var + eps) * (offset + weight) + bias. `weight` and `bias` are [H], of the dtype of x or float32,
    or None. x is float32, bfloat16 or float16 with H <= 32768 and any strides; the result has its dtype and lies in
    memory in its order. Few elements go to PyTorch's own operator, except under torch.compile and in a CUDA graph.
    Raises ValueError for anything else.
    """
    if not x.is_contiguous() and (order := leading_order(x)) is not None:
        return layer_norm(x.permute(order), weight, bias, eps, offset=offset).permute(inverse(order))
    if watched(x, weight, bias):
        y: Tensor = _operation(x, weight, bias, eps, offset)[0]
        return y
    recorded = needs_grad(x, weight, bias)
    if _is_small(x, weight, bias, offset, recorded):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if recorded:
        y = _Function.apply(x, None, weight, bias, eps, offset)
        return y
    return _forward(x, None, weight, bias, eps, offset, False)[0]
