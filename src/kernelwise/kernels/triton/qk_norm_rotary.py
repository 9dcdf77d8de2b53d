"""RMS norm of every head of queries and keys, then rotary embedding (half layout), all in one launch, and backward.

A program handles one token and a share of its heads, as in `rotary`; a head is normalised and rotated in registers, and
rounded once. Backward keeps nothing but the inputs: programs go through the tokens, normalise again, and keep their part
of the gradients of the two weights in registers; a second kernel adds one partial row per program.
"""
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .._autograd import plain_gradients
from . import rms_norm as norm
from . import rotary as turn
from ._head_configs import qk_norm_rotary_backward_config, size_class
from ._launch import (
    MOST_Y,
    NAMESPACE,
    Launcher,
    Launchers,
    batches,
    check,
    fresh,
    needs_grad,
    num_processors,
    power_of_2,
    unit_of,
    watched,
)
from ._norm_configs import stages
from ._norm_kernels import sum_partials_kernel
from ._qk_norm_rotary_kernels import backward_kernel, forward_kernel

_SHARES_FEW = 8  # into how many programs the heads of one token are cut, with few tokens
_PARTIAL_COLUMNS = 32


_forward_launchers = Launchers()
_backward_launchers = Launchers()
_sum_launchers = Launchers()


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, dim: int) -> None:
    turn._check(q, k, cos, sin, dim)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check(
            weight.shape == q.shape[3:] and weight.device == q.device,
            lambda n=name, w=weight: f"{n} is [{q.shape[3]}] on {q.device}, not {tuple(w.shape)} on {w.device}",
        )
        check(
            weight.dtype == q_weight.dtype and weight.dtype in (q.dtype, torch.float32),
            lambda n=name, w=weight: f"both weights have the dtype of q ({q.dtype}) or float32; {n} is {w.dtype}",
        )


def _dtype(q: Tensor, weight: Tensor, cos: Tensor, cast: str) -> torch.dtype:
    """The dtype of the results: what the norm gives, promoted with that of cos."""
    normed = torch.promote_types(q.dtype, weight.dtype) if cast == "before" else q.dtype
    return torch.promote_types(normed, cos.dtype)


def _by_token(x: Tensor, dim: int) -> tuple[Tensor, tuple[int, int, int]]:
    """x with unit last stride, and its strides of batch, head and token."""
    x = x if x.stride(3) == 1 else x.contiguous()
    first, second, third, _ = x.stride()
    return x, (first, second, third) if dim == 1 else (first, third, second)


