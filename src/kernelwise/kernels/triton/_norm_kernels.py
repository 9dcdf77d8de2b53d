"""The Triton kernels of RMS norm; `rms_norm` says how they play together and starts them.

In all of them a program handles ROWS rows of WIDTH elements as a tile of ROWS x BLOCK, BLOCK being the power of two from
WIDTH up. Strides come in UNITs. All arithmetic is float32; results are rounded once, as the layer rounds.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, offsets, inside, EXACT: tl.constexpr, AGAIN: tl.constexpr):
    # AGAIN: another eviction hint keeps the compiler from merging a second load with the first.
    if AGAIN:
        return tl.load(ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
    elif EXACT:
        return tl.load(ptr + offsets)
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "x_stride"])
def forward_kernel(
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
    loaded = load_rows(x_ptr, x_offsets, inside, ROWS == 1 and BLOCK == WIDTH, False)
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
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
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
    HAS_DSUM: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    AGAIN: tl.constexpr,
):
    # With HAS_DSUM, x is a sum that was handed out as well (add + norm), and dsum its gradient from there.
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
        dy = load_rows(dy_ptr, dy_offsets, inside, EXACT, False).to(tl.float32)
        x = load_rows(x_ptr, x_offsets, inside, EXACT, False).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        scaled = dy * weight if HAS_WEIGHT else dy
        mean = tl.sum(x * rstd * scaled, 1)[:, None] / WIDTH
        if AGAIN:  # not held in registers across the reduction: the first-level cache has the row
            dy = load_rows(dy_ptr, dy_offsets, inside, EXACT, True).to(tl.float32)
            x = load_rows(x_ptr, x_offsets, inside, EXACT, True).to(tl.float32)
            scaled = dy * weight if HAS_WEIGHT else dy
        xhat = x * rstd
        dx = (scaled - xhat * mean) * rstd
        dx_offsets = rows[:, None] * WIDTH + columns[None, :]
        if HAS_DSUM:
            dx += load_rows(dsum_ptr, dx_offsets, inside, EXACT, False).to(tl.float32)
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty))
        else:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT_GRAD:
            dweight += dy * xhat
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program * WIDTH + columns, tl.sum(dweight, 0), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(
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
def backward_few_rows_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dsum_ptr,
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
    HAS_DSUM: tl.constexpr,
):
    COLUMN_PROGRAMS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    EXACT: tl.constexpr = ROWS == 1 and BLOCK == WIDTH
    program = tl.program_id(0)
    if program < COLUMN_PROGRAMS:
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([CHUNK, COLUMNS], dtype=tl.float32)
        for start in range(0, num_rows, CHUNK):
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
        dy = load_rows(dy_ptr, rows[:, None] * (dy_stride * UNIT) + all_columns[None, :], inside, EXACT, False).to(
            tl.float32
        )
        x = load_rows(x_ptr, rows[:, None] * (x_stride * UNIT) + all_columns[None, :], inside, EXACT, False).to(
            tl.float32
        )
        weight = tl.load(weight_ptr + all_columns, mask=all_columns < WIDTH, other=0.0).to(tl.float32)[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        scaled = dy * (weight + OFFSET)
        xhat = x * rstd
        mean = tl.sum(xhat * scaled, 1)[:, None] / WIDTH
        dx = (scaled - xhat * mean) * rstd
        dx_offsets = rows[:, None] * WIDTH + all_columns[None, :]
        if HAS_DSUM:
            dx += load_rows(dsum_ptr, dx_offsets, inside, EXACT, False).to(tl.float32)
        if EXACT:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty))
        else:
            tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
