"""Kernels that `register_op` adds to an operation: functions of this process, and references to others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources._layer_class import signature

_functions: dict[str, Kernel] = {}
_offers: dict[str, tuple[tuple[str | None, KernelRef], ...]] = {}


def kernel_of(function: Callable[..., Any], op: str, device: str | None) -> Kernel:
    """Describe a function by the roles of an operation as a kernel. `device` None: it runs on any."""
    code = getattr(function, "__code__", None)
    return Kernel(
        ref=KernelRef("builtin", "", getattr(function, "__name__", op)),
        op=op,
        limits=Limits(devices=() if device is None else (device,)),
        has_backward=bool(getattr(function, "has_backward", True)),
        can_torch_compile=bool(getattr(function, "can_torch_compile", False)),
        content_hash=None if code is None else hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest(),
        signature=signature(function),
        function=function,
    )


def offer(op: str, kernels: Sequence[tuple[str | None, KernelRef | Kernel]]) -> None:
    """Offer kernels for an operation, the best first, each with the device type that it is for, or None for all."""
    forget(op)
    for _, kernel in kernels:
        if isinstance(kernel, Kernel):
            _functions[kernel.ref.layer] = kernel
    _offers[op] = tuple((device, kernel.ref if isinstance(kernel, Kernel) else kernel) for device, kernel in kernels)


def forget(op: str) -> None:
    """Take back everything that is offered for an operation."""
    _offers.pop(op, None)
    for name in [name for name, kernel in _functions.items() if kernel.op == op]:
        del _functions[name]


def refs(op: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return what is offered for an operation on a device type."""
    return tuple(ref for only, ref in _offers.get(op, ()) if only in (None, device))


def find(name: str, *, device: str) -> Kernel | None:
    """Return the function registered under a name, if it runs on the device type."""
    kernel = _functions.get(name)
    return kernel if kernel is not None and kernel.limits.devices in ((), (device,)) else None
