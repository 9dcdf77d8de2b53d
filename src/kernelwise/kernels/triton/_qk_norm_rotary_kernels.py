"""The kernels of `qk_norm_rotary`: a program handles one token and a share of its heads, or goes through tokens backward.

A head is normalised and rotated in registers. Strides come in UNITs. All arithmetic is float32; results are rounded once.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(ptr, offsets, inside, HALF: tl.constexpr, EXACT: tl.constexpr):
    if EXACT:
        return tl.load(ptr + offsets).to(tl.float32), tl.load(ptr + offsets + HALF).to(tl.float32)
    else:
        first = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        return first, tl.load(ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(ptr, offsets, first, second, inside, HALF: tl.constexpr, EXACT: tl.constexpr):
    if EXACT:
        tl.store(ptr + offsets, first.to(ptr.dtype.element_ty))
        tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=inside)
        tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _angles(ptr, offsets, BLOCK: tl.constexpr, HALF: tl.constexpr):
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < HALF
    first = tl.load(ptr + offsets + columns, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(ptr + offsets + columns + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_heads(
    x_ptr,
    y_ptr,
    stride,
    first,
    weight_ptr,
    cos1,
    cos2,
    sin1,
    sin2,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Heads first .. first + SHARE of one token; x_ptr and y_ptr point at its first head."""
    heads = first + tl.arange(0, SHARE)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < HEADS) & (columns < HALF)
    x1, x2 = _halves(x_ptr, heads * stride + columns, inside, HALF, EXACT)
    w1, w2 = _angles(weight_ptr, 0, BLOCK, HALF)
    rstd = tl.math.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + EPS)[:, None]
    x1 = x1 * rstd * (w1 + OFFSET)
    x2 = x2 * rstd * (w2 + OFFSET)
    y_offsets = heads * (2 * HALF) + columns
    _store_halves(y_ptr, y_offsets, x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, inside, HALF, EXACT)


@triton.jit
def _backward_heads(
    dy_ptr,
    x_ptr,
    dx_ptr,
    dy_stride,
    x_stride,
    weight_ptr,
    cos1,
    cos2,
    sin1,
    sin2,
    dweight1,
    dweight2,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    EXACT: tl.constexpr,
):
    """All heads of one token; the gradients of the weight are added to the last two tiles."""
    heads = tl.arange(0, ALL)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < HEADS) & (columns < HALF)
    x1, x2 = _halves(x_ptr, heads * x_stride + columns, inside, HALF, EXACT)
    dy1, dy2 = _halves(dy_ptr, heads * dy_stride + columns, inside, HALF, EXACT)
    w1, w2 = _angles(weight_ptr, 0, BLOCK, HALF)
    rstd = tl.math.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + EPS)[:, None]
    x1 = x1 * rstd
    x2 = x2 * rstd
    back1 = dy1 * cos1 + dy2 * sin2
    back2 = dy2 * cos2 - dy1 * sin1
    dweight1 += back1 * x1
    dweight2 += back2 * x2
    back1 = back1 * (w1 + OFFSET)
    back2 = back2 * (w2 + OFFSET)
    mean = ((tl.sum(x1 * back1, 1) + tl.sum(x2 * back2, 1)) / (2 * HALF))[:, None]
    dx_offsets = heads * (2 * HALF) + columns
    _store_halves(dx_ptr, dx_offsets, (back1 - x1 * mean) * rstd, (back2 - x2 * mean) * rstd, inside, HALF, EXACT)
    return dweight1, dweight2


