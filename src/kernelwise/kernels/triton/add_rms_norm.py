"""Residual addition and RMS norm in one pass, forward and backward: s = x + residual, y = rms_norm(s).

The sum is written once and normalised while it is in registers; backward adds the gradient that s gets from elsewhere to
the norm's own. The norm itself, its configurations and its backward kernels are those of `rms_norm`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .._autograd import plain_gradients
from . import rms_norm as norm
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
from ._norm_configs import forward_config
from ._norm_kernels import load_rows


@triton.jit(do_not_specialize=["num_rows", "x_stride", "residual_stride"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    num_rows,
    x_stride,
    residual_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SAVE: tl.constexpr,
):
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x = load_rows(x_ptr, rows[:, None] * (x_stride * UNIT) + columns[None, :], inside, EXACT, False)
    residual = load_rows(
        residual_ptr, rows[:, None] * (residual_stride * UNIT) + columns[None, :], inside, EXACT, False
    )
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) + OFFSET
    rounded = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    total = rounded.to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(total * total, 1) / WIDTH + EPS)
    y = total * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(x.dtype).to(tl.float32)
    if HAS_WEIGHT:
        y = y * weight[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    if EXACT:
        tl.store(sum_ptr + offsets, rounded)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))
    else:
        tl.store(sum_ptr + offsets, rounded, mask=inside)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


_launchers = Launchers()


def _check(x: torch.Tensor, residual: torch.Tensor) -> None:
    check(residual.shape == x.shape, lambda: f"x has shape {tuple(x.shape)}, residual has {tuple(residual.shape)}")
    check(
        residual.dtype == x.dtype, lambda: f"x is {x.dtype} and residual is {residual.dtype}; they must be of one dtype"
    )
    check(residual.device == x.device, lambda: f"x is on {x.device}, residual on {residual.device}")


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    save: bool,
    traced: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, s, and 1 / sqrt(mean + eps) of each row if `save` (else y again)."""
    width = int(x.shape[-1])
    device = x.get_device()
    if residual.dtype is not x.dtype or residual.shape != x.shape or residual.get_device() != device:
        _check(x, residual)
    dtype = x.dtype
    weight_dtype = None
    if weight is not None:
        weight_dtype = weight.dtype
        if weight_dtype is not dtype and cast == "before":
            dtype = weight_dtype
        if weight.numel() != width or weight.get_device() != device:
            norm._check(x, weight, cast)
        if not weight.is_contiguous():
            weight = weight.contiguous()
    y = fresh(x, x.shape, dtype)
    total = fresh(x, x.shape)
    num_rows: Any = y.numel() // width if width else 0
    rstd = fresh(x, (num_rows,), torch.float32) if save else y
    if isinstance(num_rows, int) and num_rows == 0:
        return y, total, rstd
    x, residual = rows_of(x), rows_of(residual)
    x_stride, residual_stride = x.stride(0), residual.stride(0)
    unit = unit_of(x_stride, residual_stride)
    many = not isinstance(num_rows, int) or num_rows > 2 * num_processors(device)
    key = (device, width, many, unit, x.dtype, weight_dtype, eps, offset, cast, save)
    launcher = _launchers.get(key)
    if launcher is None:
        norm._check(x, weight, cast)
        config = forward_config(device, width, many, "add_rms_norm")
        launcher = _launchers[key] = Launcher(
            _forward_kernel,
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
    tensors = (x, residual, x if weight is None else weight, y, total, rstd)
    launcher(grid, 1, tensors, (num_rows, x_stride // unit, residual_stride // unit), traced)
    return y, total, rstd


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, rstd = _forward(x, residual, weight, eps, offset, cast, True)
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps, ctx.offset, ctx.cast = eps, offset, cast
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dsum, dsum, None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            plain = partial(norm._plain, eps=ctx.eps, offset=ctx.offset, cast=ctx.cast)
            dx, dweight = plain_gradients(plain, (total, weight), (dy,))
            dx = dx if dsum is None or dx is None else dx + dsum
            return dx, dx, dweight, None, None, None
        dx, dweight = norm._backward(dy, total, weight, rstd, ctx.offset, ctx.needs_input_grad[2], dsum=dsum)
        return dx, dx, dweight, None, None, None


@torch.library.triton_op(f"{NAMESPACE}::add_rms_norm", mutates_args={})
def _operation(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernel = torch.library.wrap_triton(_forward_kernel)
    return _forward(x, residual, weight, float(eps), float(offset), cast, True, kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, _, offset, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.offset = offset
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _operation_backward(
    ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None, _: Any
) -> tuple[torch.Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dsum, dsum, None, None, None, None
    dweight = None
    if weight is None or not ctx.needs_input_grad[2]:
        dx = norm._backward_input_operation(dy, total, weight, rstd, ctx.offset, dsum)
    else:
        dx, dweight = norm._backward_operation(dy, total, weight, rstd, ctx.offset, dsum)
    return dx, dx, dweight, None, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: norm.Cast = "before",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual, rounded to their dtype.

    `x` and `residual` are [..., H], of one shape and dtype; all else is as for `rms_norm`. Both results are contiguous.
    Raises ValueError for anything else.
    """
    if watched(x, residual, weight):
        y, total, _ = _operation(x, residual, weight, eps, offset, cast)
        return y, total
    if needs_grad(x, residual, weight):
        y, total = _Function.apply(x, residual, weight, eps, offset, cast)
        return y, total
    y, total, _ = _forward(x, residual, weight, eps, offset, cast, False)
    return y, total
