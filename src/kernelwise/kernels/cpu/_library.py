"""The compiled library: where it is, why it cannot be used, and what torch must know about its operators.

The library registers its operators with torch's dispatcher when it is loaded. Here they get what only Python can give:
the shapes and dtypes of their results without data, so that `torch.compile` and fake tensors see through them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("_kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps kernelwise"


def is_available() -> bool:
    """Whether the CPU kernels can be used here."""
    return not why_unavailable()


def why_unavailable() -> str:
    """Return what is missing, as one sentence with the command that mends it, or an empty string."""
    return _loaded()


def isa() -> str:
    """Return the instruction set in use: baseline, avx2 or avx512. ATEN_CPU_CAPABILITY can lower it, as in torch."""
    name: str = load().cpu_isa.default()
    return name


def load() -> Any:
    """Return `torch.ops.kernelwise`, loading the library on the first call.

    Raises:
        ImportError: the library was not built or does not fit the torch that is installed.
    """
    if reason := _loaded():
        raise ImportError(reason)
    return torch.ops.kernelwise


@functools.cache
def _loaded() -> str:
    if not FILE.exists():
        return f"the C++ library of the CPU kernels was not built (no C++17 compiler, or torch was missing): {_BUILD}"
    try:
        torch.ops.load_library(str(FILE))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the C++ library of the CPU kernels does not load with torch {torch.__version__} ({error}): {_BUILD}"
    for name, shapes in _SHAPES.items():
        torch.library.register_fake(f"kernelwise::{name}", shapes)
    return ""


Tensor = torch.Tensor


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_after: bool = False) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if weight is None or cast_after else weight.dtype)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_after: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    if weight is None or not weight_grad:
        return x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _gated_activation(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _rotated(x: Tensor, unsqueeze_dim: int, dtype: torch.dtype) -> Tensor:
    """Results lie in memory as [batch, positions, heads, width]."""
    if unsqueeze_dim == 2:
        return x.new_empty(x.shape, dtype=dtype)
    batch, heads, positions, width = x.shape
    return x.new_empty((batch, positions, heads, width), dtype=dtype).transpose(1, 2)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    return _rotated(q, unsqueeze_dim, dtype), _rotated(k, unsqueeze_dim, dtype)


def _rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _rotated(grad_q, unsqueeze_dim, dtype), _rotated(grad_k, unsqueeze_dim, dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, few_rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1]))


_SHAPES: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "gated_activation": _gated_activation,
    "gated_activation_backward": _gated_activation_backward,
    "rotary": _rotary,
    "rotary_backward": _rotary_backward,
    "linear": _linear,
    "linear_grad_x": _linear_grad_x,
    "linear_grad_weight": _linear_grad_weight,
}
