"""act(gate) * up, elementwise and rounded once, forward and backward: the middle of a gated MLP.

Contiguous inputs are one flat run of elements; anything else, such as the halves of a packed projection, is cut by rows
and read where it lies. The backward pass computes the activation again instead of keeping it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from .._autograd import plain_gradients
from ._launch import NAMESPACE, Launcher, Launchers, check, fresh, needs_grad, rows_of, unit_of, watched

Activation = Literal["silu", "gelu", "gelu_tanh"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NO_STRIDES = {2: (0, 0), 3: (0, 0, 0)}


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each exact near zero; their sum is one."""
    decay = tl.exp2(tl.abs(x) * -1.4426950408889634)
    large = 1.0 / (1.0 + decay)
    small = decay * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x); the compiler drops what is not used."""
    if ACTIVATION == "silu":
        s, rest = _sigmoids(x)
        y = x * s
        slope = s + y * rest
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        y = x * cdf
        slope = cdf + x * (0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817))
    else:  # x * (1 + tanh(u)) / 2 is x * sigmoid(2u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
        square = x * x
        s, rest = _sigmoids(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        y = x * s
        slope = s + y * rest * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return y, slope


@triton.jit
def _place(BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The row and the offsets in it that this program handles; neighbouring programs take neighbouring memory."""
    program = tl.program_id(0).to(tl.int64)
    if BLOCKS == 0:  # one long row
        row = tl.zeros([], dtype=tl.int64)
    else:
        row = program // BLOCKS
        program = program % BLOCKS
    return row, program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(ptr, offsets, inside, EXACT: tl.constexpr):
    if EXACT:
        return tl.load(ptr + offsets).to(tl.float32)
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offsets, values, inside, EXACT: tl.constexpr):
    if EXACT:
        tl.store(ptr + offsets, values.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "gate_stride", "up_stride"])
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    size,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
):
    # `size` is the number of all elements or, by rows (BLOCKS of them each), of columns; in units, as the strides are.
    row, offsets = _place(BLOCK, BLOCKS)
    size = tl.full([], size, tl.int64) * UNIT
    inside = offsets < size
    gate = _load(gate_ptr, row * (gate_stride * UNIT) + offsets, inside, EXACT)
    up = _load(up_ptr, row * (up_stride * UNIT) + offsets, inside, EXACT)
    y, _ = _activate(gate, ACTIVATION)
    _store(y_ptr, row * size + offsets, y * up, inside, EXACT)


@triton.jit(do_not_specialize=["size", "dy_stride", "gate_stride", "up_stride"])
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    size,
    dy_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
):
    row, offsets = _place(BLOCK, BLOCKS)
    size = tl.full([], size, tl.int64) * UNIT
    inside = offsets < size
    dy = _load(dy_ptr, row * (dy_stride * UNIT) + offsets, inside, EXACT)
    gate = _load(gate_ptr, row * (gate_stride * UNIT) + offsets, inside, EXACT)
    up = _load(up_ptr, row * (up_stride * UNIT) + offsets, inside, EXACT)
    y, slope = _activate(gate, ACTIVATION)
    _store(dgate_ptr, row * size + offsets, dy * up * slope, inside, EXACT)
    _store(dup_ptr, row * size + offsets, dy * y, inside, EXACT)


_forward_launchers = Launchers()
_backward_launchers = Launchers()


def _check(gate: torch.Tensor, up: torch.Tensor) -> None:
    check(up.dtype == gate.dtype, lambda: f"gate is {gate.dtype} and up is {up.dtype}; they must be of one dtype")
    check(up.shape == gate.shape, lambda: f"gate has shape {tuple(gate.shape)}, up has {tuple(up.shape)}")
    check(up.device == gate.device, lambda: f"gate is on {gate.device}, up on {up.device}")


