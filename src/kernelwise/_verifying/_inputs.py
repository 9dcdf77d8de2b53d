"""Inputs: a layer → samples of what it is given.

A sample is what one call of the layer was given, captured from the model or made for the layer's shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from kernelwise._data import Layer, Recognition
from kernelwise._verifying._copies import bare_copy
from kernelwise.ops import OPERATIONS, Role

P = ParamSpec("P")
R = TypeVar("R")

_NARROW = 16
"""Rows of fewer elements are made with care: see `_spread`."""

_MADE = {"B": 3, "S": 7, "H": 64, "I": 96, "Hq": 4, "Hk": 2, "D": 64, "R": 32}


def _on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw its numbers there: the same ones for every device, whatever the user's default device is."""

    @wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return there


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What one call of a layer was given: the arguments of its forward by name, and the module (None for a function).

    `upstream` are the gradients that the model's own backward gave its outputs, where the model computed a loss. `with_grad`
    names the arguments through which that backward went on; None where nobody has looked.
    """

    arguments: dict[str, Any]
    module: nn.Module | None
    captured: bool = False
    upstream: tuple[torch.Tensor | None, ...] = ()
    with_grad: tuple[str, ...] | None = None


class _Symbols(dict[str, Any]):
    """A number of its own for every size that a role's shape asks for: even, so that halves of them are whole."""

    def __missing__(self, name: str) -> int:
        self[name] = 2 * (1_000_003 + len(self))
        return int(self[name])

    def names(self) -> dict[int, str]:
        """The sizes that were asked for, by their numbers."""
        return {size: name for name, size in self.items() if isinstance(size, int) and size > 1_000_000}


