"""Wholes: layers of layers, and a head with its loss → the kernels for them that pay in the whole model. A part of tuning.

What they are called with cannot be made or cut, so nothing times them alone. A kernel for them is raced on the whole model,
beside all that was chosen so far, and is chosen where the model is clearly better with it. Who computes something else in
that race is out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from kernelwise._data import KernelRef, Layer
from kernelwise._evidence import AND_COMPILED, TUNED, Candidate, Run, Timing
from kernelwise._mapping import Rule
from kernelwise._measuring._workload import Workload
from kernelwise._plan import choose_rule
from kernelwise._tuning._candidates import Kind, is_whole, kind_of, looks
from kernelwise._tuning._races import TURNS, Chosen, Course, failed, figures, race_all, rank, score

MOST_S = 4.0
"""What the rounds of one race may take at most: a whole is one choice of many."""

PART = 0.25
"""Which part of the time that is left all these races may take: the choices must still be confirmed."""


@dataclass(slots=True)
class Found:
    """What was chosen for wholes, and why; those that keep their own code have candidates and a reason alone.

    `notes` name those for which no time was left.
    """

    chosen: Chosen = field(default_factory=dict)
    tried: dict[Kind, list[Candidate]] = field(default_factory=dict)
    reasons: dict[Kind, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def wholes_of(layers: Iterable[Layer], modes: Sequence[str], rules: Sequence[Rule]) -> tuple[Kind, ...]:
    """Group the layers that can only be tried in the whole model, without those that a rule of the user decides."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer, mode in product(layers, modes):
        if layer.blocked or layer.excluded or mode.endswith(AND_COMPILED) or not is_whole(layer, mode):
            continue
        if choose_rule(layer, rules, device=layer.device, mode=mode) is None:
            found.setdefault((*looks(layer, mode), mode), []).append(layer)
    return tuple(kind_of(alike, str(key[-1]), "") for key, alike in found.items())


def race_wholes(course: Course, chosen: Chosen, offers: Mapping[Kind, Sequence[KernelRef]]) -> Found:
    """Race every kernel for each whole against the model without it, both with what was chosen so far."""
    found = Found()
    offers = {kind: refs for kind, refs in offers.items() if refs and _workloads(course, kind)}
    most_s = PART * (course.until - time.monotonic()) / max(1, sum(len(_workloads(course, kind)) for kind in offers))
    for kind, refs in offers.items():
        workloads = _workloads(course, kind)
        if _too_late(course, workloads, len(refs) + 1):
            listed = ", ".join(map(str, refs))
            found.notes.append(
                f"no time was left to try {listed} in the whole model ({kind.mode}); tune again to go on from here"
            )
            continue
        base = chosen | found.chosen
        contenders = {TUNED: course.config(base)} | {str(ref): course.config(base | {kind: str(ref)}) for ref in refs}
        runs = race_all(replace(course, workloads=workloads), contenders, own=TUNED, most_s=min(MOST_S, most_s))
        ran = [str(ref) for ref in refs if not failed(runs, str(ref))]
        best = max(ran, key=lambda name: rank(course, runs, name), default="")
        found.tried[kind] = [_candidate(kind, str(ref), runs) for ref in refs]
        if not best:
            found.reasons[kind] = "every candidate is out"
        elif score(course, runs, best) > 0:
            found.chosen[kind], found.reasons[kind] = best, f"the whole model with it is {figures(runs, best)}"
        else:
            found.reasons[kind] = "the whole model is not clearly better with any candidate"
    return found


def _workloads(course: Course, kind: Kind) -> list[Workload]:
    """The workloads in which a whole has work to do in its mode."""
    training = kind.mode == "training"
    return [w for w in course.workloads if w.training == training and _has_work(kind, w.inputs)]


def _too_late(course: Course, workloads: Sequence[Workload], contenders: int) -> bool:
    """Whether a race would take time that confirming needs, which has three contenders at least."""
    need = contenders * sum(course.seconds[w.name] for w in workloads) + 3 * sum(course.seconds.values())
    return TURNS * need > course.until - time.monotonic()


def _has_work(kind: Kind, inputs: object) -> bool:
    """A head has a loss to be joined with where there are labels."""
    return kind.layer.function is None or (isinstance(inputs, Mapping) and inputs.get("labels") is not None)


def _candidate(kind: Kind, name: str, runs: Sequence[Run]) -> Candidate:
    mine = [run for run in runs if run.contender == name]
    timings = [
        Timing(kind.layer.path, kind.paths, name, kind.mode, f"{run.workload}, whole model", run.comparison)
        for run in mine
        if run.comparison is not None
    ]
    return Candidate(name, out=next((run.error for run in mine if run.error), None), timings=tuple(timings))
