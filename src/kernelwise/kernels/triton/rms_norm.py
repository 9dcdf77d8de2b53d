"""RMS normalisation over the last dimension: y = (offset + weight) * x / sqrt(mean(x^2) + eps), forward and backward.

Forward: one read and one write of the rows. Backward, many rows: a persistent grid keeps the weight gradient of its
rows in registers, and a second kernel adds up one partial row per program. Backward, few rows: partial rows would cost
more than the rows themselves, so programs of two kinds share one launch, some write the gradient of a row, some sum a
block of columns of the weight gradient over all rows (which the cache then holds). Both are deterministic.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ._launch import (
    NAMESPACE,
    Launcher,
    Launchers,
    check,
    device_name,
    fresh,
    needs_grad,
    num_processors,
    power_of_2,
    rows_of,
    unit_of,
    watched,
)
from ._tables import NORM_BACKWARD, NORM_FORWARD, NormConfig, find

Cast = Literal["before", "after"]

MAX_WIDTH = 32768  # a row lives in the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Backward with programs of two kinds: as long as the rows and their gradients stay in the second-level cache.
_FEW_ROWS = 4096
_FEW_WIDTH = 8192
_FEW_BYTES = 32 << 20
_MANY_ROWS = 8192  # a program for each multiprocessor up to here, then more of them
_SHARED_BYTES = {"sm_90": 160 << 10, "sm_100": 160 << 10}  # for pipelined rows; elsewhere little is taken for granted
_PARTIAL_COLUMNS = 32


@triton.jit
def _load_rows(ptr, offsets, inside, EXACT: tl.constexpr, AGAIN: tl.constexpr):
    # AGAIN: another eviction hint keeps the compiler from merging a second load with the first.
    if AGAIN:
        return tl.load(ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
    elif EXACT:
        return tl.load(ptr + offsets)
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    x_stride,
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
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x_offsets = rows[:, None] * (x_stride * UNIT) + columns[None, :]
    y_offsets = rows[:, None] * WIDTH + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    loaded = _load_rows(x_ptr, x_offsets, inside, ROWS == 1 and BLOCK == WIDTH, False)
    x = loaded.to(tl.float32)
    if HAS_WEIGHT:
        if BLOCK == WIDTH:
            weight = tl.load(weight_ptr + columns).to(tl.float32) + OFFSET
        else:
            weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) + OFFSET
    rstd = tl.math.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)
    y = x * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(loaded.dtype).to(tl.float32)
    if HAS_WEIGHT:
        y = y * weight[None, :]
    if ROWS == 1 and BLOCK == WIDTH:
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "dy_stride", "x_stride"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    dy_stride,
    x_stride,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    AGAIN: tl.constexpr,
):
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :] + OFFSET
    if WEIGHT_GRAD:
        dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for block in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        dy_offsets = rows[:, None] * (dy_stride * UNIT) + columns[None, :]
        x_offsets = rows[:, None] * (x_stride * UNIT) + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        dy = _load_rows(dy_ptr, dy_offsets, inside, EXACT, False).to(tl.float32)
        x = _load_rows(x_ptr, x_offsets, inside, EXACT, False).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        scaled = dy * weight if HAS_WEIGHT else dy
        mean = tl.sum(x * rstd * scaled, 1)[:, None] / WIDTH
        if AGAIN:  # not held in registers across the reduction: the first-level cache has the row
            dy = _load_rows(dy_ptr, dy_offsets, inside, EXACT, True).to(tl.float32)
            x = _load_rows(x_ptr, x_offsets, inside, EXACT, True).to(tl.float32)
            scaled = dy * weight if HAS_WEIGHT else dy
        xhat = x * rstd
        dx = ((scaled - xhat * mean) * rstd).to(dx_ptr.dtype.element_ty)
        dx_offsets = rows[:, None] * WIDTH + columns[None, :]
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx)
        else:
            tl.store(dx_ptr + dx_offsets, dx, mask=inside)
        if WEIGHT_GRAD:
            dweight += dy * xhat
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program * WIDTH + columns, tl.sum(dweight, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    partial_ptr, dweight_ptr, num_partials, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
    for start in range(0, num_partials, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        inside = (rows < num_partials)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    dweight = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + columns, dweight, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows", "dy_stride", "x_stride"])
def _backward_few_rows_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    num_rows,
    dy_stride,
    x_stride,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    COLUMN_PROGRAMS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    program = tl.program_id(0)
    if program < COLUMN_PROGRAMS:
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
        for start in tl.range(0, num_rows, CHUNK, num_stages=STAGES):
            rows = start + tl.arange(0, CHUNK).to(tl.int64)
            inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
            dy = tl.load(dy_ptr + rows[:, None] * (dy_stride * UNIT) + columns[None, :], mask=inside, other=0.0)
            x = tl.load(x_ptr + rows[:, None] * (x_stride * UNIT) + columns[None, :], mask=inside, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            total += dy.to(tl.float32) * (x.to(tl.float32) * rstd)
        dweight = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + columns, dweight, mask=columns < WIDTH)
    else:
        all_columns = tl.arange(0, BLOCK)
        rows = (program - COLUMN_PROGRAMS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (all_columns < WIDTH)[None, :]
        dy = _load_rows(dy_ptr, rows[:, None] * (dy_stride * UNIT) + all_columns[None, :], inside, EXACT, False).to(
            tl.float32
        )
        x = _load_rows(x_ptr, rows[:, None] * (x_stride * UNIT) + all_columns[None, :], inside, EXACT, False).to(
            tl.float32
        )
        weight = tl.load(weight_ptr + all_columns, mask=all_columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        scaled = dy * (weight + OFFSET)
        xhat = x * rstd
        mean = tl.sum(xhat * scaled, 1)[:, None] / WIDTH
        dx = ((scaled - xhat * mean) * rstd).to(dx_ptr.dtype.element_ty)
        dx_offsets = rows[:, None] * WIDTH + all_columns[None, :]
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx)
        else:
            tl.store(dx_ptr + dx_offsets, dx, mask=inside)


def _warps(block: int, elements: int) -> int:
    """Warps such that each thread holds `elements` of a row of `block`."""
    return max(1, min(32, block // (32 * elements)))


@functools.cache
def _forward_config(device: int, width: int, many: bool) -> NormConfig:
    block = power_of_2(width)
    found = find(NORM_FORWARD, device_name(device), width, 1 << 62 if many else 1)
    if found is not None:
        return found
    if block <= 512:  # several short rows per program
        return NormConfig(rows=max(1, 2048 // block), warps=4)
    if many and block <= 2048:
        return NormConfig(rows=4096 // block, warps=8)
    elements = 16 if block == width else 32  # of a padded row, up to half are not there
    return NormConfig(rows=1, warps=min(16, max(4, _warps(block, elements))))


@functools.cache
def _backward_config(device: int, width: int, many: bool) -> NormConfig:
    block = power_of_2(width)
    found = find(NORM_BACKWARD, device_name(device), width, 1 << 62 if many else _MANY_ROWS)
    if found is not None:
        return found
    if block <= 512:
        return NormConfig(rows=max(1, 2048 // block), warps=4, programs=4, stages=1)
    if block >= 16384:
        return NormConfig(rows=1, warps=32, programs=1, stages=1)
    warps = _warps(block, 32)
    return NormConfig(rows=1, warps=warps, programs=max(1, min(4, 8 // warps)), stages=3)


def _stages(wanted: int, device: int, stage_bytes: int) -> int:
    """As many pipeline stages as `wanted`, or as shared memory holds."""
    memory = _SHARED_BYTES.get(device_name(device), 48 << 10)
    return max(1, min(wanted, 1 + memory // stage_bytes))


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
        config = _forward_config(device, width, many)
        launcher = _forward_launchers[key] = Launcher(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x and, if `weight_grad`, of the weight."""
    width = int(x.shape[-1])
    dx = fresh(x, x.shape)
    dweight = fresh(weight, (width,)) if weight is not None and weight_grad else None
    num_rows = rstd.shape[0]
    if isinstance(num_rows, int) and num_rows == 0:
        return dx, None if dweight is None else dweight.zero_()
    dy, x = rows_of(dy), rows_of(x)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    weight_dtype = None if weight is None else weight.dtype
    device = x.get_device()
    dy_stride, x_stride = dy.stride(0), x.stride(0)
    unit = unit_of(dy_stride, x_stride)
    numbers = (num_rows, dy_stride // unit, x_stride // unit)
    many = not isinstance(num_rows, int) or num_rows > _MANY_ROWS
    key = (device, width, unit, many, dy.dtype, x.dtype, weight_dtype, offset, dweight is not None)
    if weight is not None and dweight is not None and _few(num_rows, x):
        launcher = _few_rows_launchers.get(key)
        if launcher is None:
            block = power_of_2(width)
            rows = max(1, 2048 // block)
            columns = 16 if width <= 2048 else 32  # enough programs; 64-byte segments where there are enough anyway
            launcher = _few_rows_launchers[key] = Launcher(
                _backward_few_rows_kernel,
                rows,
                OFFSET=float(offset),
                WIDTH=width,
                BLOCK=block,
                ROWS=rows,
                UNIT=unit,
                COLUMNS=columns,
                CHUNK=256 if width <= 4096 else 128,
                STAGES=1,
                num_warps=8 if block <= 8192 else 16,
            )
        columns = launcher.constants["COLUMNS"]
        grid = triton.cdiv(width, columns) + triton.cdiv(num_rows, launcher.size)
        launcher(grid, 1, (dy, x, weight, rstd, dx, dweight), numbers, traced[0])
        return dx, dweight

    launcher = _backward_launchers.get(key)
    config = _backward_config(device, width, many)
    if launcher is None:
        block = power_of_2(width)
        again = block >= 16384
        stage_bytes = config.rows * block * (dy.element_size() + x.element_size()) * (2 if again else 1)
        launcher = _backward_launchers[key] = Launcher(
            _backward_kernel,
            config.rows,
            OFFSET=float(offset),
            WIDTH=width,
            BLOCK=block,
            ROWS=config.rows,
            UNIT=unit,
            STAGES=_stages(config.stages, device, stage_bytes),
            HAS_WEIGHT=weight is not None,
            WEIGHT_GRAD=dweight is not None,
            AGAIN=again,
            num_warps=config.warps,
        )
    grid = config.programs * num_processors(device)
    if isinstance(num_rows, int):
        grid = min(grid, triton.cdiv(num_rows, config.rows))
    partials = rstd if dweight is None else fresh(x, (grid, width), torch.float32)
    launcher(grid, 1, (dy, x, x if weight is None else weight, rstd, dx, partials), numbers, traced[1])
    if dweight is not None:
        summing = _sum_launchers.get((device, width, dweight.dtype))
        if summing is None:
            summing = _sum_launchers[device, width, dweight.dtype] = Launcher(
                _sum_partials_kernel, _PARTIAL_COLUMNS, WIDTH=width, COLUMNS=_PARTIAL_COLUMNS, CHUNK=256, num_warps=8
            )
        summing(triton.cdiv(width, _PARTIAL_COLUMNS), 1, (partials, dweight), (grid,), traced[2])
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
            leaves = (x,) if weight is None else (x, weight)
            y = _plain(x, weight, ctx.eps, ctx.offset, ctx.cast)
            grads = torch.autograd.grad(y, leaves, dy, create_graph=True, allow_unused=True)
            return grads[0], grads[1] if weight is not None else None, None, None, None
        dx, dweight = _backward(dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


@torch.library.triton_op(f"{NAMESPACE}::rms_norm", mutates_args={})
def _operation(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, weight, float(eps), float(offset), cast, True, torch.library.wrap_triton(_forward_kernel))


@torch.library.triton_op(f"{NAMESPACE}::rms_norm_backward", mutates_args={})
def _backward_operation(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = (
        torch.library.wrap_triton(_backward_few_rows_kernel),
        torch.library.wrap_triton(_backward_kernel),
        torch.library.wrap_triton(_sum_partials_kernel),
    )
    dx, dweight = _backward(dy, x, weight, rstd, float(offset), True, kernels)
    assert dweight is not None
    return dx, dweight


@torch.library.triton_op(f"{NAMESPACE}::rms_norm_backward_input", mutates_args={})
def _backward_input_operation(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, offset: float
) -> torch.Tensor:
    kernel = torch.library.wrap_triton(_backward_kernel)
    return _backward(dy, x, weight, rstd, float(offset), False, (None, kernel, None))[0]


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
    with H <= 32768 and any strides; the result is contiguous. Raises ValueError for anything else.
    """
    if watched(x, weight):
        y: torch.Tensor = _operation(x, weight, eps, offset, cast)[0]
        return y
    if needs_grad(x, weight):
        y = _Function.apply(x, weight, eps, offset, cast)
        return y
    return _forward(x, weight, eps, offset, cast, False)[0]
