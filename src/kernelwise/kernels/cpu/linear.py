"""The linear layer: with bfloat16 or float16 weights where torch's own product is slow, with few rows also in float32.

Up to four rows, in float32 eight: dot products that take as long as the weight takes to arrive from memory. More rows: the
weight becomes float32 panel by panel in the cache, where it is multiplied; so does the gradient of x. The gradient of the
weight goes block by block through torch's float32 product. No float32 copy is kept. Which of these is faster than torch's own
product depends on the processor and the number of rows: `_CHOICES` says how far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .._autograd import wants_graph
from ._library import direct, isa, load

_ops = load()
_forward = _ops.linear.default
_direct = direct(_forward)
_grad_x = _ops.linear_grad_x.default
_grad_weight = _ops.linear_grad_weight.default
_own = torch.nn.functional.linear

_ALL = 1 << 62
_VECTORS = 16  # the numbers of float32 that are read together
_SMALL = 1 << 14  # numbers of a weight: with fewer, the product is over before reading it matters


@dataclass(frozen=True, slots=True)
class _Choice:
    """Numbers of rows: up to `most` the products here, beyond it torch's own.

    With gradients, less than `training` rows are all torch's; from there on both gradients are computed here.
    """

    most: int
    training: int


# By instruction set in use, dtype, and what the processor has for products of that dtype in half precision. Times over
# torch 2.13's own product, one thread, shapes of SmolLM2: docs/cpu.md.
_CHOICES = {
    ("avx2", torch.bfloat16, "none"): _Choice(most=_ALL, training=4),
    ("avx2", torch.float16, "none"): _Choice(most=_ALL, training=4),
    ("avx512", torch.bfloat16, "none"): _Choice(most=_ALL, training=4),
    ("avx512", torch.float16, "none"): _Choice(most=_ALL, training=4),
    # Intel's avx512_bf16 multiplies no faster than float32
    ("avx512", torch.bfloat16, "vector"): _Choice(most=_ALL, training=48),
    # AMD's twice as fast, so what is left are rows for which the weight is read faster
    ("avx512", torch.bfloat16, "fast vector"): _Choice(most=3, training=_ALL),
    ("avx2", torch.bfloat16, "fast vector"): _Choice(most=3, training=_ALL),
    # avx512_fp16 multiplies twice as fast where the weight need not arrive from far
    ("avx512", torch.float16, "vector"): _Choice(most=32, training=_ALL),
    # reads the weight faster from memory than MKL with one row, and once where MKL reads it for every few rows
    ("avx2", torch.float32, "none"): _Choice(most=8, training=_ALL),
    ("avx512", torch.float32, "none"): _Choice(most=1, training=_ALL),
}
_UNITS = {  # the best first
    torch.bfloat16: {
        "amx_bf16": "matrix",
        "avx512_bf16_at_double_rate": "fast vector",
        "avx512_bf16": "vector",
    },
    torch.float16: {"amx_fp16": "matrix", "avx512_fp16": "vector"},
}


def units(dtype: torch.dtype) -> str:
    """Return what the processor has for products of a dtype in half precision: "matrix", "fast vector", "vector" or "none".

    A fast vector unit multiplies twice as many of them at a time as of float32, another one no more.
    """
    names = _ops.cpu_half_products.default().split()
    found = next((unit for name, unit in _UNITS.get(dtype, {}).items() if name in names), "none")
    return "none" if found == "vector" and isa() != "avx512" else found


_chosen = {dtype: _CHOICES.get((isa(), dtype, units(dtype))) for dtype in (torch.float32, *_UNITS)}


def why_not_worthwhile(dtype: torch.dtype) -> str | None:
    """Return why torch's own product of this dtype is left alone on this processor; None where the kernel is faster."""
    if dtype not in _chosen:
        return f"it is made for float32, bfloat16 and float16 weights, not {dtype}"
    if _chosen[dtype] is not None:
        return None
    if units(dtype) == "matrix":
        return f"this processor multiplies {str(dtype).removeprefix('torch.')} matrices natively ({next(iter(_UNITS[dtype]))})"
    return f"it was not measured on processors without AVX2 (instruction set in use: {isa()})"


def gains_from(dtype: torch.dtype) -> int:
    """Return from how many numbers of weights on this may be faster than torch's own product; 0 where always."""
    return _SMALL if dtype == torch.float32 else 0


def gains_in_training(dtype: torch.dtype) -> bool:
    """Return whether anything is computed here where gradients are needed, or all of that is torch's."""
    choice = _chosen.get(dtype)
    return choice is not None and choice.training < _ALL


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, computed in float32 and rounded once, as `torch.nn.functional.linear` gives it.

    `x` is [..., in], `weight` [out, in], `bias` [out] or None, all of one dtype: float32, bfloat16 or float16. Other dtypes,
    numbers of rows for which torch's own product is faster here, and float32 with gradients or under autocast go to torch. No
    float32 copy outlives the call.
    """
    dtype = weight.dtype
    choice = _chosen.get(dtype)
    if choice is None or x.dtype != dtype:
        return _own(x, weight, bias)
    if dtype == torch.float32:
        return _in_float32(x, weight, bias, choice)
    if is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        if _num_rows(x) < choice.training:
            return _own(x, weight, bias)
        y: torch.Tensor = _Linear.apply(x, weight, bias, choice)  # type: ignore[no-untyped-call]
        return y
    return _product(x, weight, bias, choice)


def _in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, choice: _Choice) -> torch.Tensor:
    """Here where a weight is read faster than by torch: whole vectors wide, few rows, and not so small that it is no matter.

    Faster from memory, that is, as in a model that fits no cache; from the cache MKL reads one row as fast or faster.
    """
    if weight.numel() < _SMALL:
        return _own(x, weight, bias)
    width = weight.size(-1)
    rows = x.numel() // (width or 1)
    if (
        rows > choice.most
        or width % _VECTORS
        or (
            is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        or torch.is_autocast_enabled("cpu")
    ):
        return _own(x, weight, bias)
    return _kernel(x, weight, bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, choice: _Choice) -> torch.Tensor:
    return _own(x, weight, bias) if _num_rows(x) > choice.most else _kernel(x, weight, bias)


def _kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    forward = _forward if is_dynamo_compiling() else _direct
    y: torch.Tensor = forward(x, weight) if bias is None else forward(x, weight, bias)
    return y


def _num_rows(x: torch.Tensor) -> int:
    return x.numel() // (x.shape[-1] or 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, choice: _Choice
    ) -> torch.Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _product(x, weight, bias, choice)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if wants_graph():
            dx = grad @ weight if need_x else None
            dw = grad.flatten(0, -2).t() @ x.flatten(0, -2) if need_weight else None
        else:
            dx = _grad_x(grad, weight) if need_x else None
            dw = _grad_weight(grad, x) if need_weight else None
        db = grad.reshape(_num_rows(grad), grad.shape[-1]).sum(0) if need_bias else None
        return dx, dw, db, None
