"""Races: the whole model with configs → runs, and how much better one is than another. Tuning confirms by them.

A contender is a copy that shares the user's weights, with the kernels of a config or without, compiled or not, or run by
somebody else's way (torch.compile, transformers, Liger). What was raced is remembered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from kernelwise import _results
from kernelwise._applying import _apply
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import MODES, KernelRef, Layer, to_json
from kernelwise._decide import decide
from kernelwise._errors import KernelwiseError, said
from kernelwise._evidence import AND_COMPILED, COMPILED, EAGER, LIGER, TRANSFORMERS, Comparison, Objective, Run
from kernelwise._mapping import read_keys
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._contenders import UnavailableError, compile_limits, contender, is_compiled
from kernelwise._measuring._race import Contender, race, sharing_copy
from kernelwise._measuring._workload import Workload
from kernelwise._plan import choose_rule
from kernelwise._tuning._candidates import Kind, mapping_of, with_trust

OTHERS = (COMPILED, TRANSFORMERS, LIGER)
"""Contenders that change a model as a whole, in ways that no config says."""

WORTH_A_LOOK = 0.01
"""By how much, as a logarithm, one contender must seem faster than another to be raced against it directly."""

LEAST_S = 1.0
"""What the rounds of one race may take at least, however little time is left: without it there is no result."""

MOST_S = 8.0
"""What they may take at most: by then the differences are clear, or nobody can say. A tuning has a dozen races."""

TURNS = 9
"""About how many times a race runs each contender: first calls, warming up, and the fewest rounds."""

COMPILE_S, COMPILE_LAYER_S = 10.0, 0.25
"""About how long torch.compile takes for a model: to begin with, and for each layer without parts. It cannot be interrupted."""

Chosen = dict[Kind, str | None]
"""For each kind of layers the kernel that was chosen, or None for its own code."""


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
    objective: Objective = "latency"
    asked: KernelConfig = field(default_factory=KernelConfig)
    trusted: Mapping[str, KernelRef] = field(default_factory=dict)  # by their strings, which do not say so
    others: tuple[str, ...] = ()  # of `OTHERS`: what is raced besides, for comparison

    def config(self, chosen: Mapping[Kind, str | None]) -> KernelConfig:
        """Write choices as a config, over the user's own. Layers of which neither speaks get what they get by default."""
        options = {name: getattr(self.asked, name) for name in ("inherit_mapping", "on_miss", "verify")}
        return KernelConfig(_merged(self, chosen), **options)


def _merged(course: Course, chosen: Mapping[Kind, str | None]) -> dict[Any, Any]:
    """Put choices into the user's mapping. Where a name has both, each layer gets its choice, else what the rules say."""
    asked, layers = course.asked, course.layers
    tuned, rules = {kind.layer.name for kind in chosen}, asked.rules()
    both = tuned & {rule.layer for rule in rules if not rule.fuses}
    keys = zip(asked.kernel_mapping.items(), read_keys(asked.kernel_mapping), strict=True)
    mapping = {key: value for (key, value), read in keys if read.fuses or read.layer not in tuned}
    alone = {kind: ref for kind, ref in chosen.items() if kind.layer.name not in both}
    mapping |= with_trust(mapping_of(alone, layers, course.modes), course.trusted)
    here = {kind: ref for kind, ref in chosen.items() if kind.layer.name in both}
    done = {(path, kind.layer.function, kind.mode) for kind in here for path in kind.paths}
    for layer, mode in product([layer for layer in layers if layer.name in both], MODES):
        rule = choose_rule(layer, rules, device=layer.device, mode=mode)
        if rule is not None and (layer.path, layer.function, mode) not in done:
            here[Kind(layer, (layer.path,), mode, "")] = None if rule.ref is None else str(rule.ref)
    mapping |= with_trust(mapping_of(here, layers, MODES), course.trusted)
    return mapping


def race_all(
    course: Course,
    contenders: Mapping[str, KernelConfig | None],
    *,
    own: str = EAGER,
    most_s: float | None = None,
    least_s: float | None = None,
) -> list[Run]:
    """Race the model with each config (None: its own code) in every workload. What was raced before is recalled.

    A contender of `OTHERS`, or whose name ends with "+compile", runs as `_contenders` says.
    """
    runs: list[Run] = []
    for index, workload in enumerate(course.workloads):
        course.step(f"the whole model: {workload.name}")
        made: dict[str, Contender] = {}
        kernels: dict[str, list[Any]] = {}
        for name, config in contenders.items():
            try:
                made[name], kernels[name] = _contender(course.model, name, config, training=workload.training)
            except KernelwiseError as error:
                runs.append(Run(name, workload.name, None, workload.tokens, said(error)))
        if own not in made:
            continue
        left = (course.until - time.monotonic()) / (len(course.workloads) - index + 1)
        key = ["race", course.about, workload.name, workload.tokens, own, [[name, kernels[name]] for name in made]]
        known = all(content for found in kernels.values() for _, _, _, content in found)
        seconds = min(MOST_S if most_s is None else most_s, max(LEAST_S if least_s is None else least_s, left))
        stored = _results.recall(key, _Raced) if known else None
        if stored is None or stored.could_say_more(list(made), own, seconds):
            with on_device(course.device), compile_limits() if any(map(is_compiled, made)) else nullcontext():
                raced = race(
                    made,
                    workload,
                    device=course.device,
                    seconds=seconds,
                    own=own,
                    begin=partial(_tell, course, workload),
                )
            if known and not any(run.error for run in raced):
                _results.put(key, to_json(_Raced(raced, seconds)))
        else:
            raced = stored.runs
        runs += raced
    return runs


def _tell(course: Course, workload: Workload, name: str) -> None:
    course.step(f"the whole model: {workload.name}, first {name}")


