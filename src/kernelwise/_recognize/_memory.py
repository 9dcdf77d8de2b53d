"""Answers that are remembered, and what each depends on.

An answer about a layer holds as long as everything its trace has looked at is the same: the attributes that the forward
has read, the functions that it can reach through its globals, the values in their closures. Nothing here keeps a
module, a class or a function alive.
"""

from __future__ import annotations

import builtins
import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelwise._data import Recognition
from kernelwise._recognize._reads import (
    MISSING,
    OF_THE_MODULE,
    SCALARS,
    Reads,
    contents,
    is_child_token,
    is_function,
    is_own_code,
    token,
)


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


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Every name that code, or a function defined inside it, may look up in its globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return frozenset(names)


@dataclass(frozen=True, slots=True)
class _Global:
    """A name in somebody's globals and what stood there."""

    space: dict[str, Any]
    name: str
    value: Any

    def holds(self) -> bool:
        return bool(_pin(self.space.get(self.name, MISSING)) == self.value)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A variable of a closure and what stood there."""

    function: weakref.ref[types.FunctionType]
    index: int
    value: Any

    def holds(self) -> bool:
        function = self.function()
        return function is not None and bool(_contents(function, self.index) == self.value)


def _contents(function: types.FunctionType, index: int) -> Any:
    cells = function.__closure__ or ()
    try:
        return _pin(cells[index].cell_contents)
    except (ValueError, IndexError):
        return MISSING


def _pin(value: Any) -> Any:
    """Something that is equal for the same value and different for another one, and keeps nothing alive."""
    if isinstance(value, types.ModuleType):
        return value
    if isinstance(value, nn.Module):
        return (weakref.ref(type(value)), id(value))
    if isinstance(value, (list, tuple, dict)):
        items = list(value.values()) if isinstance(value, dict) else value
        if len(items) > 16 or not all(isinstance(item, (int, float, str, type(None))) for item in items):
            return (type(value), id(value))
        return token(value)
    made = token(value)
    return (made, id(value)) if isinstance(made, tuple) and made[0] in ("object", "tensor", "partial") else made


Mode = tuple[str, ...]  # the path of a child whose `training` flag was read


def modes(module: nn.Module, reads: Reads) -> tuple[tuple[Mode, bool], ...]:
    """The children whose `training` flag an answer about a mode was read from, and whether it is the module's now."""
    paths = [path[:-1] for path, value in reads.tokens.items() if value is OF_THE_MODULE and len(path) > 1]
    return tuple((path, is_in_mode(module, path)) for path in paths)


def is_in_mode(module: nn.Module, path: Mode) -> bool:
    """Whether the child at a path trains where the module does, and does not where it does not."""
    value: Any = module
    for name in path:
        value = _attribute(value, name)
    return bool(getattr(value, "training", None) is module.training)


def _holds_in_mode(hold: Callable[[nn.Module], bool], flags: tuple[tuple[Mode, bool], ...], module: nn.Module) -> bool:
    return hold(module) and all(is_in_mode(module, path) is agrees for path, agrees in flags)


class Entry:
    """An answer and everything it depends on."""

    __slots__ = ("_code", "answer", "holds", "reads_training", "recognition")

    holds: Callable[[nn.Module], bool]
    """Whether a trace of a module would read the same values from it."""

    def __init__(
        self, answer: Any, reads: Reads, functions: Iterable[Any], modes: Iterable[tuple[Mode, bool]] = ()
    ) -> None:
        self.answer = answer
        self.recognition = answer if isinstance(answer, Recognition) else None
        hold = _Attributes({path: v for path, v in reads.tokens.items() if v is not OF_THE_MODULE}).hold
        flags = tuple(modes)
        self.holds = functools.partial(_holds_in_mode, hold, flags) if flags else hold
        self.reads_training = any(path[-1] == "training" for path in reads.tokens)
        self._code = tuple(_dependencies((*functions, *_methods(reads))))

    def code_holds(self) -> bool:
        """Whether a trace would run the same functions, with the same values in their globals and closures."""
        return all(item.holds() for item in self._code)


