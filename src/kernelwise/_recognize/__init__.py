"""Stage: module or function → canonical graph → operation with its roles and options.

Recognition looks only at what a forward computes, traced on fake tensors built from metadata. Answers are remembered by
the code of the forward and by every value that it has read, so a second layer of the same kind costs microseconds.
"""

from __future__ import annotations

import builtins
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelwise._data import Recognition
from kernelwise._recognize._search import Finding, find_function, find_module
from kernelwise._recognize._trace import MISSING, Untraceable, innermost_forward, token


@dataclass(frozen=True, slots=True)
class Unknown:
    """No operation was recognised: why, and the canonical graph if there is one."""

    reason: str
    graph: str | None = None


def recognize(module: nn.Module, *, training: bool | None = None) -> Recognition | Unknown:
    """Return what `module` computes, or why that is not known.

    `training` asks about the module as if `train()` or `eval()` had been called on it; without it, as it is. The module
    is neither called nor changed. Safe to call from several threads.
    """
    try:
        forward = innermost_forward(module)
    except Untraceable as reason:
        return Unknown(str(reason))
    key = (type(module), training)
    with _lock:
        known = _modules.setdefault(forward, {}).setdefault(key, [])
        for entry in known:
            if entry.holds(module):
                return entry.answer
        finding = find_module(module, training=training)
        answer = _answer(finding)
        known.insert(0, _Entry(answer, tuple(finding.reads.tokens.items()), tuple(_globals_of(forward))))
        del known[_MOST_ENTRIES:]
        return answer


def recognize_functions(module: nn.Module) -> tuple[tuple[str, Recognition], ...]:
    """Return the functions that the module's forward calls through its globals and that are known operations.

    Each comes as its global name and what it computes: `(("apply_rotary_pos_emb", Recognition("rotary", ...)),)`.
    """
    try:
        forward = innermost_forward(module)
    except Untraceable:
        return ()
    code = plain_function(forward)
    if code is None:
        return ()
    found = []
    for name in sorted(_global_names(code.__code__)):
        function = plain_function(code.__globals__.get(name))
        if function is not None and not _is_library(function):
            answer = _recognize_function(function)
            if isinstance(answer, Recognition):
                found.append((name, answer))
    return tuple(found)


def plain_function(value: Any) -> types.FunctionType | None:
    """Return the Python function under decorators and under the wrapper that the kernels library makes of a function."""
    seen: set[int] = set()
    while id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, nn.Module):
            value = _wrapped_function(value)
        elif hasattr(value, "__wrapped__"):
            value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _wrapped_function(module: nn.Module) -> Any:
    """The function that a module's class does nothing but call: the only one in the closure of its forward."""
    forward = type(module).forward
    cells = getattr(forward, "__closure__", None) or ()
    functions = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, types.FunctionType)]
    return functions[0] if len(functions) == 1 and len(cells) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Remembered answers
# ---------------------------------------------------------------------------------------------------------------------

_MOST_ENTRIES = 256  # answers kept for one forward: more kinds of layer than any model has
_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Entry:
    """An answer and everything it depends on."""

    answer: Recognition | Unknown
    reads: tuple[tuple[tuple[str, ...], Any], ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether a trace of `module` would read the same values and run the same functions."""
        for path, value in self.reads:
            if _value_at(module, path) != value:
                return False
        return all(space.get(name) is value for space, name, value in self.globals)


_modules: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, list[_Entry]]] = weakref.WeakKeyDictionary()
_functions: weakref.WeakKeyDictionary[Callable[..., Any], list[_Entry]] = weakref.WeakKeyDictionary()


def _recognize_function(function: types.FunctionType) -> Recognition | Unknown:
    with _lock:
        for entry in _functions.get(function, ()):
            if all(space.get(name) is value for space, name, value in entry.globals):
                return entry.answer
        answer = _answer(find_function(function))
        _functions[function] = [_Entry(answer, (), tuple(_globals_of(function)))]
        return answer


def _answer(finding: Finding) -> Recognition | Unknown:
    return finding.recognition or Unknown(finding.reason or "no known operation has this graph", finding.graph)


def _value_at(module: nn.Module, path: tuple[str, ...]) -> Any:
    value: Any = module
    for name in path:
        if isinstance(value, nn.Module):
            d = value.__dict__
            for space in (d, d["_parameters"], d["_buffers"], d["_modules"]):
                if name in space:
                    value = space[name]
                    break
            else:
                value = getattr(type(value), name, MISSING)
        elif isinstance(value, dict):
            value = value.get(name, MISSING)
        else:
            value = getattr(value, name, MISSING)
        if value is MISSING:
            return MISSING
    return token(value)


def _globals_of(function: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every global that the code of `function`, and of the functions it can call by name, looks up."""
    stack, seen = [plain_function(function)], set()
    while stack:
        current = stack.pop()
        if current is None or current in seen or _is_library(current):
            continue
        seen.add(current)
        for name in _global_names(current.__code__):
            if name in current.__globals__ and not hasattr(builtins, name):
                value = current.__globals__[name]
                yield current.__globals__, name, value
                stack.append(plain_function(value))


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _is_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


__all__ = ["Unknown", "plain_function", "recognize", "recognize_functions"]
