"""Forwards: what can be known of the function that a module runs, without running it, and a copy of it.

Its parameters, the globals that its code mentions, the decorators around it, and whether Kernelwise put it there.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from kernelwise._data import Parameter


def innermost_slot(module: nn.Module) -> str:
    """Return the instance attribute that holds the innermost forward: accelerate keeps it in `_old_forward`."""
    return "_old_forward" if "_old_forward" in module.__dict__ and "_hf_hook" in module.__dict__ else "forward"


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the function, `self` first, that the module runs without us: its class's forward."""
    return type(module).forward


def mark_dispatcher(function: Callable[..., Any]) -> None:
    """Mark a function as one that Kernelwise puts on instances."""
    # Itself, because `functools.wraps` copies attributes to wrappers that are not ours.
    function.__kernelwise__ = function  # type: ignore[attr-defined]


def is_dispatcher(value: Any) -> bool:
    """Return whether a forward found on an instance is one that Kernelwise put there."""
    return isinstance(value, MethodType) and getattr(value.__func__, "__kernelwise__", None) is value.__func__


@lru_cache(maxsize=4096)
def signature(forward: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Return the parameters of a forward without `self`; empty where Python cannot tell."""
    parameters = parameters_of(forward)
    return parameters if parameters[:1] and parameters[0].kind == "var_positional" else parameters[1:]


def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(Parameter(p.name, p.kind.name.lower(), p.default is not p.empty) for p in parameters)


@dataclass(frozen=True, slots=True)
class Wrapping:
    """A plain Python function and the decorators around it: each with the closure cell that holds what it wraps."""

    inner: FunctionType
    decorators: tuple[tuple[FunctionType, int], ...]  # innermost first


@lru_cache(maxsize=4096)
def wrapping(forward: Callable[..., Any]) -> Wrapping | str:
    """Return what is needed to copy a forward around other globals, or why that is not possible."""
    chain: list[FunctionType] = []
    while hasattr(forward, "__wrapped__"):
        if not isinstance(forward, FunctionType):
            return f"its forward is wrapped by {type(forward).__qualname__}, which is no plain function"
        chain.append(forward)
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    if not isinstance(forward, FunctionType):
        return "its forward is no plain Python function"
    decorators: list[tuple[FunctionType, int]] = []
    wrapped = forward
    for outer in reversed(chain):
        holds = [index for index, cell in enumerate(outer.__closure__ or ()) if _contents(cell) is wrapped]
        if len(holds) != 1:
            return "a decorator around its forward does not hold it in one closure cell"
        decorators.append((outer, holds[0]))
        wrapped = outer
    written = sorted(name for name, is_written in _globals_in(forward.__code__) if is_written)
    if written:
        return f"its forward writes the global {written[0]}, which a copy with globals of its own would hide"
    if ("__name__", False) in _globals_in(forward.__code__):
        return "its forward reads __name__, which a copy does not have"
    return Wrapping(forward, tuple(decorators))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


@lru_cache(maxsize=4096)
def _globals_in(code: CodeType) -> frozenset[tuple[str, bool]]:
    """Return the globals that a function's code and the code nested in it use, and whether they are written."""
    nested = [_globals_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    own = {
        (str(step.argval), step.opname != "LOAD_GLOBAL")
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL")
    }
    return frozenset(own).union(*nested)


def globals_called(forward: Callable[..., Any]) -> dict[str, Any]:
    """Return the global names that a forward's own code mentions, with the values they have now."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return {}
    space = inner.__globals__
    return {name: space[name] for name, _ in _globals_in(inner.__code__) if name in space}


def rebuild(forward: Callable[..., Any], replacements: dict[str, Callable[..., Any]]) -> Callable[..., Any] | None:
    """Return a copy of a forward that sees other values behind some of its global names; None where that is not possible.

    The copy has globals of its own, so no other model is changed. Decorators made with `functools.wraps` are copied around
    it: each must hold the function it wraps in exactly one closure cell.
    """
    found = wrapping(forward)
    if isinstance(found, str):
        return None
    # Without a module name, torch.compile takes the values from these globals and not from the module they came from.
    scope = {name: value for name, value in found.inner.__globals__.items() if name != "__name__"} | replacements
    rebuilt = _copy_function(found.inner, scope, found.inner.__closure__)
    for outer, holds in found.decorators:
        cell = CellType(rebuilt)
        closure = tuple(cell if index == holds else other for index, other in enumerate(outer.__closure__ or ()))
        rebuilt = _copy_function(outer, outer.__globals__, closure)
        rebuilt.__wrapped__ = cell.cell_contents  # type: ignore[attr-defined]
    return rebuilt


def _copy_function(function: FunctionType, scope: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    copied.__qualname__, copied.__doc__ = function.__qualname__, function.__doc__
    copied.__annotations__, copied.__module__ = function.__annotations__, function.__module__
    return copied
