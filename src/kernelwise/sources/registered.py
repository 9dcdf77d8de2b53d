"""Kernels that `register_op` adds to an operation: functions of this process, and references to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernelwise._alike import function_code
from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources._layer_class import signature

_functions: dict[str, Kernel] = {}
_offers: dict[str, tuple[tuple[str | None, KernelRef], ...]] = {}


def kernel_of(function: Callable[..., Any], op: str, device: str | None) -> Kernel:
    """Describe a function by the roles of an operation as a kernel. `device` None: it runs on any."""
    return Kernel(
        ref=KernelRef("builtin", "", getattr(function, "__name__", op)),
        op=op,
        limits=Limits(devices=() if device is None else (device,)),
        has_backward=bool(getattr(function, "has_backward", True)),
        can_torch_compile=bool(getattr(function, "can_torch_compile", False)),
        content_hash=function_code(function) if hasattr(function, "__code__") else None,
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


def is_registered(kernel: Kernel) -> bool:
    """Return whether a kernel is a function that a user has registered; its reference looks like that of a builtin one."""
    module = getattr(kernel.function, "__module__", None) or ""
    named = kernel.ref.scheme == "builtin" and not kernel.ref.location  # a backend compiles what users register too
    return named and kernel.function is not None and not _is_ours(module)


def _is_ours(module: str) -> bool:
    return module == "kernelwise" or module.startswith("kernelwise.")


def refs(op: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return what is offered for an operation on a device type."""
    return tuple(ref for only, ref in _offers.get(op, ()) if only in (None, device))


def find(name: str, *, device: str) -> Kernel | None:
    """Return the function registered under a name, if it runs on the device type."""
    kernel = _functions.get(name)
    return kernel if kernel is not None and kernel.limits.devices in ((), (device,)) else None
