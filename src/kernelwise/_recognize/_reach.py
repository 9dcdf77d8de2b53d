"""What the code of a forward can reach, and what stood there: what an answer depends on besides the layer itself.

Functions through globals, closures, decorators and `super()`, and the values that their code looks up on the way. Nothing
here keeps a class or a function alive.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelwise._recognize._code import (
    ASKED,
    Chain,
    asked_of_attributes,
    chains,
    decides_by_dtype,
    decides_by_size,
    global_names,
    imported,
    looks_on_its_class,
    only_passes_on,
    problem_of,
    writes_to,
)
from kernelwise._recognize._reads import MISSING, SCALARS, Reads, is_own_code, token


def plain_function(value: Any) -> types.FunctionType | None:
    """Return the Python function under decorators and under the wrapper that the kernels library puts around one."""
    if type(value) is types.FunctionType and not value.__dict__:
        return value
    seen: set[int] = set()
    while id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, nn.Module):
            value = _wrapped_function(value)
        elif hasattr(value, "__wrapped__"):
            value = value.__wrapped__
    return value if isinstance(value, types.FunctionType) else None


def _wrapped_function(module: nn.Module) -> Any:
    """The function that a module's class does nothing but call: the only value in the closure of its forward."""
    cells: tuple[types.CellType, ...] = getattr(type(module).forward, "__closure__", None) or ()
    if len(cells) != 1 or ("forward" in module.__dict__ and not is_own_code(module, module.__dict__["forward"])):
        return None
    return cells[0].cell_contents


def is_library(function: types.FunctionType) -> bool:
    """Whether a function is PyTorch's own."""
    return (function.__module__ or "").partition(".")[0] == "torch"


