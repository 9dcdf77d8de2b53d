"""Race: contenders for a whole model on one workload → runs, each compared with the model's own eager code.

Contenders are copies that share the model's parameters and buffers, so that all stand ready side by side, cost no memory, and
nothing is put into the model itself. Who does not compute what eager computes has no speed: its run says so instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kernelwise._errors import PlanError, said
from kernelwise._evidence import EAGER, Comparison, Run
from kernelwise._measuring._measure import compare
from kernelwise._measuring._workload import Workload, run_of, undisturbed

_TIMES_ROUNDING = 4.0
"""How many times as far from eager a contender may be as eager is from itself with one more rounding in every layer."""

_FLOOR_STEPS = 4.0
"""And what is allowed at least, in such roundings: by chance a loss may hardly move."""

_SAMPLE = 1 << 20
"""Of a larger gradient, as many elements are compared."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A model ready to run. `call` runs it where that is not the model itself; see `run_of` for `static_cache`."""

    model: nn.Module
    call: Callable[..., Any] | None = None
    static_cache: bool = False


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model, with its hooks and kernels, that has the same parameters and buffers, not copies of them.

    Raises:
        PlanError: something on the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise PlanError(
            f"contenders are copies that share the weights, and {type(model).__name__} cannot be copied: {said(error)}\n"
            "  go on      take off what cannot be copied (a wrapper for several processes, a hook that holds a file)"
        ) from error


def race(
    contenders: Mapping[str, Contender],
    workload: Workload,
    *,
    device: str,
    seconds: float,
    own: str = EAGER,
    begin: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Run, ...]:
    """Check that contenders compute what `own` computes, time them in turns, and return a run of each, in their order.

    A contender that fails, or computes something else, is a run with an error; where `own` fails, all are. Parameters,
    buffers, gradients, modes and random states are afterwards as they were.

    What may differ: twice the work in the same dtype gives the same numbers only up to rounding, and layers amplify it. So
    eager runs once more, with each layer's output off by one random rounding and another random state; a contender may be four
    times as far away.

    Args:
        device: where the model is, as for `compare`. seconds: how long the rounds may take in all.
        begin: told whose first call is next; one that compiles takes long.
        progress: told which part of the rounds is done, 0 to 1.
    """
    errors: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    first_s: dict[str, float] = {}
    expected = _Expected(own, contenders[own], workload)
    models = [contender.model for contender in contenders.values()]
    with undisturbed(*models, training=workload.training):
        for name in (own, *(name for name in contenders if name != own)):
            contender = contenders[name]
            if begin is not None:
                begin(name)
            try:
                with _seeded(0, contender.model):
                    call = run_of(contender.model, workload, call=contender.call, static_cache=contender.static_cache)
                    _wait(device)
                    began = perf_counter()
                    found = call()
                    _wait(device)
                    first_s[name] = perf_counter() - began
                    numbers = expected.numbers_of(found)
                    del found  # whole gradients take as much memory as the weights
                if name == own:
                    expected.take(numbers)
                else:
                    why = expected.differs(numbers)
                    if why is not None:
                        errors[name] = why
            except Exception as error:
                errors[name] = said(error)
                if name == own:
                    break
            if name not in errors:
                calls[name] = call
        expected.forget()
        found_in_turns: Mapping[str, Comparison | str] = {}
        if own in calls:
            found_in_turns = compare(calls, own=own, device=device, seconds=seconds, progress=progress)
    runs = []
    for name in contenders:
        result = (
            found_in_turns.get(name) or errors.get(name) or f"there is nothing to compare it with: {errors.get(own)}"
        )
        if isinstance(result, str):
            runs.append(Run(name, workload.name, None, workload.tokens, result))
        else:
            runs.append(Run(name, workload.name, replace(result, first_s=first_s[name]), workload.tokens))
    return tuple(runs)


_Numbers = dict[str, list[torch.Tensor | None]]


