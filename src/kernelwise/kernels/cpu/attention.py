"""Scaled dot-product attention in C++, forward; with gradients, torch's own in float32.

torch's own is one operator too. Without instructions for half precision it multiplies bfloat16 and float16 by loops, and with
`is_causal` it computes most of what the mask hides. So this one is faster in half precision, where the mask is causal, and
for few rows; what is left goes to torch.
"""

from __future__ import annotations

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ._library import direct, isa, load
from .linear import units

_forward = load().attention.default
_direct = direct(_forward)
_own = torch.nn.functional.scaled_dot_product_attention

_FEW_ROWS = 8  # of the heads that share their keys: they are not laid out first
_CAUSAL_POSITIONS = 128  # from which leaving out what the mask hides pays in float32
_TRAINING = 8  # positions from which gradients by way of float32 are faster than torch's own in half precision


def why_not_worthwhile(dtype: torch.dtype) -> str | None:
    """Return why torch's own attention is left alone for a dtype on this processor; None where the kernel is faster."""
    if isa() not in ("avx2", "avx512"):
        return f"it is made for processors with AVX2 (instruction set in use: {isa()})"
    if dtype != torch.float32 and units(dtype) == "matrix":
        return f"this processor multiplies {str(dtype).removeprefix('torch.')} matrices natively"
    return None


_DTYPES = frozenset(t for t in (torch.float32, torch.bfloat16, torch.float16) if why_not_worthwhile(t) is None)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T scale + mask) v, computed in float32 and rounded once.

    `q` is [B, Hq, S, D], `k` [B, Hk, T, D] and `v` [B, Hk, T, Dv] with Hq a multiple of Hk: heads in a row share keys and
    values. One dtype (float32, bfloat16, float16), any strides (copied where the last is not 1). `mask` is [B or 1, Hq or 1,
    S or 1, T], bool (False is not seen) or added to the scores (float32 or q's dtype). With `causal`, position i sees the
    keys up to i. `scale` is 1 / sqrt(D) unless given. A row that sees nothing is zero. The result is [B, Hq, S, Dv] in q's
    dtype and lies in memory as [B, S, Hq, Dv].

    With gradients, and where torch's own is as fast, that one computes, in half precision from copies in float32. Raises
    RuntimeError for other shapes and dtypes.
    """
    dtype = q.dtype
    if dtype not in _DTYPES:
        return plain(q, k, v, mask, causal, scale)
    if is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (mask is not None and mask.requires_grad)
    ):
        if dtype == torch.float32 or q.shape[2] < _TRAINING:
            return plain(q, k, v, mask, causal, scale)
        added = mask if mask is None or mask.dtype == torch.bool else mask.float()
        return plain(q.float(), k.float(), v.float(), added, causal, scale).to(dtype)
    if dtype == torch.float32 and q.dim() == 4:
        _, heads, rows, _ = q.shape
        if rows * heads > _FEW_ROWS * k.shape[1] and not (causal and rows >= _CAUSAL_POSITIONS):
            return plain(q, k, v, mask, causal, scale)
    forward = _forward if is_dynamo_compiling() else _direct
    if mask is None and not causal:
        y: torch.Tensor = forward(q, k, v, scale)  # the most common call with few rows; two arguments less save 0.3 us
    else:
        y = forward(q, k, v, scale, mask, causal)
    return y


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """The same by torch's own operator."""
    if mask is not None:
        if causal:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        if mask.dtype not in (torch.bool, q.dtype):
            mask = mask.to(q.dtype)
    return _own(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=True)
