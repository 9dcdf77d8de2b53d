"""Calls: a layer's own code, or a kernel, as a function of a module and the arguments of its forward, without any guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernelwise._applying._bind import expression
from kernelwise._applying._guards import follow
from kernelwise._data import Kernel, Layer, Parameter
from kernelwise._signature import bind, source

Call = Callable[..., Any]
"""`call(module, **arguments)`: the layer's own code or a kernel, with a copy of the module and the forward's arguments."""


def own_call(layer: Layer, own: Callable[..., Any]) -> Call:
    """Return the call of the layer's own code: a class's forward, or the function that a forward calls."""
    _, passed = source(layer.signature)
    return _function(layer.signature, passed if layer.function is not None else f"_module, {passed}", own)


def kernel_call(layer: Layer, kernel: Kernel, mode: str) -> Call:
    """Return the call of a kernel for a layer, without any guard: what it does is what is to be seen."""
    assert kernel.function is not None
    found = layer.computes(mode) if kernel.op is not None else None
    if found is None:
        passed, _ = bind(layer.signature, kernel.signature)
        return _function(layer.signature, f"_module, {passed}", kernel.function)
    taken = {p.name for p in kernel.signature}
    passed = ", ".join(
        [f"{role}={expression(binding, '_module')}" for role, binding in found.roles if not taken or role in taken]
        + [f"{name}={value!r}" for name, value in found.options if not taken or name in taken]
    )
    return _function(layer.signature, passed, kernel.function)


def _function(parameters: Sequence[Parameter], passed: str, function: Callable[..., Any]) -> Call:
    # With a module's name it has a source for torch.compile: before 2.13 that wraps functions without one in one function of
    # its own, and gives up after a few of them.
    namespace: dict[str, Any] = {"__name__": __name__, "_function": function, "_kw_follow": follow}
    names = "".join(f", {p.name}" for p in parameters)
    exec(f"def call(_module{names}):\n    return _function({passed})", namespace)
    call: Call = namespace["call"]
    return call