class _Expected:
    """What the model's own code gives, and how far a contender may be from it."""

    def __init__(self, name: str, contender: Contender, workload: Workload) -> None:
        self._name, self._contender, self._workload = name, contender, workload
        self._numbers: _Numbers = {}
        self._allowed: dict[str, float] = {}

    def take(self, numbers: _Numbers) -> None:
        """Keep the numbers of the own code, and run it again with roundings added."""
        self._numbers = numbers
        model = self._contender.model
        steps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
        with _seeded(1, model), _rounded_once_more(model):
            noisy = self.numbers_of(run_of(model, self._workload)())
        floor = _FLOOR_STEPS * max((_of_sums(), *steps))
        self._allowed = {
            name: max(floor, _TIMES_ROUNDING * _distance(own, noisy[name])) for name, own in numbers.items()
        }

    def differs(self, numbers: _Numbers) -> str | None:
        """Say how a contender's numbers differ by more than rounding, or None."""
        for name, other in numbers.items():
            own = self._numbers[name]
            if not _same_shapes(own, other):
                return f"its {name} have other shapes than {self._name}'s"
            distance = _distance(own, other)
            if math.isinf(distance):
                return f"its {name} are infinite or not a number where {self._name}'s are not"
            if distance > self._allowed[name]:
                allowed = self._allowed[name]
                return (
                    f"its {name} differ from {self._name}'s by {distance:.2g} of their size, allowed are {allowed:.2g}"
                )
        return None

    def forget(self) -> None:
        """Free what was kept for comparing."""
        self._numbers = {}

    def numbers_of(self, found: Any) -> _Numbers:
        """Return the numbers that one run gave, by what they are; large gradients are thinned out."""
        if self._workload.training:
            loss, gradients = found
            return {"loss": [loss], "gradients": [None if g is None else _thinned(g.detach()) for g in gradients]}
        outputs = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return {"outputs": [output.detach() for output in outputs]}


def _same_shapes(own: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]) -> bool:
    """Whether the same tensors are there. A gradient that nobody computed is as good as one of zeros."""
    if len(own) != len(other):
        return False
    for wanted, got in zip(own, other, strict=True):
        if wanted is not None and got is not None:
            if wanted.shape != got.shape:
                return False
        elif any(tensor is not None and bool(tensor.count_nonzero()) for tensor in (wanted, got)):
            return False
    return True


def _thinned(tensor: torch.Tensor) -> torch.Tensor:
    step = -(-tensor.numel() // _SAMPLE)
    return tensor.flatten()[:: step | 1].clone() if step > 1 else tensor


def _distance(own: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]) -> float:
    """Return the norm of all differences, as a part of the norm of what it should be; infinite where one is not finite."""
    apart, size = 0.0, 0.0
    for wanted, got in zip(own, other, strict=True):
        if wanted is None or got is None:
            continue
        one, two = wanted.to(torch.float32), got.to(torch.float32)
        finite = one.isfinite()
        if not torch.equal(finite, two.isfinite()):
            return math.inf
        if not finite.all():  # a masked logit is minus infinity in both
            one, two = one.masked_fill(~finite, 0.0), two.masked_fill(~finite, 0.0)
        apart = math.hypot(apart, float(torch.linalg.vector_norm(two - one)))
        size = math.hypot(size, float(torch.linalg.vector_norm(one)))
    return apart / size if size else (0.0 if apart == 0.0 else math.inf)


def _of_sums() -> float:
    """Return what the order of a sum alone costs: some steps of float32, and more where products may be less exact."""
    backends: Any = torch.backends
    precisions = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
    if "bf16" in precisions:
        return 2.0**-8
    return 2.0**-10 if "tf32" in precisions else 16 * torch.finfo(torch.float32).eps


@contextmanager
def _rounded_once_more(model: nn.Module) -> Iterator[None]:
    """Let the output of every layer without parts be off by a random part of a step of its dtype."""

    def moved(output: torch.Tensor) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        amount = max(torch.finfo(output.dtype).eps, _of_sums())
        # Detached, so that training keeps none of it for its backward pass.
        return output + output.detach() * (torch.rand_like(output) * 2 - 1) * amount

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(torch.Tensor, moved, output)

    handles = [module.register_forward_hook(hook) for module in model.modules() if not any(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """All runs that are compared find the same random state and the same buffers."""
    with undisturbed(model):
        torch.manual_seed(seed)
        yield


def _wait(device: str) -> None:
    if device.partition(":")[0] != "cpu":
        torch.accelerator.synchronize()
