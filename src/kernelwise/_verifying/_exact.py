"""The accuracy rule: a kernel and the code it replaces, both judged against that code run in float64.

A layer that says `x.to(torch.float32)` computes in float32 even after `layer.double()`, so the reference runs under a
dispatch mode that turns every floating dtype into float64. A kernel may err at most twice as much as the layer's own
code, for every output and every gradient; a floor of two units in the last place is added because the own error can be
zero by luck. Outputs in half precision have a second bound on their mean error, which shows a result that was rounded
once more than the layer rounds: its largest error stays within a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kernelwise._data import Status

NARROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FACTOR = 2.0  # a kernel may err this many times as much as the layer's own code
FLOOR_ULPS = 2.0
MEAN_FACTOR = 1.25  # one rounding more than a single one gives 1.41 times the mean error
MEAN_ELEMENTS = 1024  # fewer say too little about a mean
ROW_WIDTH = 32
"""The least elements of a row that is judged by its own size. In narrower ones all results may be what is left of larger
numbers that cancel, and whose error they keep; that a whole row of so many cancels does not happen by chance."""
NOTHING = torch.finfo(torch.float32).eps ** 2
"""Of the largest number of a tensor: a row that is smaller is judged as if it were so large. float32, in which kernels compute,
has half as many digits."""

_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
"""What rounds a Python number to the default dtype before a dispatch mode sees it."""


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES:
        return value.to(torch.float64)
    if isinstance(value, torch.dtype) and value in NARROW_DTYPES:
        return torch.float64
    return value


_DRAWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("native_dropout", "bernoulli", "bernoulli_", "rand_like", "randn_like", "normal_", "uniform_")
)


class _Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, drawn: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.view.dtype:  # looks at the bytes: another dtype would be another operation
            return func(*args, **kwargs)
        if func.overloadpacket in _DRAWS:
            return _drawn(func, args, kwargs, self.drawn)
        schema = func._schema.arguments
        # A tensor that is written to keeps its identity, so it keeps its dtype; what is written is still float64.
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        names = {a.name for a, w in zip(schema, written, strict=True) if w}
        args = tuple(a if w else tree_map(_widen, a) for a, w in zip(args, written, strict=False))
        kwargs = {k: v if k in names else tree_map(_widen, v) for k, v in kwargs.items()}
        found = func(*args, **kwargs)
        if names or not (isinstance(found, torch.Tensor) and found.dtype in NARROW_DTYPES):
            return found
        return _made_wide(func, args, kwargs, found)


def _drawn(func: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """Draw the random numbers that code in `dtype` draws: in float64 others come out of the same state of the generator."""

    def narrow(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    first, *rest = args
    if func.overloadpacket is torch.ops.aten.native_dropout:
        _, kept = func(torch.ones_like(first, dtype=dtype), *rest, **kwargs)
        if len(rest) > 1 and rest[1] is False:
            return _widen(first).clone(), kept
        return _widen(first) * kept * (0.0 if rest[0] == 1 else 1 / (1 - rest[0])), kept
    if func._schema.is_mutable:
        return first.copy_(func(narrow(first), *tree_map(narrow, rest), **kwargs))
    return tree_map(_widen, func(*tree_map(narrow, args), **kwargs))


def _made_wide(func: Any, args: Any, kwargs: Any, found: torch.Tensor) -> torch.Tensor:
    """Of a result in the default dtype, though nothing narrow went in, return what it is in float64.

    Random numbers are those that the layer's own code draws; whole numbers are divided as float64.
    """
    if torch.Tag.nondeterministic_seeded in func.tags:
        return found.double()
    try:
        if any(argument.name == "dtype" for argument in func._schema.arguments):
            again = func(*args, **{**kwargs, "dtype": torch.float64})
        else:
            again = func(*tree_map(_from_integers, args), **tree_map(_from_integers, kwargs))
    except (RuntimeError, TypeError):  # it takes no such dtype, or an index that must stay whole
        return found.double()
    return again.double() if isinstance(again, torch.Tensor) and again.shape == found.shape else found.double()


def _from_integers(value: Any) -> Any:
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()
    return value.double() if whole else value


class _Float64Numbers(TorchFunctionMode):
    """Keeps Python numbers exact where a tensor is made of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_NUMBERS and kwargs.get("dtype") is None and len(args) < 2:
            data = args[0] if args else next(iter(kwargs.values()), None)
            if type(data) is float or (type(data) in (list, tuple) and func(*args, **kwargs).is_floating_point()):
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def float64_mode(drawn: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, every operation of this thread computes in float64, whatever dtype the code asks for.

    Give it float64 inputs: gradients come back in the dtype of the leaf they belong to. Random numbers, and so what a dropout
    leaves out, are those that come in the dtype `drawn` from the same state of the generator. The default dtype stays as it
    is, because other threads make tensors too.
    """
    with _Float64Numbers(), _Float64Mode(drawn):
        yield


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one tensor of a kernel is from what it should be, with the worst element. `status` is "passed" or why not."""

    status: Status
    detail: str = ""
    place: tuple[int, ...] = ()
    got: str | None = None
    expected: str | None = None
    error: float | None = None
    own_error: float | None = None
    allowed: float | None = None

    @property
    def ratio(self) -> float:
        """The error as a multiple of what is allowed; infinite where there is no number to compare."""
        if self.error is None or self.allowed is None:
            return 0.0 if self.status == "passed" else math.inf
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0


def deviation(
    own: torch.Tensor,
    new: torch.Tensor,
    exact: torch.Tensor,
    *,
    wrong: Status = "wrong_values",
    mean: bool = False,
    terms: int = 1,
) -> Deviation:
    """Judge a kernel's tensor `new` by the layer's `own` and by `exact`, the layer's in float64.

    Shape and dtype must be those of `own`. `wrong` is the status for numbers that are too far off. `mean` bounds the mean
    error of half-precision results too. `terms` is how many numbers were added up for each element: PyTorch adds pairwise
    and hardly errs, one after another in float32 errs with the root of their number, which is allowed too.
    """
    if new.shape != own.shape:
        return Deviation("wrong_shape", f"shape {tuple(new.shape)}, the layer's own is {tuple(own.shape)}")
    if new.dtype != own.dtype:
        return Deviation("wrong_dtype", f"dtype {new.dtype}, the layer's own is {own.dtype}")
    if not own.is_floating_point():
        differs = own != new
        return _at(differs, new, own, wrong, "") if bool(differs.any()) else Deviation("passed")
    if not own.numel():
        return Deviation("passed")
    own_wide = own.double()
    wide = own_wide if torch.equal(own, new) else new.double()
    errors, own_errors = _errors(wide, own_wide, exact)
    judged = None  # all of them, as nearly always
    if not bool((errors.max() + own_errors.max()).isfinite()):
        # Where the reference is not finite the kernel must be not finite in the same way, or in that of the own code
        # (oneDNN's gelu of infinity is NaN, say). Where only the own code overflows, its dtype is too narrow and the kernel,
        # which may round less often, is free.
        finite = exact.isfinite()
        same = (own == new) | (own.isnan() & new.isnan()) | (exact == new) | (exact.isnan() & new.isnan())
        if bool((lost := ~finite & ~same).any()):
            return _at(lost, new, exact, "non_finite", "NaN or infinity of the layer is lost")
        judged = finite & own.isfinite()
        if bool((made := judged & ~new.isfinite()).any()):
            return _at(made, new, exact, "non_finite", "NaN or infinity where the layer's own code is finite")
        if not bool(judged.any()):
            return Deviation("passed")
        exact = torch.where(judged, exact, 0.0)
        errors, own_errors = _errors(torch.where(judged, wide, 0.0), torch.where(judged, own_wide, 0.0), exact)
    # Large tensors are gone through as seldom as can be: what a row's bound depends on is its largest numbers alone.
    by_row = own.dim() > 1 and own.shape[-1] >= ROW_WIDTH
    most, own_most, sizes = (_largest(tensor, by_row) for tensor in (errors, own_errors, exact.abs()))
    bounds = _bounds(own_most, sizes, own.dtype, terms)
    # The worst element is the one that errs most by what is allowed there; where all is right, that which errs most.
    beyond = most > bounds
    row = int((torch.where(beyond, most / bounds, -1.0) if bool(beyond.any()) else most).argmax())
    place = _index(row, most.shape[:-1])
    place += _index(int(errors[place].argmax()), errors[place].shape)
    error, allowed, own_error = float(errors[place]), float(bounds.flatten()[row]), float(own_most.max())
    detail = ""
    if error <= allowed and mean and own.dtype in (torch.float16, torch.bfloat16) and own.numel() >= MEAN_ELEMENTS:
        every = slice(None) if judged is None else judged
        detail = _rounded_more_often(own[every], new[every], exact[every])
    return Deviation(
        "passed" if error <= allowed and not detail else wrong,
        detail,
        place,
        _number(new[place]),
        _number(exact[place]),
        error,
        own_error,
        allowed,
    )


def _errors(new: torch.Tensor, own: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far two results are from what is exact; once, where they are one."""
    own_errors = (own - exact).abs_()
    return own_errors if new is own else (new - exact).abs_(), own_errors


def _largest(values: torch.Tensor, by_row: bool) -> torch.Tensor:
    """The largest number of each row, with a last dimension of 1; or of all, without a dimension."""
    return values.amax(-1, keepdim=True) if by_row else values.max()


def _rounded_more_often(own: torch.Tensor, new: torch.Tensor, exact: torch.Tensor) -> str:
    """Say so where the mean error is more than the own code's, or than that of a single rounding if this is more."""
    units = _ulp(exact.abs(), own.dtype)
    once = float(units.square().mean() / 12) ** 0.5
    mean_own = float((own.double() - exact).square().mean()) ** 0.5
    mean_new = float((new.double() - exact).square().mean()) ** 0.5
    allowed = MEAN_FACTOR * max(once, mean_own)
    if mean_new <= allowed:
        return ""
    return f"the root mean square of its errors is {mean_new:.3g}, allowed {allowed:.3g}: it rounds more often"


def _bounds(own_most: torch.Tensor, sizes: torch.Tensor, dtype: torch.dtype, terms: int) -> torch.Tensor:
    """Return what each row may err: by the size of the row, and no more than by that of all.

    `own_most` and `sizes` are the largest error of the own code and the largest number of each row, or of all. How much the own
    code errs is taken over all rows, as a share of each row's largest number: the error of a single row is a matter of luck.
    """
    floor = math.sqrt(terms) / 8
    largest = sizes.max()
    whole = FACTOR * own_most.max() + FLOOR_ULPS * _ulp(largest, dtype) + floor * _ulp(largest, torch.float32)
    if not sizes.dim():
        return whole
    info = torch.finfo(dtype)
    # Subnormal numbers may be flushed to zero, but for those of float16, which all hardware keeps. And a row that is zero
    # because something saturates (a gradient of GELU) may be nearly so.
    least = info.smallest_normal / (1.0 if dtype == torch.float16 else info.eps)
    rows = sizes.clamp(min=least).maximum(largest * NOTHING)
    share = (own_most / rows).max()
    by_row = FACTOR * share * rows + FLOOR_ULPS * _ulp(rows, dtype) + floor * _ulp(rows, torch.float32)
    return by_row.minimum(whole)


def _ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a dtype at the size of some float64 numbers."""
    info = torch.finfo(dtype)
    exponents = torch.frexp(values.clamp(min=info.smallest_normal)).exponent - 1
    return torch.exp2(exponents.double()) * info.eps


def _at(where: torch.Tensor, new: torch.Tensor, exact: torch.Tensor, status: Status, detail: str) -> Deviation:
    place = int(where.flatten().to(torch.uint8).argmax())
    got, expected = _number(new.flatten()[place]), _number(exact.flatten()[place])
    return Deviation(status, detail, _index(place, where.shape), got, expected)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        place.append(at)
    return tuple(reversed(place))


def _number(value: torch.Tensor) -> str:
    return f"{value.item():.6g}"
