"""Cases: a sample of a layer → all that a kernel for it is tried on.

They are made from the sample: the same at other scales, with other weights, with other strides, with fewer and more rows,
with NaN. Where the operation is known, there are also layers of other widths than the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kernelwise._data import Layer, Recognition
from kernelwise._verifying._copies import bare_copy
from kernelwise._verifying._given import Case
from kernelwise._verifying._inputs import Sample, argument_roles, axes, random_weight, resize

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

_MANY_ELEMENTS = 1 << 24
"""The most elements that rows of the sample are repeated to."""

FAR = 1 << 31
"""Elements: more than an index of 32 bits with a sign can count."""


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
    yield Case("NaN and infinity", _with_specials(given), module, grad="none")
    yield Case("backward twice over one graph", given, module, retain=True)
    yield Case("second gradients", given, module, second=True)
    if found is not None:
        for sizes in (*_SIZES, _MANY_ROWS):
            resized = resize(sample, found, sizes, generator)
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
        names = {name for role, name in argument_roles(recognition) if role.follows == "activations"}
    return {
        name: _times(value, scale) if name in names and isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


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
    by: float | torch.Tensor
    if isinstance(scale, tuple):
        rows = torch.arange(tensor.shape[:-1].numel(), device=tensor.device) % len(scale)
        by = torch.tensor(scale, dtype=tensor.dtype, device=tensor.device)[rows].view(*tensor.shape[:-1], 1)
    else:
        by = scale
    scaled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    scaled.copy_(tensor * by)
    return scaled


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


def _with_specials(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Put a NaN and both infinities into three places of the first tensor of floats, each in a row of its own."""
    changed = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            copied = _times(value, 1.0)
            flat = [torch.unravel_index(torch.tensor(at, device="cpu"), copied.shape) for at in _places(copied)]
            for place, special in zip(flat, (NAN, float("inf"), -float("inf")), strict=False):
                copied[place] = special
            changed[name] = copied
            break
    return changed


def _places(tensor: torch.Tensor) -> list[int]:
    width = tensor.shape[-1] if tensor.dim() else 1
    num_rows = tensor.numel() // width
    return [row * width + width // 2 for row in (0, num_rows // 2, num_rows - 1)][: max(1, min(3, num_rows))]
