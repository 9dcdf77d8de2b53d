"""Alike: what two layers must have in common for the checks of one to speak for the other.

That is their code, the classes of their children, the shapes and dtypes of their tensors, and the numbers they hold. Used
by proofs, which read it for every layer of a model, and by `verify`, which checks layers alike once.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from kernelwise._discover import OURS

_NUMBERS = frozenset({int, float, bool, str})
_NOT_READ = frozenset({*nn.Module().__dict__, *OURS, "forward", "_old_forward", "_hf_hook"})
"""What a module has besides its author's attributes. Hooks and replaced forwards are left out of checks too."""


def traits_of(module: Any, names: tuple[str, ...] | None, codes: dict[Any, str]) -> tuple[Any, ...]:
    """Return what a layer has in common with those alike, as numbers, strings and tuples of them.

    Args:
        names: the attributes that decide what the layer and its kernel compute; None where these cannot be told, and
            every number counts. Of children all numbers count.
        codes: what is known of classes already, while a model is gone through; it is added to.
    """
    held = module.__dict__
    cls = module.__class__
    own = held["_parameters"]
    if names is None or held["_modules"] or len(own) != 1:
        return tuple(_traits(module, "", names))
    code = codes.get(cls)
    if code is None:
        code = codes[cls] = class_code(cls, cls.forward)
    (weight,) = own.values()  # a norm, of which a model has many
    traits: list[Any] = [code, None if weight is None else weight.shape]
    for name in names:
        if name not in own:
            value = held.get(name)
            traits.append(value if type(value) in _NUMBERS else _said(_attribute(module, name)))
    return tuple(traits)


def _traits(module: Any, path: str, names: tuple[str, ...] | None) -> Iterator[Any]:
    held, cls = module.__dict__, module.__class__
    yield path, class_code(cls, cls.forward)
    for tensors in (held["_parameters"], held["_buffers"]):
        for name, tensor in tensors.items():
            yield name, None if tensor is None else (tensor.shape, str(tensor.dtype))
    if names is None:
        for name in sorted(held.keys() - _NOT_READ):
            if (said := _said(held[name])) is not None:
                yield name, said
    else:
        for name in names:
            if (said := _said(_attribute(module, name))) is not None:
                yield name, said
    for name, child in held["_modules"].items():
        if child is not None:
            yield from _traits(child, f"{path}.{name}", None)


def _attribute(module: Any, name: str) -> Any:
    """The value of a name that may be a class's, or dotted; None where there is none."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _said(value: Any) -> Any:
    """Say a value in numbers and strings; None for what a module holds as its own (tensors, children, methods)."""
    if type(value) in _NUMBERS:
        return value
    if value is None or isinstance(value, (torch.Tensor, nn.Module, MethodType)):
        return None
    if isinstance(value, (tuple, list)):
        return tuple(_said(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(name), _said(value[name])) for name in sorted(value, key=str))
    if isinstance(value, (FunctionType, partial)):
        return function_code(value)
    if isinstance(value, (torch.dtype, type)) or callable(value):
        return (
            str(value) if isinstance(value, torch.dtype) else getattr(value, "__qualname__", type(value).__qualname__)
        )
    space = getattr(value, "__dict__", None)
    if space is None:
        return None
    numbers = sorted((name, repr(held)) for name, held in space.items() if type(held) in _NUMBERS)
    return type(value).__qualname__, tuple(numbers)


# --------------------------------------------------------------------------------------------------------------- code


@lru_cache(maxsize=1024)
def class_code(cls: type, forward: Any) -> str:
    """Return the hash of a class's own code: its forward, and all functions of it and its bases below `nn.Module`.

    `forward` is `cls.forward`, which some libraries exchange; with another one the answer is another.
    """
    digest = hashlib.sha256(f"{cls.__module__}.{cls.__qualname__}".encode())
    seen: set[int] = set()
    _add(digest, forward, seen)
    for base in cls.__mro__:
        if base not in (nn.Module, object):
            for name in sorted(vars(base)):
                value = vars(base)[name]
                digest.update(name.encode())
                _add(digest, getattr(value, "fget", None) or getattr(value, "__func__", value), seen)
    return digest.hexdigest()


def function_code(function: Any) -> str:
    """Return the hash of a function: its code and that of functions in it, its defaults, and what its closure holds."""
    digest = hashlib.sha256()
    _add(digest, function, set())
    return digest.hexdigest()


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    """Add a value to a hash. Nothing may differ between processes: no addresses, no order of sets."""
    if isinstance(value, CodeType):
        names = (value.co_names, value.co_varnames, value.co_freevars)
        digest.update(value.co_code + repr(names).encode())
        for constant in value.co_consts:
            _add(digest, constant, seen)
    elif isinstance(value, (tuple, list)):
        digest.update(b"(")
        for item in value:
            _add(digest, item, seen)
        digest.update(b")")
    elif isinstance(value, dict):
        _add(digest, sorted(value.items(), key=repr), seen)
    elif isinstance(value, frozenset):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif value is None or value is Ellipsis or isinstance(value, (int, float, complex, str, bytes)):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    elif isinstance(value, partial):
        _add(digest, (value.func, value.args, sorted(value.keywords.items())), seen)
    elif isinstance(value, FunctionType):
        _add_function(digest, value, seen)
    else:
        kind = type(value)
        digest.update(f"{kind.__module__}.{kind.__qualname__} {getattr(value, '__qualname__', '')}".encode())


def _add_function(digest: Any, function: FunctionType, seen: set[int]) -> None:
    """Add a function, and of the globals that it names the numbers and the functions, those of modules too.

    Functions of libraries whose version every proof names are added where they stand in the same module alone.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    digest.update(f"{function.__module__}.{function.__qualname__}".encode())
    _add(digest, function.__code__, seen)
    _add(digest, (function.__defaults__, sorted((function.__kwdefaults__ or {}).items())), seen)
    for cell in function.__closure__ or ():
        try:
            _add(digest, cell.cell_contents, seen)
        except ValueError:  # not filled yet
            continue
    names = function.__code__.co_names
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and not _is_pinned(value.__name__):
            named = [vars(value).get(other) for other in names]
        else:
            named = [value]
        for value in named:
            if isinstance(value, FunctionType):
                if value.__module__ == function.__module__ or not _is_pinned(value.__module__):
                    _add(digest, value, seen)
            elif type(value) in _NUMBERS or (isinstance(value, (tuple, list, dict)) and _is_data(value)):
                _add(digest, value, seen)


def _is_pinned(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in _PINNED or top in sys.stdlib_module_names


_PINNED = frozenset({"torch", "transformers", "kernelwise", "triton"})
"""Libraries of which a proof names the version."""


def _is_data(value: Any) -> bool:
    """Return whether a value is made of numbers and names alone, and so is the same in every process."""
    if isinstance(value, dict):
        return all(map(_is_data, value)) and all(map(_is_data, value.values()))
    return value is None or type(value) in _NUMBERS or (isinstance(value, (tuple, list)) and all(map(_is_data, value)))
