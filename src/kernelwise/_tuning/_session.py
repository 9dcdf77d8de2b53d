"""Session: what `tune` was asked for → what one tuning knows while it goes on.

All that can be wrong with the arguments is said here, before the first layer is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from kernelwise._applying import _apply
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Layer, Target
from kernelwise._decide import current_target
from kernelwise._discover import discover, model_device
from kernelwise._errors import PlanError
from kernelwise._evidence import COMPILED, LIGER, Candidate, Objective
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._contenders import CONTENDERS
from kernelwise._measuring._environment import environment
from kernelwise._measuring._race import sharing_copy
from kernelwise._measuring._workload import Workload, workloads_of
from kernelwise._plan import choose_rule
from kernelwise._reference import did_you_mean
from kernelwise._tuning._candidates import Given, Kind, kinds_of
from kernelwise._tuning._races import OTHERS
from kernelwise._tuning._shares import Share
from kernelwise._tuning._surroundings import by_name, hash_of, place, settings
from kernelwise._tuning._trials import looks_of
from kernelwise._tuning._wholes import wholes_of

Progress = Callable[[str, float], object]
"""Told what is done next, and which part of the work is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `tune` was asked for; it says what its arguments are."""

    objective: str
    workload: str | Sequence[str] | None
    asked: KernelConfig
    candidates: Given
    contenders: Sequence[str] | None
    steps: int
    seconds: float
    compile: bool
    limit_s: float
    name: str | None


@dataclass(slots=True)
class Session:
    """What one tuning knows while it goes on."""

    model: nn.Module
    device: str
    target: Target
    layers: tuple[Layer, ...]
    kinds: tuple[Kind, ...]
    wholes: tuple[Kind, ...]
    modes: tuple[str, ...]
    workloads: tuple[Workload, ...]
    objective: Objective
    environment: tuple[tuple[str, str], ...]
    about: list[Any]  # the machine, the model, its inputs: what a result depends on
    began: float
    request: Request
    rivals: tuple[str, ...]
    progress: Progress
    shares: dict[tuple[str, tuple[str, str, str]], Share] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)
    device_bound: set[str] = field(default_factory=set)
    tried: dict[Kind, list[Candidate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def begin(model: nn.Module, inputs: Any, request: Request, progress: Progress) -> Session:
    """Check what was given, all before the first layer is looked at."""
    objective, workload, seconds, asked = request.objective, request.workload, request.seconds, request.asked
    if not isinstance(model, nn.Module):
        raise PlanError(f"tune takes a torch.nn.Module, got {model!r}\n  go on      tune(model, inputs)")
    if objective not in get_args(Objective):
        known = get_args(Objective)
        guess = did_you_mean(str(objective), known)
        raise PlanError(
            f"the objective is one of {', '.join(known)}, got {objective!r}{guess}\n  go on      name one of them"
        )
    if not seconds > 0:
        raise PlanError(f"seconds is how long tuning may take, got {seconds!r}\n  go on      leave it out for 300")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError(
            "the model is on the meta device, where nothing can be timed\n  go on      load its weights first"
        )
    if _apply.kernelized_paths(model):
        raise PlanError(
            "the model has kernels already, and candidates are compared with its own code\n"
            "  go on      kernelwise.unkernelize(model), then tune it"
        )
    _check_contenders(request.contenders)
    names = [workload] if isinstance(workload, str) else workload
    workloads = workloads_of(model, inputs, names, steps=request.steps)
    device, kind = place(model), model_device(model) or "cpu"
    eager = dict.fromkeys("training" if one.training else "inference" for one in workloads)
    modes = (*eager, *(f"{mode}+compile" for mode in eager if request.compile))
    layers = discover(model)
    asked.sanitize_kernel_mapping(model, layers=layers)
    copied = sharing_copy(model)
    with on_device(device):
        target = current_target(kind)
    surroundings = environment(device)
    return Session(
        model=copied,
        device=device,
        target=target,
        layers=layers,
        kinds=_to_tune(copied, layers, modes, asked),
        wholes=wholes_of(layers, modes, asked.rules()),
        modes=modes,
        workloads=workloads,
        objective=objective,  # type: ignore[arg-type]
        environment=surroundings,
        about=[
            [*map(list, surroundings), *map(list, settings(device))],
            hash_of(model),
            [[one.name, one.tokens, looks_of(by_name(one.inputs))] for one in workloads],
        ],
        began=time.monotonic(),
        request=request,
        rivals=_rivals_of(copied)
        if request.contenders is None
        else tuple(name for name in request.contenders if name in OTHERS),
        progress=progress,
    )


def _check_contenders(names: Sequence[str] | None) -> None:
    wrong = names if isinstance(names, str) else next((name for name in names or () if name not in CONTENDERS), None)
    if wrong is not None:
        raise PlanError(
            f"contenders is a list of some of {', '.join(OTHERS)}, got {wrong!r}{did_you_mean(wrong, OTHERS)}\n"
            "  go on      leave it out for those that can run here, or give [] for none"
        )


def _rivals_of(model: nn.Module) -> tuple[str, ...]:
    """What is raced besides where nobody says: transformers would fetch code and run it in this process, unproven."""
    return (COMPILED, LIGER) if model_device(model) in ("cuda", "rocm") else (COMPILED,)


def _to_tune(model: nn.Module, layers: Sequence[Layer], modes: Sequence[str], asked: KernelConfig) -> tuple[Kind, ...]:
    """Group layers, without those for which the user's config has None: they keep their own code."""
    found: list[Kind] = []
    for mode in modes:
        claims = [choose_rule(layer, asked.rules(), device=layer.device, mode=mode) for layer in layers]
        wanted = [layer for layer, rule in zip(layers, claims, strict=True) if rule is None or rule.ref is not None]
        found += kinds_of(model, wanted, (mode,))
    return tuple(found)
