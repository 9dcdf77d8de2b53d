"""Answers that are remembered, and what each depends on.

An answer about a layer holds as long as everything its trace has looked at is the same: the attributes that the forward
has read, and what its code can reach. Nothing here keeps a module, a class or a function alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from kernelwise._data import Recognition
from kernelwise._recognize._reach import dependencies, methods
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
        self,
        answer: Any,
        reads: Reads,
        functions: Iterable[Any],
        modes: Iterable[tuple[Mode, bool]] = (),
        cls: type | None = None,
    ) -> None:
        self.answer = answer
        self.recognition = answer if isinstance(answer, Recognition) else None
        hold = _Attributes({path: v for path, v in reads.tokens.items() if v is not OF_THE_MODULE}).hold
        flags = tuple(modes)
        self.holds = functools.partial(_holds_in_mode, hold, flags) if flags else hold
        self.reads_training = any(path[-1] == "training" for path in reads.tokens)
        self._code = tuple(dependencies((*functions, *methods(reads)), cls))

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
    value = found_at(module, path)
    return MISSING if value is MISSING else token(value)


def found_at(module: Any, path: tuple[str, ...]) -> Any:
    """Return what a trace would find at `path`: children, attributes, items of lists and dicts; `MISSING` for nothing."""
    value = module
    for name in path:
        value = _attribute(value, name)
        if value is MISSING:
            return MISSING
    return value


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code of a module's class."""
    if name == "__class__":
        return type(value)
    if isinstance(value, nn.Module):
        d = value.__dict__
        if name in d and not (name == "forward" and is_own_code(value, d[name])):
            return d[name]
        for kept in ("_parameters", "_buffers", "_modules"):
            if name in d[kept]:
                return d[kept][name]
        return getattr(type(value), name, MISSING)
    if type(value) is dict:
        return value.get(name, MISSING)
    if type(value) in (list, tuple):
        return value[int(name)] if name.isdigit() and int(name) < len(value) else MISSING
    return getattr(value, name, MISSING)