def _is_stable(value: Any) -> bool:
    """Whether what stands on a module or a class is not somebody's to change: PyTorch's, Python's, pytest's in assertions."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    top = str(name).partition(".")[0]
    return top in ("torch", "builtins", "_pytest") or top in sys.stdlib_module_names


# ---------------------------------------------------------------------------------------------------------------------
# What code looks up
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    """A name in somebody's globals, with attributes taken of it, and what stood there."""

    space: dict[str, Any]
    chain: Chain
    value: Any

    def holds(self) -> bool:
        return bool(_pin(_found(self.space, self.chain)) == self.value)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A variable of a closure and what stood there."""

    function: weakref.ref[types.FunctionType]
    index: int
    value: Any

    def holds(self) -> bool:
        function = self.function()
        return function is not None and bool(_contents(function, self.index) == self.value)


@dataclass(frozen=True, slots=True)
class _Code:
    """The code and the default values of a function."""

    function: weakref.ref[types.FunctionType]
    code: types.CodeType
    defaults: Any

    def holds(self) -> bool:
        function = self.function()
        return function is not None and function.__code__ is self.code and _defaults(function) == self.defaults


@dataclass(frozen=True, slots=True)
class _OnClass:
    """A name in the namespace of one class, and what stood there."""

    cls: weakref.ref[type]
    name: str
    value: Any

    def holds(self) -> bool:
        cls = self.cls()
        return cls is not None and bool(_pin(cls.__dict__.get(self.name, MISSING)) == self.value)


def _found(space: Mapping[str, Any], chain: Chain) -> Any:
    """What a dotted name means, without running a property."""
    value = space.get(chain[0], MISSING)
    for name in chain[1:]:
        if value is MISSING:
            return MISSING
        value = value.__dict__.get(name, MISSING) if isinstance(value, types.ModuleType) else _static(value, name)
    return value


def _static(value: Any, name: str) -> Any:
    return inspect.getattr_static(value, name, MISSING)


def _contents(function: types.FunctionType, index: int) -> Any:
    return _pin(_cell_value(function, index))


def _cell_value(function: types.FunctionType, index: int) -> Any:
    cells = function.__closure__ or ()
    try:
        return cells[index].cell_contents
    except (ValueError, IndexError):
        return MISSING


def _defaults(function: types.FunctionType) -> Any:
    return tuple(_item(value) for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))


_MOST_ITEMS = 64


def _pin(value: Any) -> Any:
    """Something that is equal for the same value and different for another one, and keeps nothing alive."""
    if isinstance(value, types.ModuleType):
        return value
    if isinstance(value, nn.Module):
        return (weakref.ref(type(value)), id(value), _scalars(value))
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        items = [*value, *value.values()] if isinstance(value, dict) else list(value)
        if all(type(item) in SCALARS for item in items) and len(items) <= _MOST_ITEMS:
            return (type(value), tuple((type(item), item) for item in items))
        return (type(value), id(value), tuple(map(_item, items)))
    if isinstance(value, (staticmethod, classmethod)):
        return (type(value), _pin(value.__func__))
    if isinstance(value, property):
        return (property, *(_pin(function) for function in (value.fget, value.fset)))
    if isinstance(value, type):
        own = () if _is_stable(value) else tuple((k, _item(v)) for k, v in vars(value).items() if k[:2] != "__")
        return (weakref.ref(value), own)
    made = token(value)
    if isinstance(made, tuple) and made[0] in ("object", "tensor", "partial"):
        return (made, id(value), _scalars(value))
    return made


def _item(value: Any) -> Any:
    """A value inside another one: by what it is if that is cheap, else by which it is."""
    if type(value) in SCALARS:
        return (type(value), value)
    return weakref.ref(value) if isinstance(value, types.FunctionType) else id(value)


def _scalars(value: Any) -> Any:
    """The plain values among the attributes of an object."""
    own = getattr(value, "__dict__", None)
    if not isinstance(own, dict):
        return ()
    return tuple((name, item) for name, item in own.items() if type(item) in SCALARS)


# ---------------------------------------------------------------------------------------------------------------------
# What code can reach
# ---------------------------------------------------------------------------------------------------------------------


def dependencies(functions: Iterable[Any], cls: type | None) -> Iterator[_Global | _Cell | _Code | _OnClass]:
    """Everything that the code of these functions, and of those they can call, looks up outside of itself."""
    for function in _reached(functions, cls, decorators=True):
        known = weakref.ref(function)
        yield _Code(known, function.__code__, _defaults(function))
        for index in range(len(function.__closure__ or ())):
            yield _Cell(known, index, _contents(function, index))
        space = function.__globals__
        for chain in _chains(function):
            yield _Global(space, chain, _pin(_found(space, chain)))
        if cls is not None and looks_on_its_class(function.__code__):
            for base in _bases(cls):
                for name in global_names(function.__code__):
                    yield _OnClass(weakref.ref(base), name, _pin(base.__dict__.get(name, MISSING)))


def _chains(function: types.FunctionType) -> Iterator[Chain]:
    """The dotted names that a function looks up, as far as somebody may change what they mean."""
    space = function.__globals__
    for chain in chains(function.__code__):
        root = space.get(chain[0], MISSING)
        if len(chain) == 1 or (root is not MISSING and not _is_stable(root)):
            yield chain


def _bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if not _is_stable(base)]


def _reached(functions: Iterable[Any], cls: type | None, *, decorators: bool = False) -> Iterator[types.FunctionType]:
    """These functions and those that they can call, without PyTorch's own; and, if asked, what decorators run around them.

    By a global name, through a closure, on the class of the module by `super()`.
    """
    stack: list[Any] = list(functions)
    seen: set[Callable[..., Any]] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, functools.partial):
            value = value.func
        if decorators and isinstance(value, types.FunctionType) and "__wrapped__" in value.__dict__:
            stack.append(value.__dict__["__wrapped__"])
            function: types.FunctionType | None = value
        else:
            function = plain_function(value)
        if function is None or function in seen or _is_torch(function):
            continue
        seen.add(function)
        yield function
        space = function.__globals__
        stack.extend(_callable(_found(space, chain)) for chain in _chains(function))
        stack.extend(_callable(_cell_value(function, i)) for i in range(len(function.__closure__ or ())))
        if cls is not None and looks_on_its_class(function.__code__):
            names = global_names(function.__code__)
            stack.extend(
                _callable(base.__dict__[name]) for base in _bases(cls) for name in names & base.__dict__.keys()
            )


def _is_torch(function: types.FunctionType) -> bool:
    """Whether the code of a function is PyTorch's: a decorator has the name of what it decorates."""
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch" or is_library(function)


