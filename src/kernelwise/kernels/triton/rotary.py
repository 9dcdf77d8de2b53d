"""Rotary position embedding of queries and keys in one launch (half layout), forward and backward.

With x = (x1, x2) along the last dimension: y = (x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2). The backward pass is the
same kernel with the two halves of sin swapped and negated. A program handles one token and a share of its heads: all of
them where there are many tokens, few where there are few, so that a single token still uses several multiprocessors.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._head_configs import rotary_config, size_class
from ._launch import (
    MOST_Y,
    NAMESPACE,
    Launcher,
    Launchers,
    batches,
    check,
    needs_grad,
    num_processors,
    power_of_2,
    unit_of,
    watched,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_WIDTH = 1024


@triton.jit
def _rotate(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride,
    k_stride,
    share,
    cos1,
    cos2,
    sin1,
    sin2,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """A share of the heads of one token. All is read before anything is written: more reads are under way at once."""
    columns = tl.arange(0, BLOCK)[None, :]
    q_heads = share * Q_SHARE + tl.arange(0, Q_SHARE)[:, None]
    k_heads = share * K_SHARE + tl.arange(0, K_SHARE)[:, None]
    q_inside = (q_heads < Q_HEADS) & (columns < HALF)
    k_inside = (k_heads < K_HEADS) & (columns < HALF)
    q = q_ptr + q_heads * q_stride + columns
    k = k_ptr + k_heads * k_stride + columns
    q1 = tl.load(q, mask=q_inside, other=0.0).to(tl.float32)
    q2 = tl.load(q + HALF, mask=q_inside, other=0.0).to(tl.float32)
    k1 = tl.load(k, mask=k_inside, other=0.0).to(tl.float32)
    k2 = tl.load(k + HALF, mask=k_inside, other=0.0).to(tl.float32)
    q_out = q_out_ptr + q_heads * (2 * HALF) + columns
    k_out = k_out_ptr + k_heads * (2 * HALF) + columns
    tl.store(q_out, (q1 * cos1 - q2 * sin1).to(q_out_ptr.dtype.element_ty), mask=q_inside)
    tl.store(q_out + HALF, (q2 * cos2 + q1 * sin2).to(q_out_ptr.dtype.element_ty), mask=q_inside)
    tl.store(k_out, (k1 * cos1 - k2 * sin1).to(k_out_ptr.dtype.element_ty), mask=k_inside)
    tl.store(k_out + HALF, (k2 * cos2 + k1 * sin2).to(k_out_ptr.dtype.element_ty), mask=k_inside)


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
def _kernel(
    q_ptr,
    k_ptr,
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
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    Q_SHARE: tl.constexpr,
    K_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // SHARES).to(tl.int64)
    share = tl.program_id(1) % SHARES
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = batch * (cos_batch_stride * UNIT) + token * (cos_token_stride * UNIT) + columns
    inside = columns < HALF
    cos1 = tl.load(cos_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        swapped = -sin1
        sin1 = -sin2
        sin2 = swapped
    place = batch * tl.num_programs(0) + token  # outputs lie as [batch, token, head, column]
    q = q_ptr + batch * (q_batch_stride * UNIT) + token * (q_token_stride * UNIT)
    k = k_ptr + batch * (k_batch_stride * UNIT) + token * (k_token_stride * UNIT)
    q_out = q_out_ptr + place * (Q_HEADS * 2 * HALF)
    k_out = k_out_ptr + place * (K_HEADS * 2 * HALF)
    q_stride = tl.full([], q_head_stride, tl.int64) * UNIT
    k_stride = tl.full([], k_head_stride, tl.int64) * UNIT
    _rotate(
        q, k, q_out, k_out, q_stride, k_stride, share, cos1, cos2, sin1, sin2, Q_HEADS, K_HEADS, Q_SHARE, K_SHARE,
        BLOCK, HALF,
    )  # fmt: skip


_launchers = Launchers()


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int) -> None:
    tokens = 3 - unsqueeze_dim
    check(
        q.device == k.device == cos.device == sin.device,
        lambda: f"q, k, cos and sin are on {q.device}, {k.device}, {cos.device} and {sin.device}",
    )
    check(
        q.dtype in DTYPES and k.dtype == q.dtype,
        lambda: f"rotary takes q and k of one dtype, float32, bfloat16 or float16, not {q.dtype} and {k.dtype}",
    )
    check(
        cos.dtype == sin.dtype and cos.dtype in (q.dtype, torch.float32),
        lambda: f"cos and sin have the dtype of q ({q.dtype}) or float32, not {cos.dtype} and {sin.dtype}",
    )
    check(
        k.shape[0] == q.shape[0] and k.shape[tokens] == q.shape[tokens] and k.shape[3] == q.shape[3],
        lambda: f"q {tuple(q.shape)} and k {tuple(k.shape)} may differ only in the number of heads",
    )
    check(
        sin.shape == cos.shape and cos.shape[0] in (1, q.shape[0]) and cos.shape[1:] == (q.shape[tokens], q.shape[3]),
        lambda: f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}",
    )
    check(
        q.shape[3] % 2 == 0 and q.shape[3] <= MAX_HEAD_WIDTH,
        lambda: f"the head width is even and at most {MAX_HEAD_WIDTH}, not {q.shape[3]}",
    )


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    dtype: torch.dtype,
    backward: bool,
    traced: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k into fresh tensors of `dtype` that lie as [batch, token, head, column]."""
    if unsqueeze_dim == 1:
        batch, q_heads, num_tokens, width = q.shape
        k_batch, k_heads, k_tokens, k_width = k.shape
    else:
        batch, num_tokens, q_heads, width = q.shape
        k_batch, k_tokens, k_heads, k_width = k.shape
    cos_batch, cos_tokens, cos_width = cos.shape
    device = q.get_device()
    if (
        k_batch != batch or k_tokens != num_tokens or k_width != width or sin.shape != cos.shape
        or cos_tokens != num_tokens or cos_width != width or (cos_batch != 1 and cos_batch != batch)
        or k.get_device() != device or cos.get_device() != device or sin.get_device() != device
    ):  # fmt: skip
        _check(q, k, cos, sin, unsqueeze_dim)
    q_heads, k_heads, width = int(q_heads), int(k_heads), int(width)
    row_q, row_k = q_heads * width, k_heads * width
    if unsqueeze_dim == 1:
        q_out = q.new_empty_strided(q.shape, (num_tokens * row_q, width, row_q, 1), dtype=dtype)
        k_out = k.new_empty_strided(k.shape, (num_tokens * row_k, width, row_k, 1), dtype=dtype)
    else:
        q_out = q.new_empty_strided(q.shape, (num_tokens * row_q, row_q, width, 1), dtype=dtype)
        k_out = k.new_empty_strided(k.shape, (num_tokens * row_k, row_k, width, 1), dtype=dtype)
    total: Any = batch * num_tokens
    counted = isinstance(total, int)
    if counted and total == 0:
        return q_out, k_out
    q_strides, k_strides, cos_strides = q.stride(), k.stride(), cos.stride()
    if q_strides[3] != 1:
        q = q.contiguous()
        q_strides = q.stride()
    if k_strides[3] != 1:
        k = k.contiguous()
        k_strides = k.stride()
    if cos_strides != sin.stride() or cos_strides[2] != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
        cos_strides = cos.stride()
    q0, q1, q2, _ = q_strides
    k0, k1, k2, _ = k_strides
    if unsqueeze_dim == 2:
        q1, q2, k1, k2 = q2, q1, k2, k1
    c0, c1 = (0 if cos_batch == 1 else cos_strides[0]), cos_strides[1]
    unit = unit_of(q0, q1, q2, k0, k1, k2, c0, c1)
    many = not counted or total > 2 * num_processors(device)
    size = size_class(total)
    key = (device, q.dtype, cos.dtype, dtype, q_heads, k_heads, width, unit, size, many, backward)
    launcher = _launchers.get(key)
    if launcher is None:
        if not backward:
            _check(q, k, cos, sin, unsqueeze_dim)
        config = rotary_config(device, q_heads, k_heads, width, size, many, backward)
        q_share, k_share = (power_of_2(-(-n // config.shares)) for n in (q_heads, k_heads))
        launcher = _launchers[key] = Launcher(
            _kernel,
            config.shares,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            SHARES=config.shares,
            Q_SHARE=q_share,
            K_SHARE=k_share,
            BLOCK=power_of_2(width // 2),
            HALF=width // 2,
            UNIT=unit,
            BACKWARD=backward,
            num_warps=config.warps,
        )
    numbers = (q0 // unit, q1 // unit, q2 // unit, k0 // unit, k1 // unit, k2 // unit, c0 // unit, c1 // unit)
    if batch * launcher.size <= MOST_Y:  # the one launch that nearly every call is
        launcher(num_tokens, batch * launcher.size, (q, k, cos, sin, q_out, k_out), numbers, traced)
        return q_out, k_out
    for count, part in batches(batch, MOST_Y // launcher.size, q, k, cos, sin, q_out, k_out):
        launcher(num_tokens, count * launcher.size, part, numbers, traced)
    return q_out, k_out


def _plain(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q), rotate(k)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim, ctx.dtype = unsqueeze_dim, q.dtype
        return _run(q, k, cos, sin, unsqueeze_dim, torch.promote_types(q.dtype, cos.dtype), False)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            back = -torch.cat(sin.chunk(2, dim=-1)[::-1], dim=-1)
            dq, dk = _plain(dq, dk, cos, back, ctx.unsqueeze_dim)
            return dq.to(ctx.dtype), dk.to(ctx.dtype), None, None, None
        return *_run(dq, dk, cos, sin, ctx.unsqueeze_dim, ctx.dtype, True), None, None, None


@torch.library.triton_op(f"{NAMESPACE}::rotary", mutates_args={})
def _operation(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    return _run(q, k, cos, sin, unsqueeze_dim, dtype, False, torch.library.wrap_triton(_kernel))


@torch.library.triton_op(f"{NAMESPACE}::rotary_backward", mutates_args={})
def _backward_operation(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(dq, dk, cos, sin, unsqueeze_dim, dtype, True, torch.library.wrap_triton(_kernel))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, _, cos, sin, ctx.unsqueeze_dim = inputs
    ctx.dtype = q.dtype
    ctx.save_for_backward(cos, sin)


def _operation_backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *_backward_operation(dq, dk, cos, sin, ctx.unsqueeze_dim, ctx.dtype), None, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q * cos + rotate_half(q) * sin, and the same for k, computed in float32 and rounded once.

    `q` is [B, Hq, S, D] and `k` [B, Hk, S, D] (`unsqueeze_dim=1`), or heads and tokens swapped (`unsqueeze_dim=2`), of
    one dtype (float32, bfloat16, float16), with any strides; D is even and at most 1024. `cos` and `sin` are [B, S, D]
    or [1, S, D], of that dtype or float32; their second half need not repeat the first. The results have the dtype to
    which PyTorch promotes q and cos and lie in memory as [B, S, H, D]. Where cos or sin needs a gradient, the plain
    formula is computed instead. Raises ValueError for anything else.
    """
    if needs_grad(cos, sin):
        return _plain(q, k, cos, sin, unsqueeze_dim)
    if watched(q, k, cos, sin):
        results: tuple[torch.Tensor, torch.Tensor] = _operation(q, k, cos, sin, unsqueeze_dim)
        return results
    if needs_grad(q, k):
        results = _Function.apply(q, k, cos, sin, unsqueeze_dim)
        return results
    return _run(q, k, cos, sin, unsqueeze_dim, torch.promote_types(q.dtype, cos.dtype), False)
