"""What tests of races share: a short race of a model's own code with others, and what it found of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kernelwise._evidence import Run
from kernelwise._measuring._race import Contender, race, sharing_copy
from kernelwise._measuring._workload import workloads_of

SECONDS = 0.02


def found_in(runs: tuple[Run, ...], contender: str) -> Run:
    (run,) = (run for run in runs if run.contender == contender)
    return run


def raced(model: nn.Module, inputs: Any, workload: str, **others: Callable[[nn.Module], Callable[..., Any]]) -> Any:
    """Race a model's own code with copies of it that are called through what `others` return."""
    contenders = {"eager": Contender(sharing_copy(model))}
    for name, wrap in others.items():
        copied = sharing_copy(model)
        contenders[name] = Contender(copied, call=wrap(copied))
    (wanted,) = workloads_of(model, inputs, [workload], steps=3)
    return race(contenders, wanted, device="cpu", seconds=SECONDS)
