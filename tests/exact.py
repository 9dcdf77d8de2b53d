"""Judge a kernel against the code it replaces: both are measured against the same code run in float64.

A layer that says `x.to(torch.float32)` computes in float32 even after `layer.double()`, so the reference runs under a
dispatch mode that turns every floating dtype into float64. A kernel passes when it errs at most twice as much as the
layer's own code, for every output and every gradient, at every input scale; a floor of two units in the last place is
added because the own error can be zero by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NARROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FACTOR = 2.0  # a kernel may err this many times as much as the layer's own code
FLOOR_ULPS = 2.0

Inputs = Mapping[str, Any] | Sequence[Any]


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES:
        return value.to(torch.float64)
    if isinstance(value, torch.dtype) and value in NARROW_DTYPES:
        return torch.float64
    return value


class _Float64Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.view.dtype:  # looks at the bytes: another dtype would be another operation
            return func(*args, **kwargs)
        schema = func._schema.arguments
        # A tensor that is written to keeps its identity, so it keeps its dtype; what is written is still float64.
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        names = {a.name for a, w in zip(schema, written, strict=True) if w}
        args = tuple(a if w else tree_map(_widen, a) for a, w in zip(args, written, strict=False))
        kwargs = {k: v if k in names else tree_map(_widen, v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def float64_mode() -> Iterator[None]:
    """Inside, every operation computes in float64, whatever dtype the code asks for.

    Give it float64 inputs: gradients come back in the dtype of the leaf they belong to.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(default)


def assert_as_exact(
    own: Callable[..., Any],
    kernel: Callable[..., Any],
    inputs: Inputs,
    *,
    grad: bool = True,
    scales: Sequence[float] = (1e-2, 1.0, 1e2),
    scaled: Sequence[str | int] | None = None,
) -> None:
    """Raise AssertionError unless `kernel` is as exact as `own` on `inputs`.

    `inputs` is a tuple (called `f(*inputs)`) or a dict (called `f(**inputs)`); values that are no tensors are passed
    on. Strides and overlaps with other memory of one tensor are kept. Each scale multiplies the inputs named in
    `scaled` (names or positions; by default the first floating tensor). With `grad`, the gradients of every floating
    input are compared too. Dtype and shape of all outputs must be those of `own`, inputs must stay as they were, and
    where the reference is NaN or infinite the kernel must give that or what `own` gives.
    """
    names: list[str | int] = list(inputs) if isinstance(inputs, Mapping) else list(range(len(inputs)))
    values = dict(zip(names, inputs.values() if isinstance(inputs, Mapping) else inputs, strict=True))
    floating = [n for n in names if isinstance(values[n], torch.Tensor) and values[n].is_floating_point()]
    if not floating:
        raise ValueError("assert_as_exact needs at least one floating input")
    to_scale = set(floating[:1] if scaled is None else scaled)
    if unknown := to_scale - set(floating):
        raise ValueError(f"scaled names {sorted(map(str, unknown))}, which are no floating inputs")
    keyword = isinstance(inputs, Mapping)

    for scale in scales:
        given = {n: _Copy(v, scale if n in to_scale else 1.0) if n in floating else v for n, v in values.items()}
        where = f"scale {scale:g}"
        expected = _run(own, given, keyword=keyword, grad=False)
        actual = _run(kernel, given, keyword=keyword, grad=False)
        reference = _run(own, given, keyword=keyword, grad=False, wide=True)
        _compare(expected, actual, reference, where=f"{where}, without gradients")
        if grad:
            expected = _run(own, given, keyword=keyword, grad=True)
            actual = _run(kernel, given, keyword=keyword, grad=True)
            reference = _run(own, given, keyword=keyword, grad=True, wide=True)
            _compare(expected, actual, reference, where=where)


