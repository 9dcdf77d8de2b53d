"""RMS normalisation over the last dimension: y = (offset + weight) * x / sqrt(mean(x^2) + eps), forward and backward.

Forward: one read and one write of the rows. Backward, many rows: a persistent grid keeps the weight gradient of its
rows in registers, and a second kernel adds up one partial row per program. Backward, few rows: partial rows would cost
more than the rows themselves, so programs of two kinds share one launch, some write the gradient of a row, some sum a
block of columns of the weight gradient over all rows (which the cache then holds). Both are deterministic.
"""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import triton

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
from ._norm_configs import backward_config, forward_config, size_class, stages
from ._norm_kernels import backward_few_rows_kernel, backward_kernel, forward_kernel, sum_partials_kernel

Cast = Literal["before", "after"]

MAX_WIDTH = 32768  # a row lives in the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Backward with programs of two kinds: as long as the rows and their gradients stay in the second-level cache.
_FEW_ROWS = 4096
_FEW_WIDTH = 8192
_FEW_BYTES = 32 << 20


def _check(x: torch.Tensor, weight: torch.Tensor | None, cast: str) -> None:
    check(x.dtype in DTYPES, lambda: f"rms_norm takes float32, bfloat16 or float16, not {x.dtype}")
    check(x.shape[-1] <= MAX_WIDTH, lambda: f"rms_norm takes rows of at most {MAX_WIDTH} elements, not {x.shape[-1]}")
    check(cast in ("before", "after"), lambda: f"cast is 'before' or 'after', not {cast!r}")
    if weight is not None:
        check(weight.device == x.device, lambda: f"x is on {x.device}, the weight on {weight.device}")
        check(
            weight.dtype == x.dtype or weight.dtype == torch.float32,
            lambda: f"the weight of rms_norm has the dtype of x ({x.dtype}) or float32, not {weight.dtype}",
        )
        check(
            weight.shape == x.shape[-1:],
            lambda: f"the weight of rms_norm has shape {tuple(x.shape[-1:])}, not {tuple(weight.shape)}",
        )