def _launch(
    launchers: Launchers,
    kernel: Any,
    activation: str,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    flat: bool,
    traced: Any,
) -> None:
    """Run `kernel` over inputs of one shape, as one run of elements if `flat`, else by rows; outputs are contiguous."""
    first = inputs[0]
    total: Any = outputs[0].numel()
    # A symbolic number of elements (while compiling) is never exact, and large: anything else would be a guard on it.
    counted = isinstance(total, int)
    few = counted and total <= 1 << 20
    if flat:
        size, width, num_rows = total, 0, 1
        strides = _NO_STRIDES[len(inputs)]
        unit = 1 if total % 16 else 16
        block = 512 if few or not counted or total > 1 << 24 else 1024
        exact = counted and total % block == 0
    else:
        size = width = int(first.shape[-1])
        inputs = tuple([rows_of(tensor) for tensor in inputs])
        strides = tuple([tensor.stride(0) for tensor in inputs])
        num_rows = inputs[0].shape[0]
        unit = unit_of(size, *strides)
        block = 512 if few else 2048
        exact = width % block == 0
    key = (first.get_device(), first.dtype, unit, width, block, exact, activation)
    launcher = launchers.get(key)
    if launcher is None:
        check(first.dtype in DTYPES, lambda: f"gated_activation takes float32, bfloat16 or float16, not {first.dtype}")
        check(activation in ACTIVATIONS, lambda: f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        launcher = launchers[key] = Launcher(
            kernel,
            block,
            ACTIVATION=activation,
            UNIT=unit,
            BLOCK=block,
            BLOCKS=0 if flat else -(-width // block),
            EXACT=exact,
            num_warps=4,
        )
    numbers = (size // unit, *[stride // unit for stride in strides])
    launcher(num_rows * ((size + block - 1) // block), 1, inputs + outputs, numbers, traced)


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str, traced: Any = None) -> torch.Tensor:
    if gate.dtype is not up.dtype or gate.shape != up.shape or gate.get_device() != up.get_device():
        _check(gate, up)
    flat = gate.is_contiguous() and up.is_contiguous()
    y = torch.empty_like(gate) if flat else fresh(gate, gate.shape)
    total = y.numel()
    if isinstance(total, int) and total == 0:
        return y
    _launch(_forward_launchers, _forward_kernel, activation, (gate, up), (y,), flat, traced)
    return y


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, traced: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    flat = gate.is_contiguous() and up.is_contiguous()
    dgate, dup = (torch.empty_like(gate), torch.empty_like(gate)) if flat else (fresh(gate, gate.shape) for _ in "gu")
    total = dup.numel()
    if isinstance(total, int) and total == 0:
        return dgate, dup
    if flat and not dy.is_contiguous():
        dy = dy.contiguous()
    _launch(_backward_launchers, _backward_kernel, activation, (dy, gate, up), (dgate, dup), flat, traced)
    return dgate, dup


def _plain(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    wide = gate.float()
    if activation == "silu":
        act = torch.nn.functional.silu(wide)
    else:
        act = torch.nn.functional.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (act * up.float()).to(gate.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            return *plain_gradients(partial(_plain, activation=ctx.activation), (gate, up), (dy,)), None
        return *_backward(dy, gate, up, ctx.activation), None


@torch.library.triton_op(f"{NAMESPACE}::gated_activation", mutates_args={})
def _operation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return _forward(gate, up, activation, torch.library.wrap_triton(_forward_kernel))


@torch.library.triton_op(f"{NAMESPACE}::gated_activation_backward", mutates_args={})
def _backward_operation(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dy, gate, up, activation, torch.library.wrap_triton(_backward_kernel))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _operation_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *_backward_operation(dy, gate, up, ctx.activation), None


_operation.register_autograd(_operation_backward, setup_context=_setup_context)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """act(gate) * up, elementwise, computed in float32 and rounded once.

    `gate` and `up` are [..., I], of one shape and one dtype (float32, bfloat16 or float16); rows may lie anywhere as
    long as their elements are adjacent, so the chunks of a packed projection are read in place. The result is
    contiguous. `activation` is "silu", "gelu" (the erf form) or "gelu_tanh". Raises ValueError for anything else.
    """
    if watched(gate, up):
        y: torch.Tensor = _operation(gate, up, activation)
        return y
    if needs_grad(gate, up):
        y = _Function.apply(gate, up, activation)
        return y
    return _forward(gate, up, activation)
