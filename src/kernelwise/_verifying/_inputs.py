"""Inputs: a layer → the cases that a kernel for it is tried on.

A sample is what one call of the layer was given, captured from the model or made for the layer's shapes. Cases are made
from it: the same at other scales, with other weights, with other strides, with fewer and more rows, with NaN. Where the
operation is known, there are also layers of other widths than the model's.
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
from kernelwise._verifying._observe import Case
from kernelwise.ops import OPERATIONS, Role

P = ParamSpec("P")
R = TypeVar("R")

NAN = float("nan")
SCALES = (1e-3, 1e-2, 1e2)
"""Besides 1. At 1e-3 the square of an input is as small as the usual epsilon, so that a wrong epsilon shows."""

_UNEVEN = (1.0, 2.0**-10, 2.0**-5, 0.0)
"""By what rows are multiplied so that some are much larger than others, as the first token's are in many models; the rows of
padding are often zero."""

_SIZES: tuple[dict[str, int], ...] = (
    {"B": 5, "S": 67, "H": 3, "I": 2, "Hq": 1, "Hk": 1, "D": 2, "R": 2},
    {"B": 1, "S": 5, "H": 7, "I": 5, "Hq": 3, "Hk": 1, "D": 6, "R": 4},
    {"B": 3, "S": 1, "H": 33, "I": 65, "Hq": 5, "Hk": 5, "D": 34, "R": 18},
    {"B": 2, "S": 7, "H": 100, "I": 12, "Hq": 2, "Hk": 2, "D": 100, "R": 50},
    {"B": 1, "S": 3, "H": 577, "I": 129, "Hq": 7, "Hk": 1, "D": 130, "R": 66},
    {"B": 1, "S": 2, "H": 2305, "I": 257, "Hq": 9, "Hk": 3, "D": 258, "R": 130},
)
"""Rows of three elements are the narrowest: of two, a layer norm makes 1 and -1 whatever they are, and its gradient is the
rounding error alone. There are many of them, so that the largest error of the layer's own code is no matter of luck."""

_MANY_ROWS = {"B": 1, "S": 65_541, "H": 8, "I": 8, "Hq": 1, "Hk": 1, "D": 8, "R": 4}
"""More rows than a grid of blocks has in its second dimension, and no multiple of anything."""

_MORE_ROWS = 259
"""More rows than kernels take at a time, and no multiple of anything: at the layer's own width, where that is little memory."""

_NARROW = 16
"""Rows of fewer elements are made with care: see `_spread`."""

_MANY_ELEMENTS = 1 << 24
"""The most elements that rows of the sample are repeated to."""

FAR = 1 << 31
"""Elements: more than an index of 32 bits with a sign can count."""

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
    for role, name in _argument_roles(recognition):
        if name in tensors:
            shape = role.shape(symbols)
            names = {size: symbol for symbol, size in symbols.items() if isinstance(size, int) and size > 1_000_000}
            found[name] = _fitted(tuple(names.get(size, "") for size in shape), tensors[name].dim())
    return found


def _fitted(names: tuple[str, ...], dims: int) -> tuple[str, ...]:
    """The names of the last dimensions; dimensions before those that a role has are rows like "B"."""
    return names[len(names) - dims :] if dims <= len(names) else ("",) * (dims - len(names)) + names


def _argument_roles(recognition: Recognition) -> Iterator[tuple[Role, str]]:
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


