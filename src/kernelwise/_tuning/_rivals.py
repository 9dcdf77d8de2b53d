"""Rivals: what runs whole models in other ways, such as torch.compile, beside the model's own code. After confirming.

No config says what these do, so none of them can be the result. Where one is better, the evidence says so, and how to get it:
a tuning never passes for the best that there is where it has seen something better.
"""

from __future__ import annotations

import time
from dataclasses import replace

from kernelwise._evidence import AND_COMPILED, BUILTIN, COMPILED, EAGER, TUNED, Run
from kernelwise._measuring._contenders import is_compiled
from kernelwise._measuring._workload import Workload
from kernelwise._tuning._confirm import Confirmation
from kernelwise._tuning._races import OTHERS, TURNS, Course, compile_seconds, failed, race_all, rank, seems_better
from kernelwise._units import duration

MOST_S = 5.0
"""What the rounds of one race may take at most: how far behind a rival is matters less than whether it is."""


def face_rivals(course: Course, found: Confirmation) -> None:
    """Race each rival with the model's own code, workload by workload, and note in `found` who ran and who is best.

    The result was raced with that too, so what is compared is how much faster each is. A rival that was raced already is not
    raced again. torch.compile is left out where its time does not suffice: its runs then say so.
    """
    there = {run.contender for run in found.runs}
    names = [name for name in course.others if name not in there]
    for workload in course.workloads:
        late = {name: why for name in names if (why := _too_late(course, name, workload))}
        found.runs += [Run(name, workload.name, None, workload.tokens, why) for name, why in late.items()]
        ready = dict.fromkeys(name for name in names if name not in late)
        if ready:
            raced = race_all(replace(course, workloads=(workload,)), {EAGER: None, **ready}, most_s=MOST_S)
            found.runs += [run for run in raced if run.contender in ready]
    # torch.compile was raced wherever the config was tuned for it, asked for or not.
    ran = [name for name in (TUNED + AND_COMPILED, *OTHERS) if not failed(found.runs, name)]
    best = max(ran, key=lambda name: rank(course, found.runs, name), default=TUNED)
    if seems_better(course, found.runs, best, TUNED):
        found.best = best
    whole = (EAGER, BUILTIN, TUNED, *OTHERS)
    found.runs.sort(key=lambda run: whole.index(run.contender) if run.contender in whole else len(whole))


def _too_late(course: Course, name: str, workload: Workload) -> str | None:
    """Say why there is no time for a rival that must be compiled, or None."""
    if not is_compiled(name):
        return None
    compiling = compile_seconds(course.model, workload)
    if compiling + TURNS * course.seconds[workload.name] <= course.until - time.monotonic():
        return None
    return (
        f"no time was left to compile it, which takes about {duration(compiling * 1e6)}: tuning again goes on from here, or "
        f"kernelwise bench MODEL --contender {COMPILED} runs it"
    )