class _Attributes:
    """What a trace has read of a module, sorted by where it stands, so that comparing takes a microsecond.

    Whatever is not found where it usually stands is looked up as Python would: `value_at` decides.
    """

    __slots__ = ("children", "others", "scalars", "tensors")

    def __init__(self, tokens: Mapping[tuple[str, ...], Any]) -> None:
        self.scalars: list[tuple[str, type, Any]] = []
        self.tensors: list[tuple[str, Any, Any]] = []
        self.children: list[tuple[str, Any, bool, Any, _Attributes]] = []
        self.others: list[tuple[tuple[str, ...], Any]] = []
        nested: dict[str, dict[tuple[str, ...], Any]] = {}
        for path, value in tokens.items():
            if len(path) == 1 and isinstance(value, tuple) and value[0] in SCALARS:
                self.scalars.append((path[0], value[0], value[1]))
            elif len(path) == 1 and isinstance(value, tuple) and value[0] == "tensor":
                self.tensors.append((path[0], value[1], value[2]))
            elif isinstance(child := tokens.get(path[:1]), tuple) and is_child_token(child):
                nested.setdefault(path[0], {})[path[1:]] = value
            else:
                self.others.append((path, value))
        for name, values in nested.items():
            self.children.append((name, *values.pop(()), _Attributes(values)))

    def hold(self, module: nn.Module) -> bool:
        d = module.__dict__
        parameters = d["_parameters"]
        for name, dtype, shape in self.tensors:
            value = parameters.get(name)
            if value is None or name in d:
                if value_at(module, (name,)) != ("tensor", dtype, shape):
                    return False
            elif value.shape != shape or (None if value.dtype.is_floating_point else value.dtype) != dtype:
                return False
        for name, kind, expected in self.scalars:
            value = d.get(name, MISSING)
            if value is MISSING:
                value = parameters.get(name, MISSING)
            if (type(value) is not kind or value != expected) and value_at(module, (name,)) != (kind, expected):
                return False
        for name, child_class, is_only_function, inner, attributes in self.children:
            child = d["_modules"].get(name)
            if child is None or name in d or name in parameters:
                child = _attribute(module, name)
            if type(child) is not child_class() or is_function(child) is not is_only_function:
                return False
            if inner is not None and (inner or child._modules) and contents(child, is_only_function) != inner:
                return False
            if not attributes.hold(child):
                return False
        return not self.others or all(value_at(module, path) == value for path, value in self.others)


def value_at(module: Any, path: tuple[str, ...]) -> Any:
    """Return the token of what a trace would find at `path`."""
    value = module
    for name in path:
        value = _attribute(value, name)
        if value is MISSING:
            return MISSING
    return token(value)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of a module's class."""
    if isinstance(value, nn.Module):
        d = value.__dict__
        if name in d and not (name == "forward" and is_own_code(value, d[name])):
            return d[name]
        for kept in ("_parameters", "_buffers", "_modules"):
            if name in d[kept]:
                return d[kept][name]
        return getattr(type(value), name, MISSING)
    if isinstance(value, dict):
        return value.get(name, MISSING)
    return getattr(value, name, MISSING)


def _dependencies(functions: Iterable[Any]) -> Iterator[_Global | _Cell]:
    """Every global and closure variable that the code of these functions, and of those they can call, looks up."""
    for function in _reached(functions):
        for index in range(len(function.__closure__ or ())):
            yield _Cell(weakref.ref(function), index, _contents(function, index))
        space = function.__globals__
        for name in global_names(function.__code__):
            if name in space and not hasattr(builtins, name):
                yield _Global(space, name, _pin(space[name]))


def _reached(functions: Iterable[Any]) -> Iterator[types.FunctionType]:
    """These functions and those that they can call by a global name, without PyTorch's own."""
    stack = [plain_function(function) for function in functions]
    seen: set[Callable[..., Any]] = set()
    while stack:
        function = stack.pop()
        if function is None or function in seen or is_library(function):
            continue
        seen.add(function)
        yield function
        space = function.__globals__
        names = global_names(function.__code__)
        stack.extend(plain_function(space[name]) for name in names if name in space and not hasattr(builtins, name))


# What a trace answers in one way, and a call may answer in another one: where it runs, in which mode, how a tensor lies.
_ASKED = frozenset(
    {"is_cuda", "is_cpu", "is_mps", "is_xpu", "environ", "getenv", "random", "is_compiling"}
    | {"is_grad_enabled", "is_inference", "is_inference_mode_enabled", "requires_grad", "is_leaf", "is_contiguous"}
)


def not_only_of_its_inputs(reads: Reads, functions: Iterable[Any]) -> str | None:
    """Return why code that a trace has run, or may run, computes something that its inputs do not decide, or None."""
    asked: set[str] = set()
    for function in _reached((*functions, *_methods(reads))):
        asked |= _ASKED & global_names(function.__code__)
        problem = _about_its_state(function.__code__)
        if problem is not None:
            return problem
    if asked:
        return f"what it computes may depend on more than its inputs ({', '.join(sorted(asked))})"
    return None


@functools.lru_cache(maxsize=4096)
def _about_its_state(code: types.CodeType) -> str | None:
    """Return why a trace cannot stand for code that writes a global variable, or asks which type `self` is, or None."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL", "PRECALL")]
    for one, two, _, after in zip(instructions, instructions[1:], instructions[2:], instructions[3:], strict=False):
        # A trace runs on an object of a subclass. What is looked up on the type is the same there.
        asks = one.opname == "LOAD_GLOBAL" and one.argval == "type" and two.opname.startswith("LOAD_FAST")
        if asks and two.argval in code.co_varnames[:1] and after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return "it asks for the type of its first argument"
    if any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in instructions):
        return "it writes to a global variable"
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return next(filter(None, map(_about_its_state, inner)), None)


def _methods(reads: Reads) -> list[Any]:
    return [value() for value in reads.tokens.values() if isinstance(value, weakref.ref)]