def _callable(value: Any) -> Any:
    """What may be run when a value is called, where that is a Python function."""
    if isinstance(value, nn.Module) and not is_library(type(value).forward):  # type: ignore[arg-type]
        return plain_function(value) or type(value).forward
    kinds = (types.FunctionType, functools.partial, staticmethod, classmethod)
    return value if isinstance(value, kinds) or hasattr(value, "__wrapped__") else None


def not_only_of_its_inputs(reads: Reads, functions: Iterable[Any], cls: type | None = None) -> str | None:
    """Return why code that a trace has run, or may run, computes something that its inputs do not decide, or None.

    Libraries that a model's code calls may keep caches and look at types: they are not held to this.
    """
    asked: set[str] = set()
    functions = tuple(functions)
    own = {_package(item) for item in (*functions, *(() if cls is None else _bases(cls)))}
    for function in _reached((*functions, *methods(reads)), cls):
        asked |= ASKED & global_names(function.__code__)
        problem = None
        if _package(function) in own:
            problem = problem_of(function.__code__) or writes_to(function) or _asks_the_world(function)
            problem = problem or _asks_a_tensor(function, reads)
        if problem is not None:
            return problem
    if asked:
        return f"what it computes may depend on more than its inputs ({', '.join(sorted(asked))})"
    return None


def _asks_a_tensor(function: types.FunctionType, reads: Reads) -> str | None:
    """Return why a fake tensor cannot stand for one of the module's: its code asks for what only that one has."""
    for path in sorted(asked_of_attributes(function.__code__)):
        value = reads.tokens.get(path)
        if isinstance(value, tuple) and value[0] == "tensor":
            return f"it asks for the class or the attributes of its tensor {'.'.join(path)}"
    return None


# Modules of Python whose answers are not the same at every call.
_WORLD = frozenset(
    {"time", "datetime", "random", "secrets", "uuid", "socket", "threading", "gc", "resource", "subprocess", "tempfile"}
)


def _asks_the_world(function: types.FunctionType) -> str | None:
    """Return why what a function computes may change from call to call: it asks for the time, or draws by itself."""
    for chain in chains(function.__code__):
        value = function.__globals__.get(chain[0])
        source = value if isinstance(value, types.ModuleType) else getattr(value, "__self__", value)
        name = getattr(source, "__name__" if isinstance(source, types.ModuleType) else "__module__", None)
        if isinstance(name, str) and name.partition(".")[0] in _WORLD:
            return f"what it computes may depend on more than its inputs ({'.'.join(chain)})"
    asked = sorted(_WORLD & imported(function.__code__))
    return f"what it computes may depend on more than its inputs ({', '.join(asked)})" if asked else None


def _package(value: Any) -> str:
    """The name of the package that a function or a class stands in."""
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


def looks_into_keywords(function: Callable[..., Any]) -> bool:
    """Whether a function, or one that it hands them on to, does more with its `**keywords` than to hand them on."""
    for reached in _reached((function,), None):
        code = reached.__code__
        if code.co_flags & inspect.CO_VARKEYWORDS:
            name = code.co_varnames[
                code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
            ]
            if not only_passes_on(code, name):
                return True
    return False


def decides_by_size_in(reads: Reads, functions: Iterable[Any], cls: type | None = None) -> bool:
    """Whether code that a trace has run, or may run, decides something by sizes or by a number of dimensions."""
    return any(decides_by_size(function.__code__) for function in _reached((*functions, *methods(reads)), cls))


def decides_by_dtype_in(reads: Reads, functions: Iterable[Any], cls: type | None = None) -> bool:
    """Whether code that a trace has run, or may run, decides something by a dtype."""
    return any(decides_by_dtype(function.__code__) for function in _reached((*functions, *methods(reads)), cls))


def methods(reads: Reads) -> list[Any]:
    """The methods and properties of the module that a trace has found."""
    found = []
    for value in reads.tokens.values():
        if isinstance(value, tuple) and len(value) == 2 and value[0] in ("method", "property"):
            value = value[1]
        if isinstance(value, weakref.ref):
            found.append(value())
    return found
