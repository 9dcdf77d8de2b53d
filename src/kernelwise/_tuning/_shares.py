"""Shares: a model and a workload → how often each kind of layers is called, and which part of the time it takes.

Tuning begins with what takes the most time, and leaves out what could not be seen in the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kernelwise._measuring._workload import Workload
from kernelwise._tuning._candidates import Kind
from kernelwise._verifying._groups import module_of


@dataclass(slots=True)
class Share:
    """What one kind of layers takes of one run of a workload: how often it is called, and which part of the time."""

    calls: int = 0
    part: float | None = None  # None for a function, which no hook can time


LONG_S = 2.0
"""A first run that takes longer is as good as a second one: what is set up on first use is small beside it.

After one that takes less than a quarter of this, the shorter of two counts: what else the machine does is large beside it.
"""

DEVICE_BOUND = 0.8
"""Where all work of a run is given to the device within this part of its time, the device is what the run waits for."""

BEHIND_S = 5e-3
"""So it is where the device has as much to do when all is given to it: its queue, of about a thousand kernels, was full."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one run of a workload takes: the part of each kind, its seconds, and whether the device is what it waits for.

    In a run that waits for the device, what it costs to start a kernel is hidden; else it is what counts.
    """

    shares: dict[tuple[str, tuple[str, str, str]], Share]
    seconds: float
    device_bound: bool


def shares_of(
    model: nn.Module, kinds: Sequence[Kind], workload: Workload, run: Callable[[], object], device: str
) -> Look:
    """Run a workload, and see how often each kind is called and which part of the time its layers take.

    The model must be in the mode of the workload. Of training only forward passes are seen.
    """
    wait: Callable[[], object] = (lambda: None) if device == "cpu" else torch.accelerator.synchronize

    def timed() -> tuple[float, float]:
        """How long a run took, and how long until all its work was given to the device."""
        wait()
        began = time.perf_counter()
        run()
        given = time.perf_counter() - began
        wait()
        return max(time.perf_counter() - began, 1e-9), given

    total, started = timed()
    if total < LONG_S:
        total, started = min(timed() for _ in range(2 if total < LONG_S / 4 else 1))
    mode = "training" if workload.training else "inference"
    there = [kind for kind in kinds if kind.mode.partition("+")[0] == mode]
    began = time.perf_counter()
    with _watched(model, there, wait) as seen:
        run()
    wait()
    if time.perf_counter() - began < total / 2:  # the long first run was one that set things up after all
        total, started = timed()
    shares = {
        (workload.name, kind.key): Share(seen[kind.key][0], None if kind.layer.function else seen[kind.key][1] / total)
        for kind in there
    }
    behind = started < DEVICE_BOUND * total or total - started > BEHIND_S
    return Look(shares, total, device != "cpu" and behind)


@contextmanager
def _watched(
    model: nn.Module, kinds: Sequence[Kind], wait: Callable[[], object]
) -> Iterator[dict[tuple[str, str, str], tuple[int, float]]]:
    """Count the calls of kinds of layers and the seconds in them, while the block runs."""
    seen: dict[tuple[str, str, str], tuple[int, float]] = {kind.key: (0, 0.0) for kind in kinds}
    handles = []
    began: list[float] = []

    def before(module: nn.Module, args: Any) -> None:
        wait()
        began.append(time.perf_counter())

    def after(key: tuple[str, str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            wait()
            calls, seconds = seen[key]
            seen[key] = calls + 1, seconds + time.perf_counter() - began.pop()

        return hook

    for kind in kinds:
        for path in kind.paths:
            module = module_of(model, replace(kind.layer, path=path))
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(kind.key))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
