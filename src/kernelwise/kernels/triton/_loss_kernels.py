"""The Triton kernels of cross-entropy; `cross_entropy` says how they play together and starts them.

A row of logits is read in blocks of SUBROWS x COLUMNS: every thread keeps a running maximum and a running sum of its own
columns, so nothing is exchanged between threads before the end of the row. Strides come in UNITs. Rows of an odd width
start at odd addresses; they are read from the 16-byte boundary before (ALIGN elements apart), so that only their first
and last block are read element by element. The logarithm of a row's sum of
exponentials is kept as two numbers, the largest logit and the rest: their sum would round away what large logits need.
All arithmetic is float32; a gradient is rounded once.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Exact to float32 near zero too, where 1 - exp(-2x) is not."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = square * (-17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0)))
    near = x + x * square * (-1.0 / 3.0 + square * (2.0 / 15.0) + series * square)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr):
    """What the softmax sees of a logit, and the derivative of that (not 1 - tanh squared, which is 0 too early)."""
    if SOFTCAP > 0.0:
        decay = tl.exp2(tl.abs(x / SOFTCAP) * (-2.0 * _LOG2_E))
        return SOFTCAP * _tanh(x / SOFTCAP), 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        return x, 1.0


@triton.jit
def _start(row, stride, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Where reading of a row begins, and how many elements that is before the row."""
    start = row * (stride * UNIT)
    if ALIGN > 1:
        first = start // ALIGN * ALIGN
        return tl.multiple_of(first, ALIGN), (start - first).to(tl.int32)
    else:
        return start, 0


