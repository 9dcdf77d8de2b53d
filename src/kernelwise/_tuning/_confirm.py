"""Confirm: choices for kinds of layers → the choices that hold for the whole model. The last part of tuning.

What is faster in a layer need not be faster in the model: a kernel may cost the processor more to start, or spoil a cache.
So each choice is raced alone, and all together, against the model's own eager code and against the builtin defaults. What
slows the model down is taken back. Where something simpler is clearly faster than all together, that is the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product

from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Layer
from kernelwise._decide import decide
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import AND_COMPILED, BUILTIN, COMPILED, EAGER, TUNED, Run
from kernelwise._measuring._contenders import is_compiled
from kernelwise._measuring._workload import Workload
from kernelwise._tuning._candidates import Kind
from kernelwise._tuning._races import (
    LEAST_S,
    TURNS,
    WORTH_A_LOOK,
    Chosen,
    Course,
    clear_lead,
    compile_seconds,
    failed,
    figures,
    race_all,
    rank,
    score,
    seems_better,
)
from kernelwise._units import duration

_EAGER = ("inference", "training")
_TUNED_AND_COMPILED = TUNED + AND_COMPILED

_LEAST_COMPILED_S = 4.0
"""What the rounds of a race may take at least where a model had to be compiled, which took longer than that."""


@dataclass(slots=True)
class Confirmation:
    """What is left of the choices, and all runs that led there. `taken_back` says why a choice was changed."""

    chosen: Chosen
    runs: list[Run] = field(default_factory=list)
    taken_back: dict[Kind, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: str = TUNED


def confirm(course: Course, chosen: Chosen, *, until: float | None = None) -> Confirmation:
    """Race the choices alone and together, in every workload, and keep what holds.

    Args:
        until: when the tuning ends (a reading of `time.monotonic`). `course.until` may be earlier, as time is kept for
            compiling; a second look at a choice that seems not to hold may take of that.
    """
    until = course.until if until is None else until
    found = Confirmation(dict(chosen))
    alone = _alone(course, found)
    runs = race_all(course, {EAGER: None, BUILTIN: KernelConfig(), TUNED: course.config(found.chosen), **alone})
    for name, mode in product(alone, _EAGER):
        why = _why_not(course, runs, name, alone[name], mode, until)
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


def _why_not(course: Course, runs: list[Run], name: str, config: KernelConfig, mode: str, until: float) -> str | None:
    """Say why a choice alone does not hold end to end in an eager mode, or None.

    What slows the model down in one race of many may do so by chance: it must in a race of its own too, where there is time
    for one, with rounds as long as it needs. Its runs then take the place of those in `runs`.
    """
    why = _fault(course, _of_mode(runs, mode), name)
    workloads = [workload for workload in course.workloads if workload.training == (mode == "training")]
    longest = max((course.seconds[workload.name] for workload in workloads), default=0.0)
    rounds_s = max(LEAST_S, 2 * TURNS * longest)
    late = len(workloads) * rounds_s > until - time.monotonic()
    if why is None or failed(_of_mode(runs, mode), name) or late:
        return why
    again = race_all(replace(course, workloads=workloads), {EAGER: None, name: config}, least_s=rounds_s)
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


def confirm_compiled(course: Course, found: Confirmation, saved: Mapping[str, Mapping[str, float]]) -> None:
    """Race the choices for torch.compile with torch.compile alone, and keep them in the modes in which that is better.

    In others all is left to the compiler: a draw is not worth one more thing that may break. Where nothing of ours is left, the
    result is torch.compile of the model's own code, so its runs are those of that.

    Args:
        saved: how many seconds of each workload the choices for a mode save together at most, where that is known. What is
            too little of a compiled run is not raced, nor what cannot make it as fast as the tuned model is in eager code.
    """
    modes = [mode for mode in course.modes if mode.endswith(AND_COMPILED)]
    for index, mode in enumerate(modes):
        here, later = (
            replace(course, workloads=_of(course, some)) for some in (modes[index : index + 1], modes[index + 1 :])
        )
        began = time.monotonic()
        runs = alone = _race_compiled(here, found, with_choices=False)
        if _goes_in(course, found, mode):
            recalled = time.monotonic() - began < _first_s(alone)  # so nothing of it is compiled in this process
            why = _in_vain(alone, saved.get(mode)) or _too_late(here, alone, later, recalled=recalled)
            if why is None:
                runs = _with_first_calls(_race_compiled(here, found, with_choices=True), alone)
                why = _why_not_compiled(course, runs)
            if why is not None:
                _take_back(found, [kind for kind in found.chosen if kind.mode == mode], f"taken back: {why}")
                _turn_off(course, found, (mode,), why)
                # What the user asks for stays, and is what has to be raced.
                rest = _goes_in(course, found, mode)
                runs = _with_first_calls(_race_compiled(here, found, with_choices=True), alone) if rest else alone
        raced = {(run.contender, run.workload) for run in runs}
        found.runs = [run for run in found.runs if (run.contender, run.workload) not in raced] + list(runs)
        if not any(run.contender == _TUNED_AND_COMPILED for run in runs):
            found.runs += [replace(run, contender=_TUNED_AND_COMPILED) for run in runs if run.contender == COMPILED]


def _of(course: Course, modes: Sequence[str]) -> list[Workload]:
    return [one for one in course.workloads if any(one.training == mode.startswith("training") for mode in modes)]


def _first_s(runs: Sequence[Run]) -> float:
    """How long the first calls of the compiled model took in all."""
    return sum(run.comparison.first_s or 0.0 for run in runs if run.contender == COMPILED and run.comparison)


def _with_first_calls(runs: Sequence[Run], alone: Sequence[Run]) -> list[Run]:
    """Say of the compiled model how long its first call took in the race alone: in a later one it was compiled already."""
    first = {one.workload: one.comparison.first_s for one in alone if one.contender == COMPILED and one.comparison}
    return [
        replace(run, comparison=replace(run.comparison, first_s=first[run.workload]))
        if run.contender == COMPILED and run.comparison and run.workload in first
        else run
        for run in runs
    ]


def _race_compiled(course: Course, found: Confirmation, *, with_choices: bool) -> list[Run]:
    """Race what was confirmed in eager code once more beside torch.compile: in another race the host may not be as fast."""
    config = course.config(found.chosen)
    contenders = {EAGER: None, BUILTIN: KernelConfig(), TUNED: config, COMPILED: None}
    if with_choices:
        contenders[_TUNED_AND_COMPILED] = config
    return race_all(course, contenders, least_s=_LEAST_COMPILED_S)


def _goes_in(course: Course, found: Confirmation, mode: str) -> bool:
    """Whether any kernel goes into the model in a mode. What cannot be put in counts: the race of it says so."""
    try:
        return any(
            one.kernel is not None for one in decide(course.model, course.config(found.chosen), mode=mode).decisions
        )
    except KernelwiseError:
        return True


def _in_vain(runs: Sequence[Run], saved: Mapping[str, float] | None) -> str | None:
    """Say why choices that save at most so many seconds of each workload need no race with torch.compile, or None.

    Nobody could see it, or the model that was tuned in eager code is faster than any compiled one whatever they save.
    """
    if saved is None or failed(runs, COMPILED):
        return None
    found = {(run.contender, run.workload): run.comparison for run in runs if run.comparison}
    compiled = {workload: one for (name, workload), one in found.items() if name == COMPILED}
    parts = {workload: max(0.0, saved.get(workload, 0.0) * 1e6 / one.us) for workload, one in compiled.items()}
    most = max(parts.values(), default=0.0)
    if most < WORTH_A_LOOK:
        return f"all choices together save at most {most:.1%} of a compiled run, which nobody could see"
    tuned = {workload: one.low for (name, workload), one in found.items() if name == TUNED}
    if all(tuned.get(workload, 0.0) > one.high / max(1 - parts[workload], 1e-9) for workload, one in compiled.items()):
        return (
            f"without torch.compile the tuned model is faster than the compiled one, of which all choices together save at "
            f"most {most:.1%}"
        )
    return None


def _too_late(course: Course, alone: Sequence[Run], later: Course, *, recalled: bool) -> str | None:
    """Say why there is no time to compile the model with the choices as well, or None.

    It takes as long as it took alone, and twice that where the race alone was recalled, as both are compiled then. A first call
    that found all compiled by an earlier tuning says nothing, so it counts as half of the estimate at least.
    """
    estimated = sum(compile_seconds(course.model, workload) for workload in course.workloads)
    takes = max(_first_s(alone), estimated / 2) * (2 if recalled else 1)
    others = sum(compile_seconds(later.model, workload) for workload in later.workloads)
    need = takes + len(course.workloads) * _LEAST_COMPILED_S + others + _for_rivals(course)
    if need <= course.until - time.monotonic():
        return None
    return (
        f"no time was left to compile the model with it, which takes about {duration(takes * 1e6)}; tuning again goes on "
        "from here"
    )


def _for_rivals(course: Course) -> float:
    """How many seconds the races with rivals take that need not be compiled."""
    names = [name for name in course.others if not is_compiled(name)]
    return TURNS * (len(names) + 1) * sum(course.seconds.values()) if names else 0.0


def _why_not_compiled(course: Course, runs: Sequence[Run]) -> str | None:
    """Say why the choices for torch.compile are not better than torch.compile alone, or None."""
    error = next((run.error for run in runs if run.contender == _TUNED_AND_COMPILED and run.error), None)
    if error is not None or failed(runs, COMPILED):
        return error
    lead = clear_lead(course, runs, _TUNED_AND_COMPILED, COMPILED)
    if lead > WORTH_A_LOOK:
        return None
    return (
        "the compiled model is worse with it than without"
        if lead < -WORTH_A_LOOK
        else "no clear difference to the compiled model without it"
    )