def compile_seconds(model: nn.Module, workload: Workload) -> float:
    """About how many seconds it takes to compile a model for a workload; a backward pass takes as long again."""
    layers = sum(not any(module.children()) for module in model.modules())
    return (COMPILE_S + COMPILE_LAYER_S * layers) * (2 if workload.training else 1)


@dataclass(frozen=True, slots=True)
class _Raced:
    """The runs of a race, and how many seconds its rounds were allowed."""

    runs: tuple[Run, ...]
    seconds: float

    def could_say_more(self, names: Sequence[str], own: str, seconds: float) -> bool:
        """Whether the race must be run again: it had no more than half the time, or it is not one of these contenders."""
        if [run.contender for run in self.runs] != names or any(run.comparison is None for run in self.runs):
            return True
        found = [run.comparison for run in self.runs if run.comparison is not None and run.contender != own]
        return seconds >= 2 * self.seconds and any(one.in_a_hurry for one in found)


def _contender(
    model: nn.Module, name: str, config: KernelConfig | None, *, training: bool
) -> tuple[Contender, list[Any]]:
    """Make a copy of a model that runs as its name or a config says, and say which kernels it has where, as plain data."""
    if name in OTHERS:
        try:
            made = contender(model, name, training=training, configs={})
        except Exception as error:
            raise UnavailableError(said(error)) from error
        # Which kernels transformers found on the Hub is not known, so what is raced with them is not remembered.
        return made, [["", "", name, None]] if name == TRANSFORMERS else []
    copied = sharing_copy(model)
    kernels: list[Any] = []
    mode = ("training" if training else "inference") + (AND_COMPILED if is_compiled(name) else "")
    if config is not None:
        plan = decide(copied, config, mode=mode)
        _apply.apply(copied, plan)
        put_in = [decision for decision in plan.decisions if decision.kernel is not None]
        kernels = [[d.layer.path, d.mode, str(d.kernel.ref), d.kernel.content_hash] for d in put_in if d.kernel]
    compiled = is_compiled(name)
    return Contender(copied, call=torch.compile(copied) if compiled else None, static_cache=compiled), kernels


# -------------------------------------------------------------------------------------------------------- who is better


def failed(runs: Sequence[Run], name: str) -> bool:
    """Whether a contender did not run, or failed in a workload."""
    return not any(run.contender == name for run in runs) or any(run.contender == name and run.error for run in runs)


def score(course: Course, runs: Sequence[Run], name: str) -> float:
    """By how much a contender is better over all workloads, as a logarithm; 0 where nobody can say.

    For memory that is what it needs at its peak; where that is the same, time decides.
    """
    return _memory(course, runs, name) or _time(course, runs, name, clear=True)


def rank(course: Course, runs: Sequence[Run], name: str) -> tuple[float, float]:
    """What contenders are put in order by, clear or not: memory, where that is the objective, then time."""
    return _memory(course, runs, name), _time(course, runs, name, clear=False)


def seems_better(course: Course, runs: Sequence[Run], name: str, other: str) -> bool:
    """Whether a contender is ahead of another by what is worth a look, as far as their races against own code show."""
    ahead = [ours - theirs for ours, theirs in zip(rank(course, runs, name), rank(course, runs, other), strict=True)]
    return next((by for by in ahead if abs(by) >= WORTH_A_LOOK), 0.0) > 0


def clear_lead(course: Course, runs: Sequence[Run], name: str, other: str) -> float:
    """By how much a contender is better than another, as `score`, where both were raced against the model's own code.

    Of times, those differences count that are clear: where the intervals lie apart.
    """
    ahead = _memory(course, runs, name) - _memory(course, runs, other)
    if abs(ahead) > WORTH_A_LOOK:
        return ahead
    pairs = zip(_compared(runs, name), _compared(runs, other), strict=True)
    counted = [(one if one.low > two.high or one.high < two.low else two, two) for one, two in pairs]
    ours = [(one.own_us, one.speedup) for one, _ in counted]
    return _gain(course, ours) - _gain(course, [(two.own_us, two.speedup) for _, two in counted])


def _compared(runs: Sequence[Run], name: str) -> list[Comparison]:
    return [run.comparison for run in runs if run.contender == name and run.comparison is not None]


def _time(course: Course, runs: Sequence[Run], name: str, *, clear: bool) -> float:
    """How much faster a contender is, in clear differences alone or not."""
    found = [
        (one.own_us, one.speedup if not clear or one.verdict != "no clear difference" else 1.0)
        for one in _compared(runs, name)
    ]
    return _gain(course, found)


def _gain(course: Course, found: Sequence[tuple[float, float]]) -> float:
    """The logarithm of all speed-ups together, each given with the time of the own code.

    Each workload counts as much as another, for throughput as much as it takes.
    """
    if course.objective == "throughput" and found:
        return math.log(sum(own for own, _ in found) / sum(own / speedup for own, speedup in found))
    return sum(math.log(speedup) for _, speedup in found) / max(len(found), 1)


def _memory(course: Course, runs: Sequence[Run], name: str) -> float:
    """How much less memory a contender needs at its peak, in the worst workload; within a hundredth, or not counted: 0."""
    if course.objective != "memory":
        return 0.0
    found = [math.log(one.own_peak / one.peak) for one in _compared(runs, name) if one.own_peak and one.peak]
    least = min(found, default=0.0)
    return least if abs(least) > 0.01 else 0.0


def figures(runs: Sequence[Run], name: str) -> str:
    """Say how fast a contender is in each workload."""
    return ", ".join(
        f"{run.comparison.speedup:.3g} ({run.comparison.low:.3g}-{run.comparison.high:.3g}) times as fast in {run.workload}"
        for run in runs
        if run.contender == name and run.comparison is not None
    )
