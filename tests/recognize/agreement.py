"""Run a recognised layer and the reference of its operation on the same inputs, and compare."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from exact import float64_mode
from torch import Tensor, nn

from kernelwise._applying._guards import follow
from kernelwise._data import Recognition
from kernelwise._recognize import recognize
from kernelwise._recognize._children import record_calls
from kernelwise._recognize._search import widths_of
from kernelwise.ops import OPERATIONS

SIZES = {"lead": (5,), "B": 2, "S": 5, "P": 3, "D": 16, "R": 8, "Hq": 4, "Hk": 2}


def reference_arguments(recognition: Recognition, module: nn.Module | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the reference: every role looked up where the recognition says."""
    arguments: dict[str, Any] = dict(recognition.options)
    for role, binding in recognition.roles:
        if binding.kind == "argument":
            arguments[role] = given[str(binding.value)]
        elif binding.kind == "attribute":
            arguments[role] = getattr(module, str(binding.value))
        elif binding.kind == "child":
            assert module is not None
            arguments[role] = first_of(follow(module, tuple(str(binding.value).split("."))))
        else:
            arguments[role] = binding.value
    return arguments


def first_of(child: nn.Module) -> Any:
    """A child that gives its first result alone, where it gives several."""
    if not isinstance(child, Block):
        return child

    def call(*args: Any) -> Tensor:
        result = child(*args)
        return result[0] if isinstance(result, tuple) else result

    return call


class Block(nn.Module):
    """Stands for a child of a layer: gives what it gives, as its own code would for one more weight."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.weight, self.length = nn.Parameter(torch.ones(width)), length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, *more = dict.fromkeys(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        y = torch.tanh(x * self.weight)
        for other in more:
            y = y + other.mean(-2, keepdim=True)
        return (y, *([None] * (self.length - 1))) if self.length else y


def with_blocks(layer: nn.Module, width: int) -> nn.Module:
    """A copy of a layer with blocks in place of the children whose arguments and results the layer only hands on.

    A layer without memory gets some, for what is left of it.
    """
    memo: dict[int, Any] = {}
    calls, _ = record_calls(layer, training=layer.training)
    for call in calls:
        if call.is_open:
            memo[id(layer.get_submodule(call.path))] = Block(width, call.lengths[0])
    copied = copy.deepcopy(layer, memo)
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied = copied.to_empty(device="cpu")
    randomize(copied, torch.Generator().manual_seed(7))
    return copied


def width_of(module: nn.Module) -> int:
    """The width of the layer's input."""
    for child in module.children():
        weight = getattr(child, "weight", None)
        if isinstance(recognize(child), Recognition) and isinstance(weight, Tensor) and weight.ndim == 1:
            return len(weight)  # a norm
    for child in module.children():
        if isinstance(getattr(child, "in_features", None), int):
            return int(child.in_features)
    for parameter in module.parameters():
        return int(parameter.shape[-1])
    return int(
        getattr(module, "normalized_shape", (24,))[-1]
    )  # a layer norm without weight knows its width all the same


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def assert_agrees(module: nn.Module, recognition: Recognition, given: dict[str, Tensor], call: Any = None) -> None:
    """Assert that a layer is what it was recognised as, in float64 to 1e-10 and in bf16 to one rounding."""
    call = module if call is None else call
    if OPERATIONS[recognition.op].norms:
        module = with_blocks(module, next(iter(given.values())).shape[-1])
        call = with_others(module, given)
    reference = OPERATIONS[recognition.op].reference

    def both(inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        own = call(**inputs)
        ours = reference(**reference_arguments(recognition, module, inputs))
        own, ours = (item if isinstance(item, tuple) else (item,) for item in (own, ours))
        if OPERATIONS[recognition.op].norms:
            own = own[:1]  # what else a layer gives comes from its children
        assert len(own) == len(ours)
        return list(zip(own, ours, strict=True))

    with torch.no_grad():
        wide = {key: to(value, torch.float64) for key, value in given.items()}
        module.double()
        with float64_mode():
            pairs = both(wide)
        for own, ours in pairs:
            assert own.shape == ours.shape
            assert (own - ours).abs().max() <= 1e-10 * max(1.0, float(own.abs().max()))
        for dtype in (torch.bfloat16, torch.float16):
            module.to(dtype)
            for own, ours in both({key: to(value, dtype) for key, value in given.items()}):
                assert own.dtype == ours.dtype
                error = (own.double() - ours.double()).abs().max()
                assert error <= 2 * torch.finfo(dtype).eps * float(own.double().abs().max()), (recognition, error)


def with_others(layer: nn.Module, given: dict[str, Any]) -> Any:
    """A layer called with something for every other argument that it needs."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    starred = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    others = {
        p.name: object()
        for p in list(parameters)[1:]
        if p.default is p.empty and p.kind not in starred and p.name not in given
    }
    return lambda **inputs: layer(**inputs, **others)


def to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def inputs_of(module: nn.Module, recognition: Recognition, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs for a recognised module, of the width that it takes."""
    names = [str(binding.value) for _, binding in recognition.roles if binding.kind == "argument"]
    width = width_of(module)
    if not OPERATIONS[recognition.op].norms:  # a norm inside, or a weight the other way round, may have another width
        width = next((w for w in dict.fromkeys((width, *widths_of(module))) if runs_at(module, w, len(names))), width)
    return {name: torch.randn(2, 5, width, generator=generator) for name in names}


def runs_at(module: nn.Module, width: int, count: int) -> bool:
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    try:
        with torch.no_grad():
            module(*(torch.zeros(2, 5, width, dtype=dtype) for _ in range(count)))
    except RuntimeError:
        return False
    return True


def function_inputs(function: Any, recognition: Recognition, generator: torch.Generator) -> dict[str, Any]:
    """Random inputs for a recognised function, by the names of its own parameters."""
    op = OPERATIONS[recognition.op]
    bindings = dict(recognition.roles)
    sizes: dict[str, Any] = {**SIZES, **dict(recognition.options)}
    choice = bindings.get("unsqueeze_dim")
    given: dict[str, Any] = {}
    if choice is not None:
        sizes["unsqueeze_dim"] = choice.value if choice.kind == "constant" else 2
        if choice.kind == "argument":
            given[str(choice.value)] = 2
    for role in op.roles:
        if role.kind == "argument":
            dtype = torch.complex64 if role.follows == "complex" else torch.float32
            given[str(bindings[role.name].value)] = torch.randn(role.shape(sizes), generator=generator, dtype=dtype)
    assert set(given) <= set(inspect.signature(function).parameters)
    return given