class _Copy:
    """An input with its strides and the memory between its elements; `check` sees writes to either."""

    def __init__(self, tensor: torch.Tensor, scale: float) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 0 if tensor.numel() == 0 else extent
        self.memory = tensor.detach().as_strided((extent,), (1,), tensor.storage_offset()) * scale
        self.shape, self.strides = tensor.shape, tensor.stride()

    def fresh(self, *, wide: bool, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.memory.double() if wide else self.memory.clone()
        return memory.as_strided(self.shape, self.strides).requires_grad_(grad), memory

    def check(self, name: str | int, memory: torch.Tensor) -> None:
        assert torch.equal(memory.view(torch.uint8), self.memory.view(torch.uint8)), f"input {name} was overwritten"


def _run(
    function: Callable[..., Any], given: dict[str | int, Any], *, keyword: bool, grad: bool, wide: bool = False
) -> dict[str, torch.Tensor | None]:
    """Results by name: `output 0`, ..., and with `grad` `gradient of x`, ... for one call of `function`."""
    copies = {n: v.fresh(wide=wide, grad=grad) for n, v in given.items() if isinstance(v, _Copy)}
    arguments = {n: copies[n][0] if n in copies else v for n, v in given.items()}
    results: dict[str, torch.Tensor | None] = {}
    with torch.set_grad_enabled(grad), _maybe_wide(wide):
        outputs, _ = tree_flatten(function(**arguments) if keyword else function(*arguments.values()))
        outputs = [o for o in outputs if isinstance(o, torch.Tensor)]
        if grad:
            leaves = {n: c[0] for n, c in copies.items()}
            roots = [o for o in outputs if o.requires_grad]
            upstream = [_upstream(o, i) for i, o in enumerate(roots)]
            gradients = torch.autograd.grad(roots, list(leaves.values()), upstream, allow_unused=True)
            results |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    if not wide:
        for name, (_, memory) in copies.items():
            given[name].check(name, memory.detach())
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | results


@contextmanager
def _maybe_wide(wide: bool) -> Iterator[None]:
    if not wide:
        yield
        return
    with float64_mode():
        yield


def _upstream(output: torch.Tensor, seed: int) -> torch.Tensor:
    """The same gradient for every contender: multiples of 1/64 within +-3, which every floating dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-192, 193, output.shape, generator=generator)
    return (values / 64).to(output.dtype).to(output.device)


def _compare(
    expected: dict[str, torch.Tensor | None],
    actual: dict[str, torch.Tensor | None],
    reference: dict[str, torch.Tensor | None],
    *,
    where: str,
) -> None:
    assert list(expected) == list(actual), f"{where}: own code gives {list(expected)}, kernel {list(actual)}"
    for name, own in expected.items():
        new, exact = actual[name], reference[name]
        if own is None or exact is None:
            assert new is None or not new.any(), f"{where}: {name} is none in the own code, not in the kernel"
            continue
        assert new is not None, f"{where}: the kernel gives no {name}"
        assert new.shape == own.shape, f"{where}: {name} has shape {tuple(new.shape)}, own code {tuple(own.shape)}"
        assert new.dtype == own.dtype, f"{where}: {name} has dtype {new.dtype}, own code {own.dtype}"
        if own.is_floating_point():
            _compare_values(own, new, exact, what=f"{where}: {name}")
        else:
            assert torch.equal(own, new), f"{where}: {name} differs"


def _compare_values(own: torch.Tensor, new: torch.Tensor, exact: torch.Tensor, *, what: str) -> None:
    # Where the reference is not finite the kernel must be not finite in the same way, or in that of the own code (oneDNN's
    # gelu of infinity is NaN, say). Where only the own code overflows, its dtype is too narrow and the kernel, which may
    # round less often, is free.
    special = ~exact.isfinite()
    same = (own == new) | (own.isnan() & new.isnan()) | (exact == new) | (exact.isnan() & new.isnan())
    assert same[special].all(), f"{what}: NaN or infinity where the own code has something else"
    judged = exact.isfinite() & own.isfinite()
    assert new[judged].isfinite().all(), f"{what}: NaN or infinity where the own code is finite"
    if not judged.any():
        return
    error_own = (own[judged].double() - exact[judged]).abs().max().item()
    error_new = (new[judged].double() - exact[judged]).abs().max().item()
    largest = exact[judged].abs().max().item()
    info = torch.finfo(own.dtype)
    smallest = info.smallest_normal * info.eps  # the distance between subnormal numbers
    ulp = max(info.eps * 2.0 ** math.floor(math.log2(largest)), smallest) if largest > 0 else smallest
    bound = FACTOR * error_own + FLOOR_ULPS * ulp
    assert error_new <= bound, f"{what}: kernel errs {error_new:.3g}, own code {error_own:.3g}; allowed {bound:.3g}"
