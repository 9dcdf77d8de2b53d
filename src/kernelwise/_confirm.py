"""Confirm: choices for kinds of layers → the choices that hold for the whole model. The last part of tuning.

What is faster in a layer need not be faster in the model: a kernel may cost the processor more to start, or spoil a cache.
So each choice is raced alone, and all together, against the model's own eager code and against the builtin defaults. What
slows the model down is taken back. Where something simpler is clearly faster than all together, that is the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from kernelwise import _apply, _results
from kernelwise._candidates import Kind, mapping_of
from kernelwise._compare import on_device
from kernelwise._config import KernelConfig
from kernelwise._contenders import AND_COMPILED, BUILTIN, COMPILED, compile_limits
from kernelwise._data import Layer, from_json, to_json
from kernelwise._decide import decide
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import EAGER, Run
from kernelwise._race import Contender, race, said, sharing_copy
from kernelwise._workload import Workload

TUNED = "tuned"

_EAGER = ("inference", "training")
_WORTH_A_LOOK = 0.01
"""By how much, as a logarithm, one contender must seem faster than another to be raced against it directly."""

LEAST_S = 1.0
"""What the rounds of one race may take at least, however little time is left: without it there is no result."""

MOST_S = 20.0
"""What they may take at most: by then the differences are clear, or nobody can say."""

_TURNS = 9
"""About how many times a race runs each contender: first calls, warming up, and the fewest rounds."""

Chosen = dict[Kind, str | None]
"""For each kind of layers the kernel that was chosen, or None for its own code."""


@dataclass(slots=True)
class Confirmation:
    """What is left of the choices, and all runs that led there. `taken_back` says why a kind has its own code again."""

    chosen: Chosen
    runs: list[Run] = field(default_factory=list)
    taken_back: dict[Kind, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Course:
    """What all races of one tuning share. `about` is what a result depends on besides the contenders and the workload."""

    model: nn.Module
    layers: Sequence[Layer]
    modes: Sequence[str]
    workloads: Sequence[Workload]
    device: str
    about: Any
    seconds: Mapping[str, float]  # of one run of the model's own code, by workload
    until: float
    step: Callable[[str], object]

    def config(self, chosen: Mapping[Kind, str | None]) -> KernelConfig:
        """Write choices as a config. Layers that nobody has tuned get what they get by default."""
        return KernelConfig(mapping_of(chosen, self.layers, self.modes))


def confirm(course: Course, chosen: Chosen) -> Confirmation:
    """Race the choices alone and together, in every workload, and keep what holds."""
    found = Confirmation(dict(chosen))
    alone = _alone(course, found)
    runs = _race_all(course, {EAGER: None, BUILTIN: KernelConfig(), TUNED: course.config(found.chosen), **alone})
    of_mode = {mode: [run for run in runs if (run.workload == "training") == (mode == "training")] for mode in _EAGER}
    for name, (mode, those) in product(alone, of_mode.items()):
        failed = next((run.error for run in those if run.contender == name and run.error), None)
        if failed is not None or _score(those, name) < 0:
            why = f"it fails end to end: {failed}" if failed else f"the whole model with it is {_figures(those, name)}"
            gone = [kind for kind in found.chosen if (kind.layer.name, kind.mode) == (name, mode)]
            _take_back(found, gone, f"taken back: {why}")
    if found.taken_back:
        runs = [run for run in runs if run.contender in alone]
        runs += _race_all(course, {EAGER: None, BUILTIN: KernelConfig(), TUNED: course.config(found.chosen)})
    runs = _best_of(course, found, runs, alone)
    if any(kind.mode.endswith(AND_COMPILED) for kind in chosen):
        runs += _compiled(course, found)
    order = list(dict.fromkeys([EAGER, BUILTIN, TUNED, *(run.contender for run in runs)]))
    found.runs = sorted(runs, key=lambda run: order.index(run.contender))
    return found


def _alone(course: Course, found: Confirmation) -> dict[str, KernelConfig]:
    """The configs of each choice alone, by the name of the layer, where there is more than one and time for them."""
    eager = {kind: ref for kind, ref in found.chosen.items() if kind.mode in _EAGER}
    names = list(dict.fromkeys(kind.layer.name for kind, ref in eager.items() if ref is not None))
    if len(names) < 2:
        return {}
    if (len(names) + 3) * _TURNS * sum(course.seconds.values()) > course.until - time.monotonic():
        found.notes.append("no time was left to run each choice alone: all of them were run together only")
        return {}
    return {
        name: course.config({kind: ref if kind.layer.name == name else None for kind, ref in eager.items()})
        for name in names
    }


def _take_back(found: Confirmation, kinds: Iterable[Kind], why: str) -> None:
    for kind in kinds:
        if found.chosen[kind] is not None:
            found.chosen[kind], found.taken_back[kind] = None, why


def _best_of(course: Course, found: Confirmation, runs: list[Run], alone: Mapping[str, KernelConfig]) -> list[Run]:
    """Where one contender is clearly faster than all choices together, take it instead. Returns the runs with that result."""
    rivals = {EAGER: None, BUILTIN: KernelConfig(), **alone}
    rivals = {name: config for name, config in rivals.items() if not _failed(runs, name)}
    if not rivals:
        return runs
    best = max(rivals, key=lambda name: _median(runs, name))
    if _failed(runs, TUNED):
        why = next(run.error for run in runs if run.contender == TUNED and run.error)
    else:
        if _median(runs, best) - _median(runs, TUNED) < _WORTH_A_LOOK:
            return runs
        direct = _race_all(course, {TUNED: course.config(found.chosen), best: rivals[best]}, own=TUNED)
        if _score(direct, best) <= 0:
            return runs
        why = f"{best} is {_figures(direct, best)} than all choices together".replace("times as fast", "times faster")
    found.notes.append(f"all choices together did not hold end to end, {best} is the result: {why}")
    eager = [kind for kind in found.chosen if kind.mode in _EAGER]
    _take_back(found, [kind for kind in eager if kind.layer.name != best], f"taken back: {why}")
    if best == BUILTIN:
        found.chosen = {kind: ref for kind, ref in found.chosen.items() if kind not in eager}
    kept = [run for run in runs if run.contender != TUNED]
    return kept + [replace(run, contender=TUNED) for run in kept if run.contender == best]


def _failed(runs: Sequence[Run], name: str) -> bool:
    return not any(run.contender == name for run in runs) or any(run.contender == name and run.error for run in runs)


def _score(runs: Sequence[Run], name: str) -> float:
    """The logarithm of how much faster a contender is over all workloads, where it is clear; 0 where nobody can say."""
    found = [run.comparison for run in runs if run.contender == name and run.comparison is not None]
    return sum(math.log(one.speedup) for one in found if one.verdict != "no clear difference")


def _median(runs: Sequence[Run], name: str) -> float:
    found = [run.comparison for run in runs if run.contender == name and run.comparison is not None]
    return sum(math.log(one.speedup) for one in found) / max(len(found), 1)


def _figures(runs: Sequence[Run], name: str) -> str:
    return ", ".join(
        f"{run.comparison.speedup:.3g} ({run.comparison.low:.3g}-{run.comparison.high:.3g}) times as fast in {run.workload}"
        for run in runs
        if run.contender == name and run.comparison is not None
    )


def _compiled(course: Course, found: Confirmation) -> list[Run]:
    """Race the choices for torch.compile, and take them all back where the compiled model is slower with them."""
    builtin, tuned = BUILTIN + AND_COMPILED, TUNED + AND_COMPILED
    contenders = {EAGER: None, COMPILED: None, builtin: KernelConfig(), tuned: course.config(found.chosen)}
    runs = _race_all(course, contenders, compiled=(COMPILED, builtin, tuned))
    slower = not _failed(runs, COMPILED) and _median(runs, tuned) - _median(runs, COMPILED) < -_WORTH_A_LOOK
    if _failed(runs, tuned) or slower:
        why = next((run.error for run in runs if run.contender == tuned and run.error), None)
        gone = [kind for kind in found.chosen if kind.mode.endswith(AND_COMPILED)]
        _take_back(found, gone, f"taken back: {why or 'torch.compile alone is faster end to end'}")
    return [run for run in runs if run.contender != EAGER]


# ------------------------------------------------------------------------------------------------------------------ races


def _race_all(
    course: Course,
    contenders: Mapping[str, KernelConfig | None],
    *,
    own: str = EAGER,
    compiled: Sequence[str] = (),
) -> list[Run]:
    """Race the model with each config (None: its own code) in every workload. What was raced before is recalled."""
    runs: list[Run] = []
    for index, workload in enumerate(course.workloads):
        course.step(f"the whole model: {workload.name}")
        made: dict[str, Contender] = {}
        kernels: dict[str, list[Any]] = {}
        for name, config in contenders.items():
            mode = ("training" if workload.training else "inference") + (AND_COMPILED if name in compiled else "")
            try:
                made[name], kernels[name] = _contender(course.model, config, mode)
            except KernelwiseError as error:
                runs.append(Run(name, workload.name, None, workload.tokens, said(error)))
        if own not in made:
            continue
        left = (course.until - time.monotonic()) / (len(course.workloads) - index + 1)
        key = ["race", course.about, workload.name, workload.tokens, own, [[name, kernels[name]] for name in made]]
        known = all(content for found in kernels.values() for _, _, _, content in found)
        stored = _results.get(key) if known else None
        if stored is None:
            with on_device(course.device), compile_limits() if compiled else nullcontext():
                raced = race(made, workload, device=course.device, seconds=min(MOST_S, max(LEAST_S, left)), own=own)
            if known and not any(run.error for run in raced):
                _results.put(key, to_json(raced))
        else:
            raced = tuple(from_json(Run, run) for run in stored)
        runs += raced
    return runs


def _contender(model: nn.Module, config: KernelConfig | None, mode: str) -> tuple[Contender, list[Any]]:
    """Make a copy of a model with the kernels of a config, and say which these are and where, as plain data."""
    copied = sharing_copy(model)
    kernels: list[Any] = []
    if config is not None:
        plan = decide(copied, config, mode=mode)
        _apply.apply(copied, plan)
        put_in = [decision for decision in plan.decisions if decision.kernel is not None]
        kernels = [[d.layer.path, d.mode, str(d.kernel.ref), d.kernel.content_hash] for d in put_in if d.kernel]
    compiled = mode.endswith(AND_COMPILED)
    return Contender(copied, call=torch.compile(copied) if compiled else None, static_cache=compiled), kernels
