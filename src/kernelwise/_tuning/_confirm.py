"""Confirm: choices for kinds of layers → the choices that hold for the whole model. The last part of tuning.

What is faster in a layer need not be faster in the model: a kernel may cost the processor more to start, or spoil a cache.
So each choice is raced alone, and all together, against the model's own eager code and against the builtin defaults. What
slows the model down is taken back. Where something simpler is clearly faster than all together, that is the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
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
from kernelwise._evidence import (
    AND_COMPILED,
    BUILTIN,
    COMPILED,
    EAGER,
    LIGER,
    TRANSFORMERS,
    TUNED,
    Comparison,
    Objective,
    Run,
)
from kernelwise._mapping import read_keys
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._contenders import UnavailableError, compile_limits, contender, is_compiled
from kernelwise._measuring._race import Contender, race, sharing_copy
from kernelwise._measuring._workload import Workload
from kernelwise._plan import choose_rule
from kernelwise._tuning._candidates import Kind, mapping_of, with_trust

OTHERS = (COMPILED, TRANSFORMERS, LIGER)
"""Contenders that change a model as a whole, in ways that no config says."""

_EAGER = ("inference", "training")
_TUNED_AND_COMPILED = TUNED + AND_COMPILED
_WORTH_A_LOOK = 0.01
"""By how much, as a logarithm, one contender must seem faster than another to be raced against it directly."""

LEAST_S = 1.0
"""What the rounds of one race may take at least, however little time is left: without it there is no result."""

_LEAST_COMPILED_S = 4.0
"""The same for a model that had to be compiled, which took longer than that."""

MOST_S = 20.0
"""What they may take at most: by then the differences are clear, or nobody can say."""

TURNS = 9
"""About how many times a race runs each contender: first calls, warming up, and the fewest rounds."""

Chosen = dict[Kind, str | None]
"""For each kind of layers the kernel that was chosen, or None for its own code."""


@dataclass(slots=True)
class Confirmation:
    """What is left of the choices, and all runs that led there. `taken_back` says why a choice was changed."""

    chosen: Chosen
    runs: list[Run] = field(default_factory=list)
    taken_back: dict[Kind, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: str = TUNED


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
    others: tuple[str, ...] = ()  # of `OTHERS`: what the result is raced with

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


def confirm(course: Course, chosen: Chosen) -> Confirmation:
    """Race the choices alone and together, in every workload, and keep what holds."""
    found = Confirmation(dict(chosen))
    alone = _alone(course, found)
    runs = race_all(course, {EAGER: None, BUILTIN: KernelConfig(), TUNED: course.config(found.chosen), **alone})
    for name, mode in product(alone, _EAGER):
        why = _why_not(course, runs, name, alone[name], mode)
        if why is not None:
            gone = [kind for kind in found.chosen if (kind.layer.name, kind.mode) == (name, mode)]
            _take_back(found, gone, f"taken back: {why}")
    if found.taken_back:
        runs = [run for run in runs if run.contender in alone]
        runs += race_all(course, {EAGER: None, BUILTIN: KernelConfig(), TUNED: course.config(found.chosen)})
    runs = _best_of(course, found, runs, alone)
    order = list(dict.fromkeys([EAGER, BUILTIN, TUNED, *(run.contender for run in runs)]))
    found.runs = sorted(runs, key=lambda run: order.index(run.contender))
    return found


def _alone(course: Course, found: Confirmation) -> dict[str, KernelConfig]:
    """The configs of each choice alone, by the name of the layer, where there is more than one and time for them."""
    eager = {kind: ref for kind, ref in found.chosen.items() if kind.mode in _EAGER}
    names = list(dict.fromkeys(kind.layer.name for kind, ref in eager.items() if ref is not None))
    if len(names) < 2:
        return {}
    if (len(names) + 3) * TURNS * sum(course.seconds.values()) > course.until - time.monotonic():
        found.notes.append("no time was left to run each choice alone: all of them were run together only")
        return {}
    return {
        name: course.config({kind: ref if kind.layer.name == name else None for kind, ref in eager.items()})
        for name in names
    }


def _why_not(course: Course, runs: list[Run], name: str, config: KernelConfig, mode: str) -> str | None:
    """Say why a choice alone does not hold end to end in an eager mode, or None.

    What slows the model down in one race of many may do so by chance: it must in a race of its own too, where there is time
    for one. Its runs then take the place of those in `runs`.
    """
    why = _fault(course, _of_mode(runs, mode), name)
    workloads = [workload for workload in course.workloads if workload.training == (mode == "training")]
    need = 2 * TURNS * sum(course.seconds[workload.name] for workload in workloads)
    if why is None or failed(_of_mode(runs, mode), name) or need > course.until - time.monotonic():
        return why
    again = race_all(replace(course, workloads=workloads), {EAGER: None, name: config})
    raced = {(run.contender, run.workload): run for run in again if run.contender == name}
    runs[:] = [raced.get((run.contender, run.workload), run) for run in runs]
    return _fault(course, again, name)


def _fault(course: Course, runs: Sequence[Run], name: str) -> str | None:
    """Say what is wrong with a contender in some runs: it failed, or is worse than the own code; or None."""
    error = next((run.error for run in runs if run.contender == name and run.error), None)
    if error is not None:
        return f"it fails end to end: {error}"
    return f"the whole model with it is {figures(runs, name)}" if score(course, runs, name) < 0 else None


def _of_mode(runs: Sequence[Run], mode: str) -> list[Run]:
    return [run for run in runs if (run.workload == "training") == mode.startswith("training")]


def _take_back(found: Confirmation, kinds: Iterable[Kind], why: str) -> None:
    for kind in kinds:
        if found.chosen[kind] is not None:
            found.chosen[kind], found.taken_back[kind] = None, why


def _best_of(course: Course, found: Confirmation, runs: list[Run], alone: Mapping[str, KernelConfig]) -> list[Run]:
    """Where one contender is clearly faster than all choices together, take it instead. Returns the runs with that result."""
    rivals = {EAGER: None, BUILTIN: KernelConfig(), **alone}
    kept_out = not course.asked.inherit_mapping or any(rule.ref is None for rule in course.asked.rules())
    rivals = {
        name: config
        for name, config in rivals.items()
        if not failed(runs, name) and not (name == BUILTIN and kept_out)  # the user does not want all of it
    }
    if not rivals:
        return runs
    best = max(rivals, key=lambda name: rank(course, runs, name))
    if failed(runs, TUNED):
        why = next(run.error for run in runs if run.contender == TUNED and run.error)
    else:
        if not seems_better(course, runs, best, TUNED):
            return runs
        direct = race_all(course, {TUNED: course.config(found.chosen), best: rivals[best]}, own=TUNED)
        if score(course, direct, best) <= 0:
            return runs
        why = f"{best} is {figures(direct, best)} than all choices together".replace("times as fast", "times faster")
    found.notes.append(f"all choices together did not hold end to end, {best} is the result: {why}")
    eager = [kind for kind in found.chosen if kind.mode in _EAGER]
    _take_back(found, [kind for kind in eager if kind.layer.name != best], f"taken back: {why}")
    if best == EAGER:
        _turn_off(course, found, _EAGER, why)
    if best == BUILTIN:
        _take_defaults(course, found, eager)
    again = race_all(course, {EAGER: None, TUNED: course.config(found.chosen)})
    return [run for run in runs if run.contender != TUNED] + [run for run in again if run.contender == TUNED]


def _turn_off(course: Course, found: Confirmation, modes: Sequence[str], why: str) -> None:
    """Choose own code for what still gets a kernel by default in these modes: kinds that nobody has tuned."""
    for mode in (mode for mode in course.modes if mode in modes):
        alike: dict[tuple[str, str, str | None], list[Layer]] = {}
        with suppress(KernelwiseError):  # what the user asks for cannot be put in: the race of it has said so
            for one in decide(course.model, course.config(found.chosen), mode=mode).decisions:
                if one.kernel is not None and one.asked_by == "default":
                    layer = one.layer
                    alike.setdefault((layer.name, layer.class_name, layer.function), []).append(layer)
        for layers in alike.values():
            kind = Kind(layers[0], tuple(layer.path for layer in layers), mode, "")
            found.chosen[kind], found.taken_back[kind] = None, f"turned off: {why}"


def _take_defaults(course: Course, found: Confirmation, kinds: Sequence[Kind]) -> None:
    """Choose for each kind what it gets by default."""
    for mode in dict.fromkeys(kind.mode for kind in kinds):
        goes_in = {(d.layer.path, d.layer.function): d.kernel for d in decide(course.model, mode=mode).decisions}
        for kind in (kind for kind in kinds if kind.mode == mode):
            kernel = goes_in.get((kind.layer.path, kind.layer.function))
            found.chosen[kind] = None if kernel is None else str(kernel.ref)
            found.taken_back[kind] = "the builtin defaults together are faster than all choices together"


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
    """Whether a contender is so far ahead of another, as far as races against own code show, that a direct race is due."""
    ahead = [ours - theirs for ours, theirs in zip(rank(course, runs, name), rank(course, runs, other), strict=True)]
    return next((by for by in ahead if abs(by) >= _WORTH_A_LOOK), 0.0) > 0


def _lead(course: Course, runs: Sequence[Run], name: str, other: str) -> float:
    """By how much a contender is better than another, as `score`, where both were raced against the model's own code.

    Of times, those differences count that are clear: where the intervals lie apart.
    """
    ahead = _memory(course, runs, name) - _memory(course, runs, other)
    if abs(ahead) > _WORTH_A_LOOK:
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


def confirm_compiled(course: Course, found: Confirmation, saved: Mapping[str, Mapping[str, float]]) -> None:
    """Race the choices for torch.compile with torch.compile alone, and keep them in the modes in which that is better.

    In others all is left to the compiler: a draw is not worth one more thing that may break. Where nothing of ours is left, the
    result is torch.compile of the model's own code, so its runs are those of that.

    Args:
        saved: how many seconds of each workload the choices for a mode save together, where that is known. What is too little
            of a compiled run is not raced.
    """
    for mode in (mode for mode in course.modes if mode.endswith(AND_COMPILED)):
        here = replace(course, workloads=[w for w in course.workloads if w.training == mode.startswith("training")])
        runs = alone = _race_compiled(here, None)
        if _goes_in(course, found, mode):
            why = _invisible(alone, saved.get(mode))
            if why is None:
                runs = _race_compiled(here, course.config(found.chosen))
                why = _why_not_compiled(course, runs)
            if why is not None:
                _take_back(found, [kind for kind in found.chosen if kind.mode == mode], f"taken back: {why}")
                _turn_off(course, found, (mode,), why)
                # What the user asks for stays, and is what has to be raced.
                rest = _goes_in(course, found, mode)
                runs = _race_compiled(here, course.config(found.chosen)) if rest else alone
        found.runs += [run for run in runs if run.contender != EAGER]
        if not any(run.contender == _TUNED_AND_COMPILED for run in runs):
            found.runs += [replace(run, contender=_TUNED_AND_COMPILED) for run in runs if run.contender == COMPILED]


def _race_compiled(course: Course, config: KernelConfig | None) -> list[Run]:
    contenders = {EAGER: None, COMPILED: None} | ({} if config is None else {_TUNED_AND_COMPILED: config})
    return race_all(course, contenders, least_s=_LEAST_COMPILED_S)


def _goes_in(course: Course, found: Confirmation, mode: str) -> bool:
    """Whether any kernel goes into the model in a mode. What cannot be put in counts: the race of it says so."""
    try:
        return any(
            one.kernel is not None for one in decide(course.model, course.config(found.chosen), mode=mode).decisions
        )
    except KernelwiseError:
        return True


def _invisible(runs: Sequence[Run], saved: Mapping[str, float] | None) -> str | None:
    """Say why choices that save so many seconds of each workload need no race with torch.compile, or None."""
    if saved is None or failed(runs, COMPILED):
        return None
    raced = [(run.workload, run.comparison.us) for run in runs if run.contender == COMPILED and run.comparison]
    most = max((saved.get(workload, 0.0) * 1e6 / us for workload, us in raced), default=0.0)
    if most >= _WORTH_A_LOOK:
        return None
    return f"all choices together save at most {max(0.0, most):.1%} of a compiled run, which nobody could see"


def _why_not_compiled(course: Course, runs: Sequence[Run]) -> str | None:
    """Say why the choices for torch.compile are not better than torch.compile alone, or None."""
    error = next((run.error for run in runs if run.contender == _TUNED_AND_COMPILED and run.error), None)
    if error is not None or failed(runs, COMPILED):
        return error
    lead = _lead(course, runs, _TUNED_AND_COMPILED, COMPILED)
    if lead > _WORTH_A_LOOK:
        return None
    return (
        "the compiled model is worse with it than without"
        if lead < -_WORTH_A_LOOK
        else "no clear difference to the compiled model without it"
    )


# ------------------------------------------------------------------------------------------------------------------ races


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
                raced = race(made, workload, device=course.device, seconds=seconds, own=own)
            if known and not any(run.error for run in raced):
                _results.put(key, to_json(_Raced(raced, seconds)))
        else:
            raced = stored.runs
        runs += raced
    return runs


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