def _results(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of x that lies as [batch, token, head, column]."""
    batch, second, third, width = x.shape
    if dim == 2:
        return fresh(x, (batch, second, third, width), dtype)
    return x.new_empty_strided(x.shape, (second * third * width, width, second * width, 1), dtype=dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast: str,
    dim: int,
    traced: Any = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, q_weight, k_weight, cos, sin, dim)
    dtype = _dtype(q, q_weight, cos, cast)
    batch, num_tokens = q.shape[0], q.shape[3 - dim]
    q_heads, k_heads, width = int(q.shape[dim]), int(k.shape[dim]), int(q.shape[3])
    q_out, k_out = _results(q, dim, dtype), _results(k, dim, dtype)
    total: Any = batch * num_tokens
    counted = isinstance(total, int)
    if counted and total == 0:
        return q_out, k_out
    q, q_strides = _by_token(q, dim)
    k, k_strides = _by_token(k, dim)
    cos, sin = cos.contiguous(), sin.contiguous()
    strides = (*q_strides, *k_strides, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    unit = unit_of(*strides)
    device = q.get_device()
    many = not counted or total > 2 * num_processors(device)
    key = (device, q.dtype, q_weight.dtype, cos.dtype, dtype, q_heads, k_heads, width, unit, many, eps, offset)
    launcher = _forward_launchers.get(key)
    if launcher is None:
        block = power_of_2(width // 2)
        shares = 1 if many else min(_SHARES_FEW, power_of_2(max(q_heads, k_heads)))
        q_share, k_share = (power_of_2(-(-n // shares)) for n in (q_heads, k_heads))
        launcher = _forward_launchers[key] = Launcher(
            forward_kernel,
            shares,
            EPS=float(eps),
            OFFSET=float(offset),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            SHARES=shares,
            Q_SHARE=q_share,
            K_SHARE=k_share,
            BLOCK=block,
            HALF=width // 2,
            UNIT=unit,
            num_warps=max(1, min(4, q_share * block // 256)),
        )
    weights = (q_weight.contiguous(), k_weight.contiguous())
    numbers = [s // unit for s in strides]
    for count, part in batches(batch, MOST_Y // launcher.size, q, k, cos, sin, q_out, k_out):
        launcher(num_tokens, count * launcher.size, (*part[:2], *weights, *part[2:]), numbers, traced)
    return q_out, k_out


def _backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and k, and those of the two weights one behind the other."""
    batch, num_tokens = q.shape[0], q.shape[3 - dim]
    q_heads, k_heads, width = int(q.shape[dim]), int(k.shape[dim]), int(q.shape[3])
    q_out, k_out = _results(q, dim, q.dtype), _results(k, dim, k.dtype)
    dweights = fresh(q_weight, (2 * width,))
    total = batch * num_tokens
    if total == 0:
        return q_out, k_out, dweights.zero_()
    all_strides: list[int] = []
    tensors = []
    for tensor in (dq, dk, q, k):
        tensor, strides = _by_token(tensor, dim)
        tensors.append(tensor)
        all_strides += strides
    cos, sin = cos.contiguous(), sin.contiguous()
    all_strides += (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    unit = unit_of(*all_strides)
    device = q.get_device()
    size = size_class(total)
    key = (device, dq.dtype, q.dtype, q_weight.dtype, cos.dtype, q_heads, k_heads, width, unit, size, eps, offset)
    config = qk_norm_rotary_backward_config(device, q_heads, k_heads, width, size)
    launcher = _backward_launchers.get(key)
    if launcher is None:
        block = power_of_2(width // 2)
        q_all, k_all = power_of_2(q_heads), power_of_2(k_heads)
        stage_bytes = (q_all + k_all) * 2 * block * (dq.element_size() + q.element_size())
        launcher = _backward_launchers[key] = Launcher(
            backward_kernel,
            1,
            EPS=float(eps),
            OFFSET=float(offset),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            Q_ALL=q_all,
            K_ALL=k_all,
            BLOCK=block,
            HALF=width // 2,
            UNIT=unit,
            STAGES=stages(config.stages, device, config.programs * stage_bytes),
            num_warps=config.warps,
        )
    grid = min(config.programs * num_processors(device), total)
    partials = fresh(q, (grid, 2 * width), torch.float32)
    numbers = (batch, num_tokens, *(s // unit for s in all_strides))
    tensors += (q_weight.contiguous(), k_weight.contiguous(), cos, sin, q_out, k_out, partials)
    launcher(grid, 1, tensors, numbers)
    adding = _sum_launchers.get((device, width, dweights.dtype))
    if adding is None:
        adding = _sum_launchers[device, width, dweights.dtype] = Launcher(
            sum_partials_kernel, _PARTIAL_COLUMNS, WIDTH=2 * width, COLUMNS=_PARTIAL_COLUMNS, CHUNK=256, num_warps=8
        )
    adding(triton.cdiv(2 * width, _PARTIAL_COLUMNS), 1, (partials, dweights), (grid,))
    return q_out, k_out, dweights


def _plain(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast: str,
    dim: int,
) -> tuple[Tensor, Tensor]:
    q, k = norm._plain(q, q_weight, eps, offset, cast), norm._plain(k, k_weight, eps, offset, cast)
    return turn._plain(q, k, cos, sin, dim)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        offset: float,
        cast: str,
        dim: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.options = (eps, offset, cast, dim)
        return _forward(q, k, q_weight, k_weight, cos, sin, eps, offset, cast, dim)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        eps, offset, cast, dim = ctx.options
        nothing = (None,) * 6
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            plain = partial(_plain, cos=cos, sin=sin, eps=eps, offset=offset, cast=cast, dim=dim)
            return *plain_gradients(plain, (q, k, q_weight, k_weight), (dq, dk)), *nothing
        dq, dk, dweights = _backward(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, dim)
        return dq, dk, *dweights.chunk(2), *nothing


@torch.library.triton_op(f"{NAMESPACE}::qk_norm_rotary", mutates_args={})
def _operation(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    cast: str,
    dim: int,
) -> tuple[Tensor, Tensor]:
    kernel = torch.library.wrap_triton(forward_kernel)
    return _forward(q, k, q_weight, k_weight, cos, sin, float(eps), float(offset), cast, dim, kernel)


# Opaque, unlike the others: with symbolic sizes, Inductor (torch 2.11) fails to take a kernel of this many strides apart.
@torch.library.custom_op(f"{NAMESPACE}::qk_norm_rotary_backward", mutates_args=())
def _backward_operation(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, offset, dim)


@_backward_operation.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, dim, q.dtype), _results(k, dim, k.dtype), q_weight.new_empty(2 * q.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.eps, ctx.offset, _, ctx.dim = inputs[6:]


def _operation_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dweights = _backward_operation(dq, dk, *ctx.saved_tensors, ctx.eps, ctx.offset, ctx.dim)
    return dq, dk, *dweights.chunk(2), None, None, None, None, None, None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    cast: norm.Cast = "before",
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`rotary` of `rms_norm` of q and k over their last dimension, computed in float32 and rounded once.

    `q` [B, Hq, S, D] and `k` [B, Hk, S, D], or heads and tokens swapped (`unsqueeze_dim=2`), and `cos` and `sin` are as
    for `rotary`; `q_weight` and `k_weight` [D], of the dtype of q or float32, `offset` and `cast` as for `rms_norm`
    (`cast` decides the dtype of the results alone). The results lie in memory as [B, S, H, D]. Where cos or sin needs a
    gradient, the plain formula is computed instead. Raises ValueError for anything else.
    """
    check(cast in ("before", "after"), lambda: f"cast is 'before' or 'after', not {cast!r}")
    check(unsqueeze_dim in (1, 2), lambda: f"unsqueeze_dim is 1 or 2, not {unsqueeze_dim}")
    arguments = (q, k, q_weight, k_weight, cos, sin, eps, offset, cast, unsqueeze_dim)
    if needs_grad(cos, sin):
        return _plain(*arguments)
    if watched(q, k, q_weight, k_weight, cos, sin):
        results: tuple[Tensor, Tensor] = _operation(*arguments)
        return results
    if needs_grad(q, k, q_weight, k_weight):
        results = _Function.apply(*arguments)
        return results
    return _forward(*arguments)