@triton.jit(
    do_not_specialize=[
        "q_batch_stride",
        "q_head_stride",
        "q_token_stride",
        "k_batch_stride",
        "k_head_stride",
        "k_token_stride",
        "cos_batch_stride",
        "cos_token_stride",
    ]
)
def forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    cos_batch_stride,
    cos_token_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // SHARES).to(tl.int64)
    share = tl.program_id(1) % SHARES
    angles = batch * (cos_batch_stride * UNIT) + token * (cos_token_stride * UNIT)
    cos1, cos2 = _angles(cos_ptr, angles, BLOCK, HALF)
    sin1, sin2 = _angles(sin_ptr, angles, BLOCK, HALF)
    place = batch * tl.num_programs(0) + token  # outputs lie as [batch, token, head, column]
    q = q_ptr + batch * (q_batch_stride * UNIT) + token * (q_token_stride * UNIT)
    k = k_ptr + batch * (k_batch_stride * UNIT) + token * (k_token_stride * UNIT)
    Q_EXACT: tl.constexpr = BLOCK == HALF and SHARES * Q_SHARE == Q_HEADS
    K_EXACT: tl.constexpr = BLOCK == HALF and SHARES * K_SHARE == K_HEADS
    q_out = q_out_ptr + place * (Q_HEADS * 2 * HALF)
    k_out = k_out_ptr + place * (K_HEADS * 2 * HALF)
    q_stride = tl.full([], q_head_stride, tl.int64) * UNIT
    k_stride = tl.full([], k_head_stride, tl.int64) * UNIT
    _forward_heads(
        q, q_out, q_stride, share * Q_SHARE, q_weight_ptr, cos1, cos2, sin1, sin2, EPS, OFFSET, Q_HEADS, Q_SHARE,
        BLOCK, HALF, Q_EXACT,
    )  # fmt: skip
    _forward_heads(
        k, k_out, k_stride, share * K_SHARE, k_weight_ptr, cos1, cos2, sin1, sin2, EPS, OFFSET, K_HEADS, K_SHARE,
        BLOCK, HALF, K_EXACT,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_batches",
        "num_tokens",
        "dq_batch_stride",
        "dq_head_stride",
        "dq_token_stride",
        "dk_batch_stride",
        "dk_head_stride",
        "dk_token_stride",
        "q_batch_stride",
        "q_head_stride",
        "q_token_stride",
        "k_batch_stride",
        "k_head_stride",
        "k_token_stride",
        "cos_batch_stride",
        "cos_token_stride",
    ]
)
def backward_kernel(
    dq_ptr,
    dk_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_out_ptr,
    dk_out_ptr,
    partial_ptr,
    num_batches,
    num_tokens,
    dq_batch_stride,
    dq_head_stride,
    dq_token_stride,
    dk_batch_stride,
    dk_head_stride,
    dk_token_stride,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    cos_batch_stride,
    cos_token_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_ALL: tl.constexpr,
    K_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    Q_EXACT: tl.constexpr = BLOCK == HALF and Q_ALL == Q_HEADS
    K_EXACT: tl.constexpr = BLOCK == HALF and K_ALL == K_HEADS
    program = tl.program_id(0)
    dq1 = tl.zeros([Q_ALL, BLOCK], dtype=tl.float32)
    dq2 = tl.zeros([Q_ALL, BLOCK], dtype=tl.float32)
    dk1 = tl.zeros([K_ALL, BLOCK], dtype=tl.float32)
    dk2 = tl.zeros([K_ALL, BLOCK], dtype=tl.float32)
    for i in tl.range(program, num_batches * num_tokens, tl.num_programs(0), num_stages=STAGES):
        place = tl.zeros([], dtype=tl.int64) + i
        batch = place // num_tokens
        token = place % num_tokens
        angles = batch * (cos_batch_stride * UNIT) + token * (cos_token_stride * UNIT)
        cos1, cos2 = _angles(cos_ptr, angles, BLOCK, HALF)
        sin1, sin2 = _angles(sin_ptr, angles, BLOCK, HALF)
        dq1, dq2 = _backward_heads(
            dq_ptr + batch * (dq_batch_stride * UNIT) + token * (dq_token_stride * UNIT),
            q_ptr + batch * (q_batch_stride * UNIT) + token * (q_token_stride * UNIT),
            dq_out_ptr + place * (Q_HEADS * 2 * HALF),
            tl.full([], dq_head_stride, tl.int64) * UNIT, tl.full([], q_head_stride, tl.int64) * UNIT,
            q_weight_ptr, cos1, cos2, sin1, sin2, dq1, dq2, EPS, OFFSET, Q_HEADS, Q_ALL, BLOCK, HALF, Q_EXACT,
        )  # fmt: skip
        dk1, dk2 = _backward_heads(
            dk_ptr + batch * (dk_batch_stride * UNIT) + token * (dk_token_stride * UNIT),
            k_ptr + batch * (k_batch_stride * UNIT) + token * (k_token_stride * UNIT),
            dk_out_ptr + place * (K_HEADS * 2 * HALF),
            tl.full([], dk_head_stride, tl.int64) * UNIT, tl.full([], k_head_stride, tl.int64) * UNIT,
            k_weight_ptr, cos1, cos2, sin1, sin2, dk1, dk2, EPS, OFFSET, K_HEADS, K_ALL, BLOCK, HALF, K_EXACT,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK)
    partial = partial_ptr + program * (4 * HALF) + columns
    tl.store(partial, tl.sum(dq1, 0), mask=columns < HALF)
    tl.store(partial + HALF, tl.sum(dq2, 0), mask=columns < HALF)
    tl.store(partial + 2 * HALF, tl.sum(dk1, 0), mask=columns < HALF)
    tl.store(partial + 3 * HALF, tl.sum(dk2, 0), mask=columns < HALF)
