"""Bind the kernel of a whole layer: how it calls the layer's children, and a residual sum together with its norm.

Children are called by the expressions that recognition has recorded, through `__call__`, so that hooks, adapters and
quantisation stay where they are. Only the norm after the sum is not called, and only where it runs the kernel that the fused
one stands for: a hook on it, another kernel, or its own code, and the sum and the norm run apart.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kernelwise._data import Kernel, Layer, Recognition
from kernelwise._discover import STATE
from kernelwise._errors import ApplyError
from kernelwise._forwards import is_dispatcher
from kernelwise._recognize import recognize
from kernelwise._recognize._children import record_calls
from kernelwise._recognize._passing import HIDDEN, ChildCall, Given

Call = Callable[..., Any]
APART = (
    "the residual sum and the norm after it ran apart, as the norm has hooks, other code or an input of another kind"
)

_any_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
_PLAIN = frozenset({torch.Tensor, nn.Parameter})
REFUSALS = (RuntimeError, ValueError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Passing:
    """How a layer's kernel gets its children: an expression for each role, and an argument that must be None.

    Hidden states with fewer than `least` elements are left to the layer's own code: there a call costs more than it saves.
    """

    children: tuple[tuple[str, str], ...]
    refused: str | None
    sum_norm: Call | None
    least: int = 0


def passing_of(module: nn.Module, layer: Layer, kernel: Kernel, mode: str) -> Passing | None:
    """Return how the kernel of a layer calls its children; None for layers that are one operation.

    Raises:
        ApplyError: the layer calls them in a way that cannot be written down again.
    """
    found = layer.computes(mode)
    if found is None or not found.holds_layers:
        return None
    calls, refused = record_calls(module, training=mode.startswith("training"))
    if not calls or dict(found.options)["passing"] != "plain":
        raise ApplyError(
            f"{layer.path} hands its arguments to its children in a way that cannot be repeated\n"
            '  go on      keep the own code there ("none")'
        )
    more = next((p.name for p in layer.signature if p.kind == "var_keyword"), None)
    by_path = {call.path: _expression(call, more) for call in calls}
    children = tuple(
        (role, by_path[str(binding.value)])
        for role, binding in found.roles
        if binding.kind == "child" and str(binding.value) in by_path
    )
    wants_sum = any(parameter.name == "sum_norm" for parameter in kernel.signature)
    return Passing(
        children,
        refused,
        _sum_norm_of(module, found, kernel, mode) if wants_sum else None,
        # A function that has a bound of its own is one that verify has put around the kernel: it runs on few elements too.
        getattr(kernel.function, "LEAST", getattr(_module_of(kernel), "LEAST", 0)),
    )


def _module_of(kernel: Kernel) -> Any:
    return sys.modules.get(getattr(kernel.function, "__module__", ""))


def _expression(call: ChildCall, more: str | None) -> str:
    """The source of a function of the hidden states that calls a child as the layer does and takes what it takes."""
    first, *rest = call.path.split(".")
    child = f"_kw_children[{first!r}]" + "".join(f"._modules[{name!r}]" for name in rest)
    if call.args == (HIDDEN,) and not call.kwargs and call.lengths == (0,):
        return child
    passed = [_source(item) for item in call.args]
    for key, item in call.kwargs:
        passed.append(f"**{more}" if type(item) is Given and item.name == "**kwargs" else f"{key}={_source(item)}")
    source = f"{child}({', '.join(passed)})"
    if 0 not in call.lengths:
        source += "[0]"
    elif call.lengths != (0,):
        source = f"_kw_first({source})"
    return f"lambda _kw_x: {source}"


def _source(item: Any) -> str:
    if item is HIDDEN:
        return "_kw_x"
    return str(item.name) if type(item) is Given else repr(item)


def first(result: Any) -> Any:
    """Return what a child gives, or the first of it."""
    return result[0] if isinstance(result, tuple) else result


def _sum_norm_of(module: nn.Module, found: Recognition, kernel: Kernel, mode: str) -> Call:
    """Return `(layer, added, x) -> (norm(x + added), x + added)`, in one pass where the norm runs the builtin kernel."""
    name = str(dict(found.roles)["mlp_norm"].value)
    computes = recognize(module.get_submodule(name), training=mode.startswith("training"))
    sums = getattr(_module_of(kernel), "SUMS", {})
    if not isinstance(computes, Recognition) or computes.op not in sums:
        return _apart(name)
    return _together(name, computes, *sums[computes.op])


@lru_cache(maxsize=256)
def _apart(name: str) -> Call:
    def sum_norm(layer: nn.Module, added: Tensor, x: Tensor) -> tuple[Any, Tensor]:
        h = x + added
        return layer.get_submodule(name)(h), h

    return sum_norm


@lru_cache(maxsize=256)
def _together(name: str, computes: Recognition, alone: Call, fused: Call) -> Call:
    roles = {role: binding for role, binding in computes.roles if role != "x"}
    # An option that the norm's own kernel does not take makes no difference to it.
    by_norm, by_both = inspect.signature(alone).parameters, inspect.signature(fused).parameters
    options = {name: value for name, value in computes.options if name in by_norm}
    missing = [name for name in options if name not in by_both]
    if any(options[name] != by_norm[name].default for name in missing):
        return _apart(name)
    options = {name: value for name, value in options.items() if name in by_both}
    constants = {role: binding.value for role, binding in roles.items() if binding.kind == "constant"}
    read = tuple((role, str(binding.value)) for role, binding in roles.items() if binding.kind == "attribute")

    def sum_norm(layer: nn.Module, added: Tensor, x: Tensor) -> tuple[Any, Tensor]:
        norm = layer.get_submodule(name) if "." in name else layer._modules[name]
        assert norm is not None
        if runs(norm, alone) and type(added) in _PLAIN and added.dtype == x.dtype and added.shape == x.shape:
            values = {role: getattr(norm, attribute) for role, attribute in read}
            if all(type(value) in _PLAIN or not isinstance(value, Tensor) for value in values.values()):
                try:
                    normed, h = fused(added, x, **values, **constants, **options)
                except torch.OutOfMemoryError:
                    raise
                except REFUSALS:
                    pass
                else:
                    return normed, h
        state = layer.__dict__.get(STATE)
        if state is not None:
            state.fallbacks[APART] = state.fallbacks.get(APART, 0) + 1
        h = x + added
        return norm(h), h

    return sum_norm


def runs(norm: nn.Module, kernel: Call) -> bool:
    """Return whether calling a norm runs this kernel and nothing else."""
    held = norm.__dict__
    state = held.get(STATE)
    if state is None or not is_dispatcher(held.get("forward")):
        return False
    call = state.training if norm.training else state.inference
    return getattr(call, "kernel_function", None) is kernel and not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or held.get("_compiled_call_impl") is not None
        or _any_hook()
    )