@triton.jit
def _gather(
    ptr, offsets, lead, end, peak, total, plain, MASK: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr
):
    """One block into the running maximum, sum of exponentials and (for label smoothing) sum."""
    if MASK:
        inside = (offsets >= lead) & (offsets < end)
        x, _ = _capped(tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32), SOFTCAP)
        if SMOOTHING > 0.0:
            plain += tl.sum(x if SOFTCAP <= 0.0 else tl.where(inside, x, 0.0), 0)
        x = tl.where(inside, x, float("-inf"))
    else:
        x, _ = _capped(tl.load(ptr + offsets).to(tl.float32), SOFTCAP)
        if SMOOTHING > 0.0:
            plain += tl.sum(x, 0)
    higher = tl.maximum(peak, tl.max(x, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp2((peak - base) * _LOG2_E) + tl.sum(tl.exp2((x - base[None, :]) * _LOG2_E), 0)
    return higher, total, plain


@triton.jit
def _spread(
    from_ptr,
    to_ptr,
    offsets,
    lead,
    end,
    label_offset,
    base,
    rest,
    factor,
    WIDTH: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    MASK: tl.constexpr,
):
    """The gradient of one block of logits."""
    inside = (offsets >= lead) & (offsets < end)
    if MASK:
        x = tl.load(from_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(from_ptr + offsets).to(tl.float32)
    x, slope = _capped(x, SOFTCAP)
    gradient = tl.exp2(((x - base) - rest) * _LOG2_E)
    if Z_LOSS > 0.0:
        gradient = gradient * (1.0 + 2.0 * Z_LOSS * (base + rest))
    if SMOOTHING > 0.0:
        gradient = gradient - SMOOTHING / WIDTH
    gradient = tl.where(offsets == label_offset, gradient - (1.0 - SMOOTHING), gradient)
    gradient = (gradient * (factor * slope)).to(to_ptr.dtype.element_ty)
    if MASK:
        tl.store(to_ptr + offsets, gradient, mask=inside)
    else:
        tl.store(to_ptr + offsets, gradient)


@triton.jit(do_not_specialize=["stride"])
def rows_kernel(
    logits_ptr,
    labels_ptr,
    scale_ptr,
    loss_ptr,
    lse_ptr,
    stride,
    WIDTH: tl.constexpr,
    SUBROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
):
    # The loss of one row, not scaled. With GRADIENT, its gradient times the scale replaces the logits, in a second
    # sweep that goes backwards, so that it begins with what the second-level cache still holds.
    BLOCK: tl.constexpr = SUBROWS * COLUMNS
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    first, lead = _start(row, stride, UNIT, ALIGN)
    ptr = logits_ptr + first
    end = lead + WIDTH
    offsets = tl.arange(0, SUBROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    whole_from: tl.constexpr = 1 if ALIGN > 1 else 0
    whole_to = end // BLOCK
    all_to = (end + BLOCK - 1) // BLOCK
    if label == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([SUBROWS, COLUMNS], dtype=logits_ptr.dtype.element_ty)
            for i in range(all_to):
                place = i * BLOCK + offsets
                tl.store(ptr + place, zeros, mask=(place >= lead) & (place < end))
        else:
            tl.store(lse_ptr + 2 * row, 0.0)
            tl.store(lse_ptr + 2 * row + 1, 0.0)
    else:
        known = (label >= 0) & (label < WIDTH)  # any other label gives NaN, here and in the gradient
        logit = tl.load(ptr + lead + label, mask=known, other=float("nan")).to(tl.float32)
        logit, _ = _capped(logit, SOFTCAP)
        peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        plain = tl.zeros([COLUMNS], dtype=tl.float32)
        if ALIGN > 1:
            peak, total, plain = _gather(ptr, offsets, lead, end, peak, total, plain, True, SMOOTHING, SOFTCAP)
        for i in range(whole_from, whole_to):
            peak, total, plain = _gather(
                ptr, i * BLOCK + offsets, lead, end, peak, total, plain, False, SMOOTHING, SOFTCAP
            )
        for i in range(tl.maximum(whole_from, whole_to), all_to):
            peak, total, plain = _gather(
                ptr, i * BLOCK + offsets, lead, end, peak, total, plain, True, SMOOTHING, SOFTCAP
            )
        highest = tl.max(peak, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        rest = tl.log2(tl.sum(total * tl.exp2((peak - base) * _LOG2_E), 0)) * _LN_2
        loss = (base - logit) + rest
        if SMOOTHING > 0.0:
            loss = (1.0 - SMOOTHING) * loss + SMOOTHING * ((base - tl.sum(plain, 0) / WIDTH) + rest)
        if Z_LOSS > 0.0:
            loss += Z_LOSS * (base + rest) * (base + rest)
        tl.store(loss_ptr + row, loss)
        if GRADIENT:
            factor = tl.load(scale_ptr + (row if SCALE_ROWS else 0))
            factor = tl.where(known, factor, float("nan"))
            tl.debug_barrier()  # the logit of the label was read by every thread
            for i in range(tl.maximum(whole_from, whole_to), all_to):
                _spread(
                    ptr,
                    ptr,
                    i * BLOCK + offsets,
                    lead,
                    end,
                    lead + label,
                    base,
                    rest,
                    factor,
                    WIDTH,
                    SMOOTHING,
                    SOFTCAP,
                    Z_LOSS,
                    True,
                )
            for i in range(whole_from, whole_to):
                back = (whole_to - 1 + whole_from - i) * BLOCK
                _spread(
                    ptr,
                    ptr,
                    back + offsets,
                    lead,
                    end,
                    lead + label,
                    base,
                    rest,
                    factor,
                    WIDTH,
                    SMOOTHING,
                    SOFTCAP,
                    Z_LOSS,
                    False,
                )
            if ALIGN > 1:
                _spread(
                    ptr,
                    ptr,
                    offsets,
                    lead,
                    end,
                    lead + label,
                    base,
                    rest,
                    factor,
                    WIDTH,
                    SMOOTHING,
                    SOFTCAP,
                    Z_LOSS,
                    True,
                )
        else:
            tl.store(lse_ptr + 2 * row, base)
            tl.store(lse_ptr + 2 * row + 1, rest)


@triton.jit(do_not_specialize=["logits_stride"])
def gradient_kernel(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    scale_ptr,
    upstream_ptr,
    gradient_ptr,
    logits_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    IGNORE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    UPSTREAM_ROWS: tl.constexpr,
):
    # One block of a row; gradients lie densely. With ALIGN, logits do too, and both have the same boundaries.
    row = tl.program_id(0).to(tl.int64) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    label = tl.load(labels_ptr + row)
    first, lead = _start(row, logits_stride, UNIT, ALIGN)
    to_ptr = gradient_ptr + (first if ALIGN > 1 else row * WIDTH)
    end = lead + WIDTH
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    whole = (block * BLOCK >= lead) & (block * BLOCK + BLOCK <= end)
    if label == IGNORE:
        zeros = tl.zeros([BLOCK], dtype=gradient_ptr.dtype.element_ty)
        tl.store(to_ptr + offsets, zeros, mask=(offsets >= lead) & (offsets < end))
    else:
        base = tl.load(lse_ptr + 2 * row)
        rest = tl.load(lse_ptr + 2 * row + 1)
        factor = tl.load(scale_ptr) * tl.load(upstream_ptr + (row if UPSTREAM_ROWS else 0))
        factor = tl.where((label >= 0) & (label < WIDTH), factor, float("nan"))
        ptr = logits_ptr + first
        if whole:
            _spread(
                ptr,
                to_ptr,
                offsets,
                lead,
                end,
                lead + label,
                base,
                rest,
                factor,
                WIDTH,
                SMOOTHING,
                SOFTCAP,
                Z_LOSS,
                False,
            )
        else:
            _spread(
                ptr,
                to_ptr,
                offsets,
                lead,
                end,
                lead + label,
                base,
                rest,
                factor,
                WIDTH,
                SMOOTHING,
                SOFTCAP,
                Z_LOSS,
                True,
            )


@triton.jit(do_not_specialize=["num_rows"])
def reduce_kernel(
    losses_ptr,
    labels_ptr,
    items_ptr,
    loss_ptr,
    scale_ptr,
    num_rows,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SUM: tl.constexpr,
):
    # The sum of the losses over the number of items, with COUNT that of labels not ignored; and one over that number.
    count = tl.zeros([BLOCK], dtype=tl.int32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        if COUNT:
            count += (tl.load(labels_ptr + rows, mask=rows < num_rows, other=IGNORE) != IGNORE).to(tl.int32)
        if SUM:
            total += tl.load(losses_ptr + rows, mask=rows < num_rows, other=0.0)
    items = tl.sum(count, 0).to(tl.float32) if COUNT else tl.load(items_ptr)
    tl.store(scale_ptr, 1.0 / items)
    if SUM:
        tl.store(loss_ptr, tl.sum(total, 0) / items)


@triton.jit(do_not_specialize=["size"])
def multiply_kernel(factor_ptr, x_ptr, size, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    # In place; a factor of one leaves everything unread.
    program = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr)
    size = tl.full([], size, tl.int64) * UNIT
    if factor != 1.0:
        for start in range(program * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < size)
