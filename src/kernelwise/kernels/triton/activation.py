"""An activation by itself, elementwise and rounded once, forward and backward.

PyTorch has SiLU and GELU as single operators that are as fast as memory allows. This is for the forms that models write
out in several (`gelu_new`, `gelu_fast`, `gelu_python`, `quick_gelu`), each of which passes over memory again. Backward
computes the activation again instead of keeping anything but the input.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import NAMESPACE, Launcher, Launchers, check, needs_grad, watched
from .gated_activation import _activate, _load, _store

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What each name is in exact arithmetic; they differ in how often a narrow dtype is rounded on the way.
MEANING = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
}


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "quick_gelu":  # x * sigmoid(1.702 x) is silu(1.702 x) / 1.702
        y, slope = _activate(x * 1.702, "silu")
        return y * (1.0 / 1.702), slope
    else:
        return _activate(x, ACTIVATION)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    x_ptr,
    y_ptr,
    size,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.full([], size, tl.int64) * UNIT
    y, _ = _value_and_slope(_load(x_ptr, offsets, inside, EXACT), ACTIVATION)
    _store(y_ptr, offsets, y, inside, EXACT)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    size,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.full([], size, tl.int64) * UNIT
    _, slope = _value_and_slope(_load(x_ptr, offsets, inside, EXACT), ACTIVATION)
    _store(dx_ptr, offsets, _load(dy_ptr, offsets, inside, EXACT) * slope, inside, EXACT)


_forward_launchers = Launchers()
_backward_launchers = Launchers()


def _run(launchers: Launchers, kernel: Any, activation: str, tensors: tuple[Tensor, ...], traced: Any) -> None:
    """Run `kernel` over dense tensors that lie alike."""
    x = tensors[0]
    size: Any = x.numel()
    # A symbolic number of elements (while compiling) is never exact, and large: anything else would be a guard on it.
    counted = isinstance(size, int)
    if counted and size == 0:
        return
    unit = 1 if size % 16 else 16
    block = 512 if counted and size <= 1 << 20 else 1024
    exact = counted and size % block == 0
    key = (x.get_device(), x.dtype, activation, unit, block, exact)
    launcher = launchers.get(key)
    if launcher is None:
        check(x.dtype in DTYPES, lambda: f"activation takes float32, bfloat16 or float16, not {x.dtype}")
        check(activation in MEANING, lambda: f"activation is one of {', '.join(MEANING)}, not {activation!r}")
        launcher = launchers[key] = Launcher(
            kernel, block, ACTIVATION=MEANING[activation], UNIT=unit, BLOCK=block, EXACT=exact, num_warps=4
        )
    launcher((size + block - 1) // block, 1, tensors, (size // unit,), traced)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements of x fill one piece of memory, in whatever order of dimensions."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x).stride()


def _forward(x: Tensor, activation: str, traced: Any = None) -> Tensor:
    x = x if _is_dense(x) else x.contiguous()
    y = torch.empty_like(x)
    _run(_forward_launchers, _forward_kernel, activation, (x, y), traced)
    return y


def _backward(dy: Tensor, x: Tensor, activation: str, traced: Any = None) -> Tensor:
    x = x if _is_dense(x) else x.contiguous()
    dx = torch.empty_like(x)
    if dy.stride() != x.stride():
        dy = dx.new_empty_strided(dx.shape, dx.stride(), dtype=dy.dtype).copy_(dy)
    _run(_backward_launchers, _backward_kernel, activation, (dy, x, dx), traced)
    return dx


def _plain(x: Tensor, activation: str) -> Tensor:
    wide = x.float()
    meaning = MEANING[activation]
    if meaning == "silu":
        return torch.nn.functional.silu(wide).to(x.dtype)
    if meaning == "quick_gelu":
        return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)
    approximate = "tanh" if meaning == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _forward(x, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            return *torch.autograd.grad(_plain(x, ctx.activation), x, dy, create_graph=True), None
        return _backward(dy, x, ctx.activation), None


@torch.library.triton_op(f"{NAMESPACE}::activation", mutates_args={})
def _operation(x: Tensor, activation: str) -> Tensor:
    return _forward(x.contiguous(), activation, torch.library.wrap_triton(_forward_kernel))


@torch.library.triton_op(f"{NAMESPACE}::activation_backward", mutates_args={})
def _backward_operation(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    kernel = torch.library.wrap_triton(_backward_kernel)
    return _backward(dy.contiguous(), x.contiguous(), activation, kernel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _operation_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_operation(dy, *ctx.saved_tensors, ctx.activation), None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def activation(x: Tensor, *, activation: str = "gelu") -> Tensor:
    """The activation of every element of x, of any shape and strides, computed in float32 and rounded once.

    `activation` is "silu", "gelu" (the erf form), "gelu_tanh", "quick_gelu", or another name of one of them, "gelu_new",
    "gelu_fast" or "gelu_python". x is float32, bfloat16 or float16. Raises ValueError for anything else.
    """
    if watched(x):
        y: Tensor = _operation(x, activation)
        return y
    if needs_grad(x):
        y = _Function.apply(x, activation)
        return y
    return _forward(x, activation)
