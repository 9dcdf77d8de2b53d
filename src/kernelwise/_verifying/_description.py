"""Description: a module → data that a file can hold, and from these a stand-in for it in the process that checks a kernel."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def describe(module: nn.Module, reads: frozenset[str] | None) -> dict[str, Any]:
    """Describe a module by values that a file can hold: what of it the kernel reads, children with all they have."""

    def wanted(name: str) -> bool:
        return reads is None or name in reads

    cls = type(module)
    spaces = {
        n: {k: v for k, v in vars(value).items() if _can_be_sent(v)}
        for n, value in module.__dict__.items()
        if reads is not None and n in reads and hasattr(value, "__dict__") and not isinstance(value, nn.Module)
        if not isinstance(value, types.FunctionType) and not _can_be_sent(value)
    }
    return {
        "class": None
        if cls.__module__ == "__main__" or "<" in cls.__qualname__
        else [cls.__module__, cls.__qualname__],
        "training": module.training,
        "values": dict(_values(module, reads)),
        "spaces": spaces,
        "tensors": {
            name: (None if t is None else t.detach(), isinstance(t, nn.Parameter))
            for tensors in (module._parameters, module._buffers)
            for name, t in tensors.items()
            if wanted(name)
        },
        "children": {n: describe(m, None) for n, m in module._modules.items() if m is not None and wanted(n)},
    }


def rebuild(described: dict[str, Any], *, stub: bool) -> nn.Module:
    """Build a stand-in from its description: the root without a class, children of the classes they have."""
    cls: Any = nn.Module
    if not stub and described["class"] is not None:
        cls = importlib.import_module(described["class"][0])
        for name in described["class"][1].split("."):
            cls = getattr(cls, name)
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update(described["values"])
    module.__dict__.update({name: types.SimpleNamespace(**space) for name, space in described["spaces"].items()})
    for name, (tensor, is_parameter) in described["tensors"].items():
        if is_parameter:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        elif name not in module.__dict__:
            module._buffers[name] = tensor
    for name, child in described["children"].items():
        module._modules[name] = rebuild(child, stub=False)
    module.training = described["training"]
    return module


def _values(module: nn.Module, reads: frozenset[str] | None) -> Iterator[tuple[str, Any]]:
    """What a module holds besides tensors and children; of what is read, also attributes of its class and properties."""
    for name in module.__dict__.keys() - nn.Module().__dict__.keys() if reads is None else reads:
        if name in module._parameters or name in module._buffers or name in module._modules:
            continue
        try:
            value = getattr(module, name)
        except Exception:  # a property that fails, or nothing of this name: the kernel finds nothing there either
            continue
        if _can_be_sent(value):
            yield name, value


def _can_be_sent(value: Any) -> bool:
    """Return whether the other process can have a value: plain data, and functions that it can import."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value).__module__ in ("builtins", "torch")
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(_can_be_sent, value))
    if type(value) is dict:
        return all(map(_can_be_sent, value)) and all(map(_can_be_sent, value.values()))
    if isinstance(value, types.FunctionType) and value.__module__ != "__main__":
        return getattr(sys.modules.get(value.__module__), value.__name__, None) is value
    return False
