"""Guards: what is looked at in every call of a kernel that was put in, and why the layer's own code runs in its place.

The functions that `_bind` writes call these; each costs a fraction of a microsecond. The report counts the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernelwise._data import Recognition
from kernelwise._discover import STATE
from kernelwise._recognize import found_at, kinds_of, said

INPUT = "the input has a dtype, device or tensor class that the kernel does not take"
UNPROVEN = "its arguments do not fit together as those that the recognition was proven with"
MORE = "it was called with a keyword that only its decorator takes"
CHANGED = "what decides the computation was replaced or hooked since the kernel went in; kernelize again"
REFUSED = "the kernel refused the input"
FORWARD_AD = "derivatives were computed in forward mode (torch.func.jvp), which kernels would drop"
NO_BACKWARD = "a gradient was needed and the kernel has no backward"
LOST_GRADIENT = "the kernel gave an output without gradient"


def needs_grad(*arguments: Any) -> bool:
    """Return whether a gradient can flow into any of the arguments."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, (tuple, list)):
            if needs_grad(*argument):
                return True
        elif isinstance(argument, dict) and needs_grad(*argument.values()):
            return True
    return False


def has_trained(module: torch.nn.Module) -> bool:
    """Return whether a parameter of a module needs a gradient."""
    # Its own parameters first, and directly: `module.parameters()` costs more than all the rest of a call.
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    return bool(module._modules) and any(parameter.requires_grad for parameter in module.parameters())


def carries_grad(output: Any) -> bool:
    """Return whether every floating tensor of an output is part of the graph."""
    if isinstance(output, Tensor):
        return output.requires_grad or not (output.is_floating_point() or output.is_complex())
    if isinstance(output, dict):
        return all(map(carries_grad, output.values()))
    return not isinstance(output, (tuple, list)) or all(map(carries_grad, output))


def unchanged(self: torch.nn.Module) -> bool:
    """Return whether everything that a layer's recognition depends on still is what it was when its kernel went in."""
    state = self.__dict__.get(STATE)
    if state is None:  # undone while the call was under way
        return False
    for name, value in state.pins.items():
        now = self._modules[name] if name in self._modules else self.__dict__.get(name)
        if now is None:  # a parameter that was registered as None may be there now
            now = self._parameters.get(name, self._buffers.get(name))
        if now is not value and not (
            type(now) is type(value) and isinstance(now, (bool, int, float, str)) and now == value
        ):
            return False
        if isinstance(now, torch.nn.Module) and (
            now._forward_hooks or now._forward_pre_hooks or now._backward_hooks or now._backward_pre_hooks
        ):
            return False
    return True


def holding(recognition: Recognition) -> Callable[[torch.nn.Module], bool] | None:
    """Return what says whether a layer still has the values inside of its attributes, and the modes, it was recognised by."""
    held = tuple((tuple(path.split(".")), value) for path, value in recognition.held)
    modes = tuple(tuple(path.split(".")) for path in recognition.modes)
    if not held and not modes:
        return None

    def holds(self: torch.nn.Module) -> bool:
        for path in modes:
            if getattr(follow(self, path), "training", None) is not self.training:
                return False
        for path, value in held:
            now = found_at(self, path)
            if path[-1] == "_modules":
                if kinds_of(now) != value:
                    return False
            elif type(value) is tuple:
                if said(now) != value:
                    return False
            elif type(now) is not type(value) or now != value:
                return False
        return True

    return holds


def follow(value: Any, path: tuple[str, ...]) -> Any:
    """Return what stands at a path below a module: children, items of lists and dicts, attributes; None where nothing does."""
    for name in path:
        children = getattr(value, "_modules", None)
        if isinstance(children, dict) and name in children:
            value = children[name]
        elif isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, (list, tuple)):
            value = value[int(name)] if name.isdigit() and int(name) < len(value) else None
        else:
            value = getattr(value, name, None)
    return value


def run_own(self: torch.nn.Module, why: str | None, *args: Any, **kwargs: Any) -> Any:
    """Run the layer's own code in place of its kernel and count why; never counts while compiling."""
    try:
        state = getattr(self, STATE)
    except AttributeError:  # undone while the call was under way
        return type(self).forward(self, *args, **kwargs)
    return state.run_own(self, why, args, kwargs)