def cases(layer: Layer, sample: Sample, mode: str, *, generator: torch.Generator) -> Iterator[Case]:
    """Yield every case for a layer, the most telling first.

    The first is the sample as it is, run twice over for what only shows at a second call.
    """
    found = layer.computes(mode)
    named = axes(found, sample.arguments)
    given, module = sample.arguments, sample.module
    yield Case("as given", given, module, repeat=True)
    if any(gradient is not None for gradient in sample.upstream):
        yield Case("the model's gradients", given, module, upstream=sample.upstream, fill=NAN)
    for scale in SCALES:
        yield Case(f"scale {scale:g}", _scaled(given, found, scale), module, fill=NAN)
    yield Case("rows of different sizes", _scaled(given, found, _UNEVEN), module, fill=NAN)
    if module is not None and any(True for _ in module.parameters()):
        other = bare_copy(module, lambda tensor: random_weight(tensor, generator))
        yield Case("random weights", given, other, fill=NAN)
        yield Case("only weights need gradients", given, module, grad="weights")
    yield Case("only inputs need gradients", given, module, grad="inputs")
    yield Case("no gradients", given, module, grad="none", fill=NAN)
    yield Case("the same memory with other values", given, module, grad="none", reused=True)
    yield Case("inference mode", given, module, grad="none", how="inference mode")
    yield Case("another call in between", given, module, between=True)
    yield Case("another call in between, no gradients", given, module, grad="none", between=True)
    yield Case("transposed gradients", given, module, handed="transposed")
    yield Case("one gradient for all rows", given, module, handed="expanded")
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    if any(not tensor.is_contiguous() for tensor in tensors):
        yield Case("contiguous inputs", _mapped(given, torch.Tensor.contiguous), module, fill=NAN)
    yield Case("inputs with gaps", _mapped(given, _with_gaps), module, fill=NAN)
    yield Case("transposed inputs", _mapped(given, _transposed), module, fill=NAN)
    for dims in (2, 3, 4):
        if reshaped := _of_dims(given, named, dims):
            yield Case(f"inputs of {dims} dimensions", reshaped, module, fill=NAN)
    if any("S" in names or "B" in names for names in named.values()):
        yield Case("one row", _cut(given, named, {"B": 1, "S": 1}), module, fill=NAN)
        yield Case("odd number of rows", _cut(given, named, {"B": 1, "S": 3}), module, fill=NAN)
        yield Case("no rows", _cut(given, named, {"S": 0} if _has(named, "S") else {"B": 0}), module)
    if (more := _repeated(given, named, _MORE_ROWS)) and len(tensors) == 1:
        yield Case("more rows", more, module)
    if found is None and (many := _repeated(given, named, _MANY_ROWS["S"])):
        yield Case("many rows", many, module)
    yield Case("NaN and infinity", _with_specials(given, found), module, grad="none")
    yield Case("backward twice over one graph", given, module, retain=True)
    yield Case("second gradients", given, module, second=True)
    if found is not None:
        for sizes in (*_SIZES, _MANY_ROWS):
            resized = resize(layer, sample, found, sizes, generator)
            if resized is not None:
                what = "many rows" if sizes is _MANY_ROWS else f"width {sizes['D'] if module is None else sizes['H']}"
                yield Case(what, resized.arguments, resized.module, fill=None if sizes is _MANY_ROWS else NAN)
    if far := _far_apart(given, named):
        yield Case("rows 2^31 elements apart", given, module, strides=far)


def batch_slice(layer: Layer, sample: Sample, mode: str) -> tuple[Case, int] | None:
    """Return the first row of a sample as a case of its own, and the dimension that was cut; None where none can be."""
    named = axes(layer.computes(mode), sample.arguments)
    for name, names in named.items():
        for symbol in ("B", "S"):
            if symbol in names and sample.arguments[name].shape[names.index(symbol)] > 1:
                cut = _cut(sample.arguments, named, {symbol: 1})
                return Case("first row alone", cut, sample.module, grad="none"), names.index(symbol)
    return None


def _has(named: Mapping[str, tuple[str, ...]], symbol: str) -> bool:
    return any(symbol in names for names in named.values())


