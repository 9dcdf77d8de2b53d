"""What was not recognised in a model, and why: every such layer in a line, or one beside the operation it looks most like.

Beside `discover`, which lists the layers where a kernel can go. Nothing here is needed to put kernels in; it is for whoever
asks why a layer keeps its own code, or wants to add an operation.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kernelwise._data import Recognition
from kernelwise._errors import KernelwiseError
from kernelwise._recognize import Unknown, functions_called, near_miss, recognize
from kernelwise._reference import nearest
from kernelwise.ops import layer_name

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class UnknownLayer:
    """A module that computes no known operation, or a function that its forward calls. `like` is what it nearly is."""

    path: str
    name: str  # the class, or the name of the function
    reason: str
    like: str | None = None


def unknown_layers(model: nn.Module) -> tuple[UnknownLayer, ...]:
    """Return the modules of a model in which no operation is recognised in inference, and functions that could be traced.

    Containers are left out, and functions that take or give something else than tensors.
    """
    found = []
    like: dict[object, str | None] = {}
    for path, module in model.named_modules():
        for name, what, answer in _answers(path, module):
            if not isinstance(answer, Unknown) or isinstance(what, _CONTAINERS):
                continue
            key = (type(module) if what is module else what, answer.graph)
            if key not in like:
                near = near_miss(what, training=False) if answer.graph is not None else None
                like[key] = near.op if near is not None else None
            found.append(UnknownLayer(name, _named(what), answer.reason, like[key]))
    return tuple(found)


def explain(model: nn.Module, path: str) -> str:
    """Return what the layer at a path computes: its operation with its roles, or two canonical graphs side by side.

    A path is that of a module, and everything about the functions that its forward calls comes along; or it names one of
    these functions (`model.layers.0.self_attn.apply_rotary_pos_emb`).

    Raises:
        KernelwiseError: nothing stands at that path.
    """
    known: list[str] = []
    for module_path, module in model.named_modules():
        answers = list(_answers(module_path, module))
        chosen = (
            answers if module_path == path else [item for item in answers[1:] if path in _places(module_path, item)]
        )
        if chosen:
            return "\n\n".join(_explanation(name, what, answer) for name, what, answer in chosen)
        known += [name for name, _, _ in answers]
    raise KernelwiseError(f"the model has nothing at {path!r}{nearest(path, known)}")


def _answers(
    path: str, module: nn.Module
) -> Iterator[tuple[str, nn.Module | types.FunctionType, Recognition | Unknown]]:
    """The module itself, then the functions that its forward calls and that are recognised or could be traced."""
    yield path, module, recognize(module, training=False)
    for name, function, answer in functions_called(module):
        if isinstance(answer, Recognition) or answer.graph is not None:
            yield f"{path}.{name}".lstrip("."), function, answer


def _places(
    module_path: str, function: tuple[str, nn.Module | types.FunctionType, Recognition | Unknown]
) -> tuple[str, ...]:
    """Where a function stands: under its own name, and under the one that `discover` gives its layer."""
    path, _, answer = function
    name = layer_name(answer) if isinstance(answer, Recognition) else None
    return (path, f"{module_path}.{name}") if name else (path,)


def _named(what: nn.Module | types.FunctionType) -> str:
    return type(what).__name__ if isinstance(what, nn.Module) else f"{what.__name__}()"


def _explanation(path: str, what: nn.Module | types.FunctionType, answer: Recognition | Unknown) -> str:
    head = f"{path or '(the model itself)'} ({_named(what)})"
    if isinstance(answer, Recognition):
        lines = [f"{head} is {answer.op}{_options(answer.options)}"]
        width = max(len(role) for role, _ in answer.roles)
        return "\n".join(
            [*lines, *(f"  {role:{width}}  the {binding.kind} {binding.value}" for role, binding in answer.roles)]
        )
    lines = [f"{head} is unknown: {answer.reason}"]
    near = near_miss(what, training=False)
    if near is not None:
        lines += [f"  nearest  {near.op}{_options(near.options)}; lines that differ are marked", "", near.side_by_side]
    elif answer.graph is not None:
        lines += ["  it computes", "", answer.graph]
    return "\n".join(lines)


def _options(options: tuple[tuple[str, object], ...]) -> str:
    return f" ({', '.join(f'{name}={value}' for name, value in options)})" if options else ""