def axes(recognition: Recognition | None, arguments: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return for each tensor argument the names of its dimensions ("B", "S", "H" ...); "" where a dimension has none.

    Of an operation that is not known, with a single tensor, the last dimension is "H" and those before it are rows.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    if recognition is None:
        if len(tensors) != 1 or any(isinstance(value, (tuple, list)) for value in arguments.values()):
            return {}
        return {name: _fitted(("B", "S", "H"), tensor.dim()) for name, tensor in tensors.items()}
    symbols = _Symbols(_options(recognition, arguments))
    found = {}
    for role, name in argument_roles(recognition):
        if name in tensors:
            shape, names = role.shape(symbols), symbols.names()
            found[name] = _fitted(tuple(names.get(size, "") for size in shape), tensors[name].dim())
    return found


def _fitted(names: tuple[str, ...], dims: int) -> tuple[str, ...]:
    """The names of the last dimensions; dimensions before those that a role has are rows like "B"."""
    return names[len(names) - dims :] if dims <= len(names) else ("",) * (dims - len(names)) + names


def argument_roles(recognition: Recognition) -> Iterator[tuple[Role, str]]:
    bound = dict(recognition.roles)
    for role in OPERATIONS[recognition.op].roles:
        binding = bound.get(role.name)
        if binding is not None and binding.kind == "argument":
            yield role, str(binding.value)


def _options(recognition: Recognition, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an operation, with the choices (`unsqueeze_dim`) that are arguments or constants."""
    chosen = dict(recognition.options)
    for name, binding in recognition.roles:
        if name in OPERATIONS[recognition.op].choices:
            chosen[name] = arguments.get(str(binding.value)) if binding.kind == "argument" else binding.value
    return chosen


@_on_cpu
def make_sample(
    layer: Layer, module: nn.Module | None, mode: str, *, device: torch.device, generator: torch.Generator
) -> Sample | None:
    """Make inputs for a layer from its operation and the shapes of its weights; None where they cannot be told."""
    found = layer.computes(mode)
    dtype = getattr(torch, layer.dtypes[0]) if layer.dtypes else torch.float32
    if found is None:
        required = [p for p in layer.signature if not p.has_default and not p.kind.startswith("var_")]
        if len(required) != 1 or module is None:
            return None
        width = next((p.shape[-1] for p in module.parameters() if p.dim()), _MADE["H"])
        x = torch.randn(_MADE["B"], _MADE["S"], width, generator=generator).to(device, dtype)
        return Sample({required[0].name: x}, module)
    sizes = {**_MADE, **_sizes_of(found, module)}
    n: dict[str, Any] = {**sizes, **{name: values[0] for name, values in OPERATIONS[found.op].choices.items()}}
    n |= {k: v for k, v in _options(found, {}).items() if v is not None}
    arguments = {name: _values(role, role.shape(n), dtype, device, generator) for role, name in argument_roles(found)}
    return Sample(arguments, module)


@_on_cpu
def made_real(sample: Sample, layer: Layer, mode: str, *, device: torch.device, generator: torch.Generator) -> Sample:
    """Give values to a sample that was captured on the meta device: shapes, dtypes and strides stay the model's."""
    found = layer.computes(mode)
    roles = {} if found is None else {name: role for role, name in argument_roles(found)}

    def real(value: Any, role: Role | None) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(real(item, role) for item in value)
        if isinstance(value, dict):
            return {name: real(item, None) for name, item in value.items()}
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return value
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        if value.is_complex():
            memory = torch.polar(torch.ones(span), torch.rand(span, generator=generator) * 6.3)
        elif role is not None and role.follows == "parameters":
            memory = torch.rand(span, generator=generator) * 2 - 1
        elif value.is_floating_point():
            memory = torch.randn(span, generator=generator)
        else:
            memory = torch.ones(span)  # a mask that hides nothing; an index that is there
        return memory.to(device, value.dtype).as_strided(value.shape, value.stride())

    arguments = {name: real(value, roles.get(name)) for name, value in sample.arguments.items()}
    return replace(sample, arguments=arguments, upstream=())


def _sizes_of(recognition: Recognition, module: nn.Module | None) -> dict[str, int]:
    """Read the sizes of an operation off the weights of a module."""
    sizes: dict[str, int] = {}
    if module is None:
        return sizes
    bound = dict(recognition.roles)
    for role in OPERATIONS[recognition.op].roles:
        binding = bound.get(role.name)
        if binding is None or binding.kind not in ("attribute", "child"):
            continue
        value = getattr(module, str(binding.value), None)
        symbols = _Symbols(dict(recognition.options))
        if binding.kind == "child":
            weight = (
                next((p for p in value.parameters() if p.dim() == 2), None) if isinstance(value, nn.Module) else None
            )
            if weight is not None:
                out, into = reversed(weight.shape) if type(value).__name__ == "Conv1D" else weight.shape
                wanted, names = role.shape(symbols)[-1], symbols.names()
                for parts in (1, 2):  # gate and up in one
                    if wanted / parts in names:
                        sizes.setdefault(names[wanted // parts], out // parts)
                sizes.setdefault("I" if role.name == "down" else "H", into)
        elif isinstance(value, torch.Tensor):
            shape, names = role.shape(symbols), symbols.names()
            for size, wanted in zip(value.shape, shape, strict=False):
                if wanted in names:
                    sizes[names[wanted]] = size
    return sizes


@_on_cpu
def resize(
    sample: Sample, recognition: Recognition, sizes: Mapping[str, int], generator: torch.Generator
) -> Sample | None:
    """Return a sample of the same layer at other sizes, with random weights; None where it cannot be rebuilt."""
    n: dict[str, Any] = {**sizes, **_options(recognition, sample.arguments)}
    first = next((v for v in sample.arguments.values() if isinstance(v, torch.Tensor)), None)
    dtype, device = (first.dtype, first.device) if first is not None else (torch.float32, torch.device("cpu"))
    arguments = dict(sample.arguments)
    try:
        for role, name in argument_roles(recognition):
            known = sample.arguments.get(name)
            kind = known.dtype if isinstance(known, torch.Tensor) else dtype
            arguments[name] = _values(role, role.shape(n), kind, device, generator)
        if sample.module is None:
            return Sample(arguments, None)
        module = bare_copy(sample.module, torch.Tensor.clone)
        for role in OPERATIONS[recognition.op].roles:
            binding = dict(recognition.roles).get(role.name)
            if binding is None or binding.kind not in ("attribute", "child"):
                continue
            if binding.kind == "child":
                if type(module._modules[str(binding.value)]) is not nn.Linear:
                    return None
                module._modules[str(binding.value)] = _linear(role, n, module._modules[str(binding.value)], generator)
            elif isinstance(parameter := module._parameters.get(str(binding.value)), torch.Tensor):
                empty = torch.empty(role.shape(n), dtype=parameter.dtype, device=parameter.device)
                module._parameters[str(binding.value)] = nn.Parameter(random_weight(empty, generator))
    except (KeyError, TypeError):  # a size that these do not have
        return None
    return Sample(arguments, module)


def _linear(role: Role, n: Mapping[str, Any], found: Any, generator: torch.Generator) -> nn.Linear:
    width_in = n["I"] if role.name == "down" else n["H"]
    weight = found.weight
    # Without the usual first weights, which would draw from the user's random numbers.
    linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, width_in, role.shape(n)[-1], bias=found.bias is not None, device=weight.device, dtype=weight.dtype
    )
    for parameter in linear.parameters():
        parameter.data = random_weight(parameter.detach(), generator)
    return linear


def _values(
    role: Role, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    if role.follows == "complex":
        return torch.polar(torch.ones(shape), torch.rand(shape, generator=generator) * 6.3).to(device)
    if role.follows == "parameters":  # cosines and sines: general, the second half need not repeat the first
        return (torch.rand(shape, generator=generator) * 2 - 1).to(device, dtype)
    values = _spread(shape, generator) if 2 < shape[-1] < _NARROW else torch.randn(shape, generator=generator)
    values = values.to(device, dtype)
    # Heads that stand before the sequence are in models a transposed view of [B, S, heads, D].
    is_view = role.name in ("q", "k", "x") and len(shape) == 4
    return values.transpose(1, 2).contiguous().transpose(1, 2) if is_view else values


def _spread(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random rows whose numbers lie apart from each other, in any order.

    In a narrow row of any numbers, all may be nearly zero or nearly equal; what a norm divides by is then nearly nothing, and
    one such row has all of the largest errors.
    """
    apart = torch.linspace(-1.5, 1.5, shape[-1]) + 0.1 * torch.randn(shape, generator=generator)
    return apart.gather(-1, torch.rand(shape, generator=generator).argsort(-1))


@_on_cpu
def random_weight(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return weights that are nothing special: norms within +-1.5, matrices that keep the size of what they multiply."""
    if not tensor.is_floating_point():
        return tensor.clone()
    if tensor.dim() < 2:
        return (torch.rand(tensor.shape, generator=generator) * 3 - 1.5).to(tensor)
    weights: torch.Tensor = torch.randn(tensor.shape, generator=generator) * float(max(tensor.shape[-1], 1)) ** -0.5
    return weights.to(tensor)


def with_defaults(sample: Sample, defaults: Mapping[str, Any]) -> Sample:
    """Return a sample with a value for every parameter of the forward."""
    return replace(sample, arguments={**defaults, **sample.arguments})
