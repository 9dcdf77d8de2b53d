"""The Triton kernels of layer norm, with and without a residual added first; `layer_norm` starts them.

They are cut up as those of RMS norm are (`_norm_kernels`): a program handles ROWS rows of WIDTH elements as a tile of
ROWS x BLOCK. Mean and variance are taken in two passes over a row that is held in registers. All arithmetic is float32.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from ._norm_kernels import load_rows


@triton.jit(do_not_specialize=["num_rows", "x_stride", "residual_stride"])
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    moments_ptr,
    num_rows,
    x_stride,
    residual_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
):
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    inside = (rows < num_rows)[:, None] & there[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    x = load_rows(x_ptr, rows[:, None] * (x_stride * UNIT) + columns[None, :], inside, EXACT, False).to(tl.float32)
    if HAS_RESIDUAL:
        residual_offsets = rows[:, None] * (residual_stride * UNIT) + columns[None, :]
        residual = load_rows(residual_ptr, residual_offsets, inside, EXACT, False).to(tl.float32)
        rounded = (x + residual).to(sum_ptr.dtype.element_ty)
        x = rounded.to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=there, other=0.0).to(tl.float32) + OFFSET
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / WIDTH
    centred = x - mean[:, None]
    if BLOCK != WIDTH:
        centred = tl.where(there[None, :], centred, 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y = y * weight[None, :]
    if HAS_BIAS:
        y = y + bias[None, :]
    if HAS_RESIDUAL:
        if EXACT:
            tl.store(sum_ptr + offsets, rounded)
        else:
            tl.store(sum_ptr + offsets, rounded, mask=inside)
    if EXACT:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(moments_ptr + 2 * rows, mean, mask=rows < num_rows)
        tl.store(moments_ptr + 2 * rows + 1, rstd, mask=rows < num_rows)


@triton.jit
def _input_gradient(xhat, scaled, rstd, WIDTH: tl.constexpr):
    """The gradient of a normalised row; `scaled` is zero where the row has no element."""
    along = tl.sum(xhat * scaled, 1)[:, None] / WIDTH
    mean = tl.sum(scaled, 1)[:, None] / WIDTH
    return (scaled - mean - xhat * along) * rstd


@triton.jit(do_not_specialize=["num_rows", "dy_stride", "x_stride"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    moments_ptr,
    dsum_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    SUMMING: tl.constexpr,
):
    # With SUMMING, one row of `partial` gets this program's part of the gradients of weight and (HAS_BIAS) bias.
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :] + OFFSET
    if SUMMING:
        dweight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        dbias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for block in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        dy_offsets = rows[:, None] * (dy_stride * UNIT) + columns[None, :]
        x_offsets = rows[:, None] * (x_stride * UNIT) + columns[None, :]
        inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        dy = load_rows(dy_ptr, dy_offsets, inside, EXACT, False).to(tl.float32)
        x = load_rows(x_ptr, x_offsets, inside, EXACT, False).to(tl.float32)
        mean = tl.load(moments_ptr + 2 * rows, mask=rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(moments_ptr + 2 * rows + 1, mask=rows < num_rows, other=0.0)[:, None]
        xhat = (x - mean) * rstd  # of a padded row, what is not there meets a gradient of zero
        dx = _input_gradient(xhat, dy * weight if HAS_WEIGHT else dy, rstd, WIDTH)
        dx_offsets = rows[:, None] * WIDTH + columns[None, :]
        if HAS_DSUM:
            dx += load_rows(dsum_ptr, dx_offsets, inside, EXACT, False).to(tl.float32)
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty))
        else:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if SUMMING:
            dweight += dy * xhat
            if HAS_BIAS:
                dbias += dy
    if SUMMING:
        place = partial_ptr + program * ((2 if HAS_BIAS else 1) * WIDTH) + columns
        tl.store(place, tl.sum(dweight, 0), mask=columns < WIDTH)
        if HAS_BIAS:
            tl.store(place + WIDTH, tl.sum(dbias, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows", "dy_stride", "x_stride"])
def backward_few_rows_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    moments_ptr,
    dsum_ptr,
    dx_ptr,
    sums_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_DSUM: tl.constexpr,
):
    # Some programs sum columns of the gradients of weight and bias over all rows, the others do rows.
    COLUMN_PROGRAMS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    program = tl.program_id(0)
    if program < COLUMN_PROGRAMS:
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        dweight = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
        dbias = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
        for start in range(0, num_rows, CHUNK):
            rows = start + tl.arange(0, CHUNK).to(tl.int64)
            inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
            dy = tl.load(dy_ptr + rows[:, None] * (dy_stride * UNIT) + columns[None, :], mask=inside, other=0.0)
            x = tl.load(x_ptr + rows[:, None] * (x_stride * UNIT) + columns[None, :], mask=inside, other=0.0)
            mean = tl.load(moments_ptr + 2 * rows, mask=rows < num_rows, other=0.0)[:, None]
            rstd = tl.load(moments_ptr + 2 * rows + 1, mask=rows < num_rows, other=0.0)[:, None]
            dweight += dy.to(tl.float32) * ((x.to(tl.float32) - mean) * rstd)
            dbias += dy.to(tl.float32)
        tl.store(sums_ptr + columns, tl.sum(dweight, 0).to(sums_ptr.dtype.element_ty), mask=columns < WIDTH)
        if HAS_BIAS:
            tl.store(sums_ptr + WIDTH + columns, tl.sum(dbias, 0).to(sums_ptr.dtype.element_ty), mask=columns < WIDTH)
    else:
        all_columns = tl.arange(0, BLOCK)
        rows = (program - COLUMN_PROGRAMS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (all_columns < WIDTH)[None, :]
        dy = load_rows(dy_ptr, rows[:, None] * (dy_stride * UNIT) + all_columns[None, :], inside, EXACT, False)
        x = load_rows(x_ptr, rows[:, None] * (x_stride * UNIT) + all_columns[None, :], inside, EXACT, False)
        weight = tl.load(weight_ptr + all_columns, mask=all_columns < WIDTH, other=0.0).to(tl.float32)[None, :] + OFFSET
        mean = tl.load(moments_ptr + 2 * rows, mask=rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(moments_ptr + 2 * rows + 1, mask=rows < num_rows, other=0.0)[:, None]
        dx = _input_gradient((x.to(tl.float32) - mean) * rstd, dy.to(tl.float32) * weight, rstd, WIDTH)
        dx_offsets = rows[:, None] * WIDTH + all_columns[None, :]
        if HAS_DSUM:
            dx += load_rows(dsum_ptr, dx_offsets, inside, EXACT, False).to(tl.float32)
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty))
        else:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
