"""Run a forward on fake tensors and write down what it computes."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from kernelwise._recognize._graph import Graph
from kernelwise._recognize._reads import is_own_code
from kernelwise._recognize._record import Untraceable
from kernelwise._recognize._stand_in import Stage, run


def trace(stage: Stage, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Return the canonical graph of `function(*args, **kwargs)`. Raises `Untraceable`.

    Tensors among the arguments must have been made inputs of the stage's recorder.
    """
    return stage.recorder.finish(run(stage, function, args, kwargs))


def innermost_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the function under every hook: what the module itself computes, `self` first.

    Raises `Untraceable` where somebody has put another forward on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return type(module).forward
    if "_hf_hook" in module.__dict__:  # accelerate keeps the forward that its hook is around here
        forward = module.__dict__.get("_old_forward", forward)
    if is_own_code(module, forward):
        return type(module).forward
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__
    raise Untraceable("its forward was replaced on this instance")


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function by name, without those that need not be given and that its code never reads."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    parameters = dict(inspect.signature(function).parameters)
    if code is None:
        return parameters
    given = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in _STARRED}
    return {name: p for name, p in parameters.items() if name in given or name in _names_read(code)}


_STARRED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@functools.lru_cache(maxsize=4096)
def _names_read(code: types.CodeType) -> frozenset[str]:
    read: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD", "STORE_FAST_LOAD")):
            read.update(instruction.argval if isinstance(instruction.argval, tuple) else (str(instruction.argval),))
    return frozenset(read)