_forward_launchers = Launchers()
_backward_launchers = Launchers()
_sum_launchers = Launchers()
_few_rows_launchers = Launchers()


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    save: bool,
    traced: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and 1 / sqrt(mean + eps) of each row if `save` (else y again)."""
    width = int(x.shape[-1])
    dtype = x.dtype
    if weight is None:
        weight_dtype = None
    else:
        weight_dtype = weight.dtype
        if weight_dtype is not dtype and cast == "before":
            dtype = weight_dtype
        if weight.numel() != width or weight.get_device() != x.get_device():
            _check(x, weight, cast)
        if not weight.is_contiguous():
            weight = weight.contiguous()
    if x.is_contiguous():
        stride = width
        y = torch.empty_like(x) if dtype is x.dtype else torch.empty_like(x, dtype=dtype)
    else:
        y = fresh(x, x.shape, dtype)
        x = rows_of(x)
        stride = x.stride(0)
    num_rows: Any = y.numel() // width if width else 0
    rstd = fresh(x, (num_rows,), torch.float32) if save else y
    if isinstance(num_rows, int) and num_rows == 0:
        return y, rstd
    device = x.get_device()
    many = not isinstance(num_rows, int) or num_rows > 2 * num_processors(device)
    unit = unit_of(stride)
    key = (device, width, many, unit, x.dtype, weight_dtype, eps, offset, cast, save)
    launcher = _forward_launchers.get(key)
    if launcher is None:
        _check(x, weight, cast)
        config = forward_config(device, width, many, "rms_norm")
        launcher = _forward_launchers[key] = Launcher(
            forward_kernel,
            config.rows,
            EPS=float(eps),
            OFFSET=float(offset),
            WIDTH=width,
            BLOCK=power_of_2(width),
            ROWS=config.rows,
            UNIT=unit,
            ROUND_FIRST=cast == "before" and x.dtype != torch.float32,
            HAS_WEIGHT=weight is not None,
            SAVE=save,
            num_warps=config.warps,
        )
    grid = (num_rows + launcher.size - 1) // launcher.size
    launcher(grid, 1, (x, x if weight is None else weight, y, rstd), (num_rows, stride // unit), traced)
    return y, rstd


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_grad: bool,
    traced: tuple[Any, Any, Any] = (None, None, None),
    dsum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and, if `weight_grad`, of the weight; `dsum` is added to the first."""
    width = int(x.shape[-1])
    dx = fresh(x, x.shape)
    dweight = fresh(weight, (width,)) if weight is not None and weight_grad else None
    num_rows = rstd.shape[0]
    if isinstance(num_rows, int) and num_rows == 0:
        return dx, None if dweight is None else dweight.zero_()
    dy, x = rows_of(dy), rows_of(x)
    if dsum is not None and not dsum.is_contiguous():
        dsum = dsum.contiguous()
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    weight_dtype = None if weight is None else weight.dtype
    device = x.get_device()
    dy_stride, x_stride = dy.stride(0), x.stride(0)
    unit = unit_of(dy_stride, x_stride)
    numbers = (num_rows, dy_stride // unit, x_stride // unit)
    size = size_class(num_rows)
    key = (device, width, unit, size, dy.dtype, x.dtype, weight_dtype, offset, dweight is not None, dsum is None)
    if weight is not None and dweight is not None and _few(num_rows, x):
        launcher = _few_rows_launchers.get(key)
        if launcher is None:
            block = power_of_2(width)
            rows = max(1, 2048 // block)
            columns = 16 if width <= 2048 else 32  # enough programs; 64-byte segments where there are enough anyway
            launcher = _few_rows_launchers[key] = Launcher(
                backward_few_rows_kernel,
                rows,
                OFFSET=float(offset),
                WIDTH=width,
                BLOCK=block,
                ROWS=rows,
                UNIT=unit,
                COLUMNS=columns,
                CHUNK=256 if width <= 4096 else 128,
                HAS_DSUM=dsum is not None,
                num_warps=8 if block <= 8192 else 16,
            )
        columns = launcher.constants["COLUMNS"]
        grid = triton.cdiv(width, columns) + triton.cdiv(num_rows, launcher.size)
        launcher(grid, 1, (dy, x, weight, rstd, x if dsum is None else dsum, dx, dweight), numbers, traced[0])
        return dx, dweight

    launcher = _backward_launchers.get(key)
    config = backward_config(device, width, size, "rms_norm")
    if launcher is None:
        block = power_of_2(width)
        again = block >= 16384
        sizes = dy.element_size() + x.element_size()
        stage_bytes = config.rows * block * (sizes * (2 if again else 1) + (0 if dsum is None else dsum.element_size()))
        launcher = _backward_launchers[key] = Launcher(
            backward_kernel,
            config.rows,
            OFFSET=float(offset),
            WIDTH=width,
            BLOCK=block,
            ROWS=config.rows,
            UNIT=unit,
            STAGES=stages(config.stages, device, stage_bytes),
            HAS_WEIGHT=weight is not None,
            HAS_DSUM=dsum is not None,
            WEIGHT_GRAD=dweight is not None,
            AGAIN=again,
            num_warps=config.warps,
        )
    grid = config.programs * num_processors(device)
    if isinstance(num_rows, int):
        grid = min(grid, triton.cdiv(num_rows, config.rows))
    partials = rstd if dweight is None else fresh(x, (grid, width), torch.float32)
    launcher(
        grid,
        1,
        (dy, x, x if weight is None else weight, rstd, x if dsum is None else dsum, dx, partials),
        numbers,
        traced[1],
    )
    if dweight is not None:
        summing = _sum_launchers.get((device, width, dweight.dtype, config.columns))
        if summing is None:
            summing = _sum_launchers[device, width, dweight.dtype, config.columns] = Launcher(
                sum_partials_kernel, config.columns, WIDTH=width, COLUMNS=config.columns, CHUNK=256, num_warps=8
            )
        summing(triton.cdiv(width, config.columns), 1, (partials, dweight), (grid,), traced[2])
    return dx, dweight


def _few(num_rows: Any, x: torch.Tensor) -> bool:
    if not isinstance(num_rows, int):  # symbolic while compiling: no guard on the number of rows
        return False
    width = x.shape[-1]
    return num_rows <= _FEW_ROWS and width <= _FEW_WIDTH and 2 * num_rows * width * x.element_size() <= _FEW_BYTES


def _plain(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: str) -> torch.Tensor:
    xhat = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return xhat.to(x.dtype)
    if cast == "before":
        return (offset + weight) * xhat.to(x.dtype)
    return ((offset + weight.float()) * xhat).to(x.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: str
    ) -> torch.Tensor:
        y, rstd = _forward(x, weight, eps, offset, cast, True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.offset, ctx.cast = eps, offset, cast
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            plain = partial(_plain, eps=ctx.eps, offset=ctx.offset, cast=ctx.cast)
            return *plain_gradients(plain, (x, weight), (dy,)), None, None, None
        dx, dweight = _backward(dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


@torch.library.triton_op(f"{NAMESPACE}::rms_norm", mutates_args={})
def _operation(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, weight, float(eps), float(offset), cast, True, torch.library.wrap_triton(forward_kernel))


@torch.library.triton_op(f"{NAMESPACE}::rms_norm_backward", mutates_args={})
def _backward_operation(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    dsum: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = (
        torch.library.wrap_triton(backward_few_rows_kernel),
        torch.library.wrap_triton(backward_kernel),
        torch.library.wrap_triton(sum_partials_kernel),
    )
    dx, dweight = _backward(dy, x, weight, rstd, float(offset), True, kernels, dsum)
    assert dweight is not None
    return dx, dweight


@torch.library.triton_op(f"{NAMESPACE}::rms_norm_backward_input", mutates_args={})
def _backward_input_operation(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    dsum: torch.Tensor | None = None,
) -> torch.Tensor:
    kernel = torch.library.wrap_triton(backward_kernel)
    return _backward(dy, x, weight, rstd, float(offset), False, (None, kernel, None), dsum)[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.offset = offset
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _operation_backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    if weight is None or not ctx.needs_input_grad[1]:
        return _backward_input_operation(dy, x, weight, rstd, ctx.offset), None, None, None, None
    return *_backward_operation(dy, x, weight, rstd, ctx.offset), None, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, offset: float = 0.0, cast: Cast = "before"
) -> torch.Tensor:
    """RMS norm of the rows of `x` [..., H], computed in float32.

    With xhat = x / sqrt(mean(x^2) + eps): `cast="before"` gives (offset + weight) * xhat.to(x.dtype), in the dtype to
    which PyTorch promotes x and weight (Llama); `cast="after"` gives ((offset + weight) * xhat).to(x.dtype) (Gemma with
    offset 1). `weight` is [H], of the dtype of x or float32, or None for xhat alone. x is float32, bfloat16 or float16
    with H <= 32768 and any strides; the result lies in memory in the order of x. Raises ValueError for anything else.
    """
    if not x.is_contiguous() and (order := leading_order(x)) is not None:
        return rms_norm(x.permute(order), weight, eps, offset=offset, cast=cast).permute(inverse(order))
    if watched(x, weight):
        y: torch.Tensor = _operation(x, weight, eps, offset, cast)[0]
        return y
    if needs_grad(x, weight):
        y = _Function.apply(x, weight, eps, offset, cast)
        return y
    return _forward(x, weight, eps, offset, cast, False)[0]