def _mapped(arguments: Mapping[str, Any], change: Any) -> dict[str, Any]:
    return {n: change(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def _scaled(
    arguments: Mapping[str, Any], recognition: Recognition | None, scale: float | tuple[float, ...]
) -> dict[str, Any]:
    """Multiply what is activations, or their rows in turn by several: angles and factors of other kinds keep their range."""
    names = set(arguments)
    if recognition is not None:
        names = {name for role, name in _argument_roles(recognition) if role.follows == "activations"}
    return {
        name: _times(value, scale) if name in names and isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def beyond(layer: Layer, sample: Sample, mode: str) -> Case | None:
    """Return the case of a sample whose rows are repeated until there are more than 2^31 elements; None where none can be."""
    named = axes(layer.computes(mode), sample.arguments)
    for symbol in ("B", "S"):
        sizes = [sample.arguments[n].shape[a.index(symbol)] for n, a in named.items() if symbol in a]
        tiled = {
            n: a.index(symbol)
            for n, a in named.items()
            if symbol in a and sample.arguments[n].shape[a.index(symbol)] == max(sizes)
        }
        if tiled and (largest := max(sample.arguments[name].numel() for name in tiled)):
            copies = FAR // largest + 2
            name = "more than 2^31 elements"
            return Case(name, sample.arguments, sample.module, grad="none", tiled=tiled, copies=copies)
    return None


def _far_apart(arguments: Mapping[str, Any], named: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Strides for one argument with which its last row lies beyond what 32 bits can count."""
    for name, names in named.items():
        tensor = arguments[name]
        for symbol in ("B", "S"):
            at = names.index(symbol) if symbol in names else 0
            if symbol in names and tensor.shape[at] > 1 and tensor.numel() and tensor.is_floating_point():
                strides = list(tensor.contiguous().stride())
                strides[at] = FAR // (tensor.shape[at] - 1) + tensor[0].numel() + 1
                return {name: tuple(strides)}
    return {}


def _repeated(arguments: Mapping[str, Any], named: Mapping[str, tuple[str, ...]], rows: int) -> dict[str, Any]:
    """Arguments with at least so many rows, made of those they have; nothing where that would take much memory."""
    found = dict(arguments)
    for name, names in named.items():
        tensor = arguments[name]
        num_rows, at = tensor.shape[:-1].numel(), next((names.index(s) for s in ("B", "S") if s in names), None)
        if at is None or not num_rows or rows * tensor.shape[-1] > _MANY_ELEMENTS:
            return {}
        times = [1] * tensor.dim()
        times[at] = -(-rows // num_rows)
        found[name] = tensor.repeat(times)
    return found if named else {}


def _of_dims(arguments: Mapping[str, Any], named: Mapping[str, tuple[str, ...]], dims: int) -> dict[str, Any]:
    """The only tensor with another number of dimensions before its last one; nothing where that cannot be."""
    (name, axes_), *others = named.items() or [("", ())]
    if others or axes_[-1:] != ("H",) or arguments[name].dim() in (1, dims) or not arguments[name].numel():
        return {}
    rows = arguments[name].reshape(-1, arguments[name].shape[-1])
    shape = (2,) * (dims - 2)
    return {**arguments, name: rows.repeat(2 ** (dims - 2), 1).view(*shape, *rows.shape)}


def _times(tensor: torch.Tensor, scale: float | tuple[float, ...]) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    if isinstance(scale, tuple):
        rows = torch.arange(tensor.shape[:-1].numel(), device=tensor.device) % len(scale)
        by_row = torch.tensor(scale, dtype=tensor.dtype, device=tensor.device)[rows].view(*tensor.shape[:-1], 1)
        return _times_each(tensor, by_row)
    return _times_each(tensor, scale)


def _times_each(tensor: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    scaled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    scaled.copy_(tensor * scale)
    return scaled


@_on_cpu
def random_weight(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return weights that are nothing special: norms within +-1.5, matrices that keep the size of what they multiply."""
    if not tensor.is_floating_point():
        return tensor.clone()
    if tensor.dim() < 2:
        return (torch.rand(tensor.shape, generator=generator) * 3 - 1.5).to(tensor)
    weights: torch.Tensor = torch.randn(tensor.shape, generator=generator) * float(max(tensor.shape[-1], 1)) ** -0.5
    return weights.to(tensor)


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of wider rows, with unit last stride and numbers of others between the rows."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 9.0, device=tensor.device).to(tensor.dtype)
    view: torch.Tensor = wide[..., 1:-2]
    view.copy_(tensor)
    return view


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions exchanged in memory, so that the last stride is not 1."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _cut(
    arguments: Mapping[str, Any], named: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Cut dimensions to at most some sizes, as views. A dimension of 1 that stands for all (cos of all rows) stays 1."""
    cut = dict(arguments)
    full = {s: max((arguments[n].shape[a.index(s)] for n, a in named.items() if s in a), default=0) for s in sizes}
    for name, names in named.items():
        for symbol, size in sizes.items():
            if symbol in names and cut[name].shape[names.index(symbol)] == full[symbol]:
                cut[name] = cut[name].narrow(names.index(symbol), 0, min(size, full[symbol]))
    return cut


def _with_specials(arguments: Mapping[str, Any], recognition: Recognition | None) -> dict[str, Any]:
    """Put a NaN, an infinity and a large number into three places of the first activation, each in a row of its own."""
    changed = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            copied = _times(value, 1.0)
            flat = [torch.unravel_index(torch.tensor(at, device="cpu"), copied.shape) for at in _places(copied)]
            for place, special in zip(flat, (float("nan"), float("inf"), -float("inf")), strict=False):
                copied[place] = special
            changed[name] = copied
            break
    return changed


def _places(tensor: torch.Tensor) -> list[int]:
    width = tensor.shape[-1] if tensor.dim() else 1
    num_rows = tensor.numel() // width
    return [row * width + width // 2 for row in (0, num_rows // 2, num_rows - 1)][: max(1, min(3, num_rows))]


@_on_cpu
def resize(
    layer: Layer, sample: Sample, recognition: Recognition, sizes: Mapping[str, int], generator: torch.Generator
) -> Sample | None:
    """Return a sample of the same layer at other sizes, with random weights; None where it cannot be rebuilt."""
    n: dict[str, Any] = {**sizes, **_options(recognition, sample.arguments)}
    first = next((v for v in sample.arguments.values() if isinstance(v, torch.Tensor)), None)
    dtype, device = (first.dtype, first.device) if first is not None else (torch.float32, torch.device("cpu"))
    arguments = dict(sample.arguments)
    try:
        for role, name in _argument_roles(recognition):
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
    arguments = {name: _values(role, role.shape(n), dtype, device, generator) for role, name in _argument_roles(found)}
    return Sample(arguments, module)


@_on_cpu
def made_real(sample: Sample, layer: Layer, mode: str, *, device: torch.device, generator: torch.Generator) -> Sample:
    """Give values to a sample that was captured on the meta device: shapes, dtypes and strides stay the model's."""
    found = layer.computes(mode)
    roles = {} if found is None else {name: role for role, name in _argument_roles(found)}

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
                wanted = role.shape(symbols)[-1]
                names = {size: name for name, size in symbols.items() if isinstance(size, int)}
                for parts in (1, 2):  # gate and up in one
                    if wanted / parts in names:
                        sizes.setdefault(names[wanted // parts], out // parts)
                sizes.setdefault("I" if role.name == "down" else "H", into)
        elif isinstance(value, torch.Tensor):
            for size, wanted in zip(value.shape, role.shape(symbols), strict=False):
                names = {number: name for name, number in symbols.items() if isinstance(number, int)}
                if wanted in names:
                    sizes[names[wanted]] = size
    return sizes


def with_defaults(sample: Sample, defaults: Mapping[str, Any]) -> Sample:
    """Return a sample with a value for every parameter of the forward."""
    return replace(sample, arguments={**defaults, **sample.arguments})
