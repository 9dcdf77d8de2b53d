"""What a forward reads from its module: what an answer that is remembered depends on."""

from __future__ import annotations

import enum
import functools
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MISSING = "<missing>"
OF_THE_MODULE = "<the mode of the module>"
"""Stands for a `training` flag that was read where an answer is about a mode: what counts is that all flags agree."""
Token = Any
SCALARS = frozenset({bool, int, float, str, type(None)})
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)


@dataclass(slots=True)
class Reads:
    """The attributes that a traced forward has read, and what stood there: what a cached answer depends on.

    A path is a tuple of names, from the module (`("config", "eps")`, `("act_fn", "training")`). `asked` has the paths below
    children that the module's own code asks for (`self.gate.bias`), not that of a child.
    """

    tokens: dict[tuple[str, ...], Token] = field(default_factory=dict)
    asked: set[tuple[str, ...]] = field(default_factory=set)

    def note(self, path: tuple[str, ...], value: Any) -> None:
        """Note that the forward has read `value` at `path`."""
        self.tokens.setdefault(path, token(value))

    def ask(self, path: tuple[str, ...], value: Any) -> None:
        """Note that the forward has asked a child for `value` at `path`."""
        self.asked.add(path)
        self.note(path, value)


def token(value: Any) -> Token:
    """Return what a trace can see of `value`, as something that can be compared and that keeps nothing alive."""
    kind = type(value)
    if kind in SCALARS:
        return (kind, value)
    if isinstance(value, torch.Tensor):
        floating = value.dtype.is_floating_point
        return ("tensor", None if floating else value.dtype, value.shape)
    if isinstance(value, nn.Module):
        return child_token(value)
    if isinstance(value, (tuple, list)):
        return (kind, tuple(token(item) for item in value))
    if isinstance(value, dict):
        return (kind, tuple((key, token(item)) for key, item in value.items()))
    if isinstance(value, types.MethodType):
        return ("method", weakref.ref(value.__func__))
    if isinstance(value, property):
        return ("property", value.fget if value.fget is None else weakref.ref(value.fget))
    if isinstance(value, functools.partial):
        return ("partial", token(value.func), token(value.args), token(value.keywords))
    if isinstance(value, (type, types.FunctionType)):
        return weakref.ref(value)
    if isinstance(value, PLAIN):
        return (kind, value)
    if isinstance(value, CODE):
        return value
    return ("object", weakref.ref(kind))


def said(value: Any) -> Any:
    """What a value is, as plain data: scalars as they are, of containers all items, of anything else which it is by name.

    For what a call looks at again: it can be hashed, copied and pickled, and keeps nothing alive.
    """
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind in (list, tuple):
        return (kind.__name__, *((type(item).__name__, said(item)) for item in value))
    if kind is dict:
        return ("dict", *((type(key).__name__, said(key), type(v).__name__, said(v)) for key, v in value.items()))
    if isinstance(value, enum.Enum):
        return (kind.__qualname__, value.name)
    if isinstance(value, functools.partial):
        return ("partial", said(value.func), said(value.args), said(value.keywords))
    if isinstance(value, PLAIN) and not isinstance(value, type):
        return (kind.__qualname__, str(value))
    if isinstance(value, (type, *CODE)):
        return (getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", "")))
    return ("one", kind.__module__, kind.__qualname__)


def child_token(module: nn.Module) -> Token:
    """What decides how a trace goes on at a child: its class, whether it is a function or a leaf, what it is made of."""
    only_function = is_function(module)
    return (weakref.ref(type(module)), only_function, contents(module, only_function))


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def contents(module: nn.Module, only_function: bool) -> Token:
    """Names and kinds of the children of a function or of a container, which a trace looks into; None for a leaf."""
    if not only_function and not isinstance(module, _CONTAINERS):
        return None
    return tuple((name, None if child is None else child_token(child)) for name, child in module._modules.items())


def is_child_token(value: Token) -> bool:
    """Whether a token is one that `child_token` makes."""
    return isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], weakref.ref) and type(value[1]) is bool


def has_hooks(module: nn.Module) -> bool:
    """Whether anything but the class's own forward runs when this module is called."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or d.get("_compiled_call_impl") is not None
        or ("forward" in d and not is_own_code(module, d["forward"]))
        or type(module).__call__ is not nn.Module.__call__
    )


def is_function(module: nn.Module) -> bool:
    """Whether a module is nothing but a function: no parameters, no buffers, nothing around its forward."""
    d = module.__dict__
    for tensors in (d["_parameters"], d["_buffers"]):
        for tensor in tensors.values():
            if tensor is not None:
                return False
    for child in d["_modules"].values():
        if child is not None and not is_function(child):
            return False
    return not has_hooks(module)


def is_own_code(module: nn.Module, forward: object) -> bool:
    """Whether a forward on an instance stands for its class's: it runs a kernel of ours, or it is the class's, bound.

    The `kernels` library leaves the latter on every layer that it looks at, also where it replaces nothing.
    """
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    # The mark is the function itself: decorators that copy attributes to wrappers copy a mark that is not theirs.
    own = (getattr(forward.__func__, "__kernelwise__", None), type(module).forward)
    return any(function is forward.__func__ for function in own)
