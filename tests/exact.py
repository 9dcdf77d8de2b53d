"""Judge a kernel against the code it replaces: both are measured against the same code run in float64.

A layer that says `x.to(torch.float32)` computes in float32 even after `layer.double()`, so the reference runs under a
dispatch mode that turns every floating dtype into float64. A kernel passes when it errs at most twice as much as the
layer's own code, for every output and every gradient, at every input scale; a floor of two units in the last place is
added because the own error can be zero by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from kernelwise._verifying._exact import FACTOR, deviation, float64_mode

__all__ = ["FACTOR", "assert_as_exact", "float64_mode"]

Inputs = Mapping[str, Any] | Sequence[Any]


def assert_as_exact(
    own: Callable[..., Any],
    kernel: Callable[..., Any],
    inputs: Inputs,
    *,
    grad: bool = True,
    scales: Sequence[float] = (1e-2, 1.0, 1e2),
    scaled: Sequence[str | int] | None = None,
    terms: int = 1,
) -> None:
    """Raise AssertionError unless `kernel` is as exact as `own` on `inputs`.

    `inputs` is a tuple (called `f(*inputs)`) or a dict (called `f(**inputs)`); values that are no tensors are passed
    on. Strides and overlaps with other memory of one tensor are kept. Each scale multiplies the inputs named in
    `scaled` (names or positions; by default the first floating tensor). With `grad`, the gradients of every floating
    input are compared too. Dtype and shape of all outputs must be those of `own`, inputs must stay as they were, and
    where the reference is NaN or infinite the kernel must give that or what `own` gives. `terms` is how many numbers are
    added up for an element of a gradient: see `deviation`.
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
            _compare(expected, actual, reference, where=where, terms=terms)


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
    terms: int = 1,
) -> None:
    assert list(expected) == list(actual), f"{where}: own code gives {list(expected)}, kernel {list(actual)}"
    for name, own in expected.items():
        new, exact = actual[name], reference[name]
        if own is None or exact is None:
            assert new is None or not new.any(), f"{where}: {name} is none in the own code, not in the kernel"
            continue
        assert new is not None, f"{where}: the kernel gives no {name}"
        found = deviation(own, new, exact, terms=terms if name.startswith("gradient") else 1)
        if found.error is not None:
            numbers = f"errs {found.error:.3g}, own code {found.own_error:.3g}; allowed {found.allowed:.3g}"
            assert found.status == "passed", f"{where}: {name}: kernel {numbers} at {found.place}"
        assert found.status == "passed", f"{where}: {name}: {found.detail}"
