"""Tune: a model, inputs and kernels → the config that is right and fastest, with its evidence.

Every candidate is proven and timed on what the model gives its layers; for each kind of layers the best is chosen; and the
choices are confirmed on the whole model. The user's model is never changed: all of it happens on a copy that shares its
weights. What was found is remembered as it is found, so a tuning that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, get_args

import tomli_w
import torch
from torch import nn

from kernelwise import _apply, _prove, _ranks
from kernelwise._alike import function_code, traits_of
from kernelwise._candidates import Given, Kind, kinds_of, offered, read_given
from kernelwise._choose import choose_all
from kernelwise._compare import on_device
from kernelwise._config import KernelConfig
from kernelwise._confirm import Confirmation, Course, confirm
from kernelwise._data import KernelRef, Layer, Target
from kernelwise._decide import Config, current_target, decide
from kernelwise._discover import discover, model_device
from kernelwise._environment import environment
from kernelwise._errors import KernelwiseError, PlanError
from kernelwise._evidence import OWN_CODE, Candidate, Choice, Objective, Tuning
from kernelwise._plan import choose_rule
from kernelwise._race import said, sharing_copy
from kernelwise._reference import did_you_mean
from kernelwise._shares import Share, shares_of
from kernelwise._trials import OutOfTimeError, Trials, looks_of
from kernelwise._worker import SECONDS as CASE_S
from kernelwise._workload import Workload, run_of, undisturbed, workloads_of

Progress = Callable[[str, float], object]
"""Told what is done next, and which part of the work is done, 0 to 1."""

FOR_TRIALS = 0.6
"""Which part of the time goes to candidates in their layers; the rest is for the whole model."""

NEGLIGIBLE = 0.002
"""Layers that take a smaller part of every workload are not tuned: no kernel for them could be seen in the whole."""


@dataclass(slots=True)
class _Session:
    """What one tuning knows while it goes on."""

    model: nn.Module
    device: str
    target: Target
    layers: tuple[Layer, ...]
    kinds: tuple[Kind, ...]
    modes: tuple[str, ...]
    workloads: tuple[Workload, ...]
    objective: Objective
    environment: tuple[tuple[str, str], ...]
    about: list[Any]  # the machine, the model, its inputs: what a result depends on
    began: float
    seconds: float
    progress: Progress
    shares: dict[tuple[str, tuple[str, str, str]], Share] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)
    tried: dict[Kind, list[Candidate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tune(
    model: nn.Module,
    inputs: Any,
    *,
    objective: str = "latency",
    workload: str | Sequence[str] | None = None,
    config: Config = None,
    candidates: Given = (),
    seconds: float = 300.0,
    compile: bool = False,
    limit_s: float = CASE_S,
    progress: Progress | None = None,
    name: str | None = None,
) -> KernelConfig:
    """Tune in this process alone; `kernelwise.tune` says what the arguments are."""
    asked = config if isinstance(config, KernelConfig) else KernelConfig(config)  # type: ignore[arg-type]
    session = _begin(model, inputs, objective, workload, compile, seconds, progress, name, asked)
    refs = {kind: offered(kind, asked.rules(), read_given(candidates)) for kind in session.kinds}
    _look(session)
    with _prove.Prover(seconds=limit_s) as prover:
        _try_all(session, refs, prover)
        chosen, reasons = choose_all(session.tried, session.objective, session.run_s, notes=session.notes)
        chosen |= dict.fromkeys(_asked_and_out(session, asked, chosen))
        named = {rule.ref for rule in asked.rules() if rule.ref is not None}.union(*refs.values())
        course = Course(
            session.model,
            session.layers,
            session.modes,
            session.workloads,
            session.device,
            session.about,
            session.run_s,
            session.began + seconds,
            lambda what: session.progress(what, 0.7),
            session.objective,
            asked,
            {str(ref): ref for ref in named if ref.trust_remote_code},
        )
        found = confirm(course, chosen)
    session.progress("done", 1.0)
    tuned = course.config(found.chosen)
    tuned.evidence = _evidence(session, found, reasons, tuned, name or type(model).__name__)
    return tuned


def tune_together(model: nn.Module, inputs: Any, *, seconds: float = 300.0, **options: Any) -> KernelConfig:
    """Tune on one rank for each kind of device, and give every rank of torch.distributed the same config.

    Where kinds of devices come to different choices, the layers that these are about keep their own code.
    """

    def prepare() -> tuple[str, str]:
        wrapped = next((path for path, module in model.named_modules() if _is_split(module)), None)
        if wrapped is not None:
            raise PlanError(
                f"{wrapped or 'the model'} is wrapped for several processes already, and one alone cannot run it\n"
                "  go on      tune the model before it is wrapped; the config serves the wrapped one too"
            )
        surroundings = environment(str(next((p.device for p in model.parameters()), "cpu")))
        looks = looks_of(_named(inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)))
        same = [
            _hash_of(model),
            looks,
            seconds,
            sorted((key, repr(options[key])) for key in options if key != "progress"),
        ]
        return json.dumps(surroundings), json.dumps(same)

    def decide() -> dict[str, Any]:
        config = tune(model, inputs, seconds=seconds, **options)
        assert config.evidence is not None
        return {"config": config.to_dict(), "evidence": config.evidence.to_json()}

    found = _ranks.decide_together(prepare, decide, seconds=seconds, join=_ranks.join)
    config = KernelConfig.from_dict(found["config"])
    config.evidence = Tuning.from_json(found["evidence"])
    return config


def _is_split(module: nn.Module) -> bool:
    """Whether a module holds only a part of itself, or talks to other processes when it runs."""
    names = {cls.__name__ for cls in type(module).__mro__}
    names |= {type(parameter).__name__ for parameter in module._parameters.values()}
    names |= {type(parameter.data).__name__ for parameter in module._parameters.values() if parameter is not None}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DTensor"})


def _begin(
    model: nn.Module,
    inputs: Any,
    objective: str,
    workload: str | Sequence[str] | None,
    compile: bool,
    seconds: float,
    progress: Progress | None,
    name: str | None,
    asked: KernelConfig,
) -> _Session:
    """Check what was given, all before the first layer is looked at."""
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
    began = time.monotonic()
    workloads = workloads_of(model, inputs, [workload] if isinstance(workload, str) else workload)
    device, kind = _place(model), model_device(model) or "cpu"
    eager = dict.fromkeys("training" if one.training else "inference" for one in workloads)
    modes = (*eager, *(f"{mode}+compile" for mode in eager if compile))
    layers = discover(model)
    asked.sanitize_kernel_mapping(model, layers=layers)
    copied = sharing_copy(model)
    with on_device(device):
        target = current_target(kind)
    surroundings = environment(device)
    return _Session(
        model=copied,
        device=device,
        target=target,
        layers=layers,
        kinds=_to_tune(copied, layers, modes, asked),
        modes=modes,
        workloads=workloads,
        objective=objective,  # type: ignore[arg-type]
        environment=surroundings,
        about=[
            [*map(list, surroundings), *map(list, _settings(device))],
            _hash_of(model),
            [[one.name, one.tokens, looks_of(_named(one.inputs))] for one in workloads],
        ],
        began=began,
        seconds=seconds,
        progress=progress or (lambda what, part: None),
    )


def _to_tune(model: nn.Module, layers: Sequence[Layer], modes: Sequence[str], asked: KernelConfig) -> tuple[Kind, ...]:
    """Group layers, without those for which the user's config has None: they keep their own code."""
    found: list[Kind] = []
    for mode in modes:
        claims = [choose_rule(layer, asked.rules(), device=layer.device, mode=mode) for layer in layers]
        wanted = [layer for layer, rule in zip(layers, claims, strict=True) if rule is None or rule.ref is not None]
        found += kinds_of(model, wanted, (mode,))
    return tuple(found)


def _asked_and_out(session: _Session, asked: KernelConfig, chosen: Mapping[Kind, str | None]) -> list[Kind]:
    """The kinds for which nothing could be chosen and what the user's config names is out: its rule would fail there."""
    named = {(rule.layer, str(rule.ref)) for rule in asked.rules() if rule.ref is not None}
    return [
        kind
        for kind, tried in session.tried.items()
        if kind not in chosen and any(one.out and (kind.layer.name, one.kernel) in named for one in tried)
    ]


def _place(model: nn.Module) -> str:
    """Return the device that a model is on, with its number: `"cpu"`, `"cuda:1"`."""
    places = list(dict.fromkeys(str(parameter.device) for parameter in model.parameters()))
    places = places or [str(buffer.device) for buffer in model.buffers()][:1]
    if len(places) > 1:
        raise PlanError(
            f"the model is spread over {', '.join(places)}, and only a model on one device can be tuned\n"
            "  go on      tune it with fewer layers on one of them; the config serves the whole model too"
        )
    return places[0] if places else "cpu"


def _settings(device: str) -> tuple[tuple[str, str], ...]:
    """What PyTorch is told for all that runs, and what runs depends on: autocast, precision, deterministic algorithms."""
    kind = device.partition(":")[0]
    autocast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {
        "autocast": autocast,
        "float32 products": [_read(torch, "get_float32_matmul_precision"), _read(cuda, "fp32_precision")],
        "tf32": [_read(cuda, "allow_tf32"), _read(cudnn, "allow_tf32")],
        "reduced sums": (cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
    }
    return tuple((name, str(value)) for name, value in found.items())


def _read(owner: Any, name: str) -> Any:
    """Return a setting; None where this PyTorch has none of that name, or it was set by another one."""
    try:
        value = getattr(owner, name, None)
        return value() if callable(value) else value
    except RuntimeError:
        return None


def _hash_of(model: nn.Module) -> str:
    """What the time of a whole model depends on: its code, its shapes, the numbers it holds, its hooks, what is trained."""
    traits = [
        trait for trait in traits_of(model, None, {}) if trait[0] != "generation_config"
    ]  # it holds the hash of an object
    traits += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    traits += [(path, code) for path, module in model.named_modules() for code in _put_on(module)]
    return hashlib.sha256(repr(traits).encode()).hexdigest()


def _put_on(module: nn.Module) -> list[str]:
    """Return the code of what was put on a module: hooks, and a forward of its own."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    found = [hook for some in hooks for hook in some.values()]
    found += [module.__dict__[name] for name in ("forward", "_old_forward") if name in module.__dict__]
    return [function_code(getattr(one, "__func__", one)) for one in found]


def _named(inputs: Any) -> Mapping[str, Any]:
    return inputs if isinstance(inputs, Mapping) else {str(index): value for index, value in enumerate(inputs)}


def _look(session: _Session) -> None:
    """Run every workload, and see how long it takes and what its layers take of it."""
    for workload in session.workloads:
        session.progress(f"where the time goes: {workload.name}", 0.0)
        with on_device(session.device), undisturbed(session.model, training=workload.training):
            run = run_of(session.model, workload)
            shares, seconds = shares_of(session.model, session.kinds, workload, run, session.device)
        session.shares |= shares
        session.run_s[workload.name] = seconds


# ----------------------------------------------------------------------------------------------------------------- trials


def _try_all(session: _Session, refs: Mapping[Kind, Sequence[KernelRef]], prover: _prove.Prover) -> None:
    """Try every candidate: those that are quick to check before all others, and of these what matters most first."""
    kinds = _worth_tuning(session)
    tasks = [(kind, ref) for kind in kinds for ref in refs[kind]]
    tasks.sort(key=lambda task: _turn(task[1]))
    trials = Trials(
        session.model,
        session.target,
        session.workloads,
        session.kinds,
        prover,
        session.about[0],
        session.began + FOR_TRIALS * session.seconds,
        session.shares,
    )
    session.tried = {kind: [] for kind in kinds if refs[kind]}
    left: list[str] = []
    for number, (kind, ref) in enumerate(tasks):
        session.progress(f"{ref} in {kind.layer.path} ({kind.mode})", 0.7 * number / len(tasks))
        try:
            session.tried[kind].append(trials.candidate(kind, ref))
        except OutOfTimeError:
            left.append(f"{ref} in {kind.layer.path} ({kind.mode})")
    for kind, found in session.tried.items():
        found.sort(key=lambda candidate: [str(ref) for ref in refs[kind]].index(candidate.kernel))
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        session.notes.append(f"not tried within {session.seconds:.0f} s: {shown}; tune again to go on from here")


def _turn(ref: KernelRef) -> int:
    """When a candidate has its turn: builtin kernels, PyTorch's operators, others' kernels, what is compiled for seconds."""
    if ref.location == "inductor":
        return 3
    return 2 if ref.scheme != "builtin" else int(ref.location == "torch")


def _worth_tuning(session: _Session) -> list[Kind]:
    """The kinds of layers whose time could be seen in the whole, the most time first; the others are noted."""
    weights: dict[Kind, float] = {}
    idle, small = [], []
    for kind in session.kinds:
        shares = [session.shares[key] for w in session.workloads if (key := (w.name, kind.key)) in session.shares]
        parts = [share.part for share in shares if share.calls and share.part is not None]
        if not any(share.calls for share in shares):
            idle.append(kind)
        elif parts and max(parts) < NEGLIGIBLE:
            small.append(kind)
        else:
            weights[kind] = max(parts, default=1.0)  # of a function nobody knows
    for kinds, why in ((idle, "no workload calls them"), (small, f"they take less than {NEGLIGIBLE:.1%} of the time")):
        if kinds:
            session.notes.append(f"not tuned, for {why}: {_listed(kinds)}")
    return sorted(weights, key=weights.__getitem__, reverse=True)


def _listed(kinds: Sequence[Kind]) -> str:
    """Name kinds by the first of their layers, with the modes that this is about."""
    modes: dict[str, list[str]] = {}
    for kind in kinds:
        modes.setdefault(kind.layer.path, []).append(kind.mode)
    return ", ".join(f"{path} ({', '.join(dict.fromkeys(some))})" for path, some in modes.items())


# --------------------------------------------------------------------------------------------------------------- evidence


def _goes_in(session: _Session, tuned: KernelConfig) -> dict[tuple[str, str | None, str], str]:
    """Return the kernel that really goes into each layer in each mode."""
    found: dict[tuple[str, str | None, str], str] = {}
    for mode in session.modes:
        try:
            decisions = decide(session.model, tuned, mode=mode).decisions
        except KernelwiseError as error:
            session.notes.append(f"the config cannot be put in for {mode}: {said(error)}")
            continue
        found |= {(d.layer.path, d.layer.function, mode): str(d.kernel.ref) for d in decisions if d.kernel is not None}
    return found


def _evidence(
    session: _Session, found: Confirmation, reasons: Mapping[Kind, str], tuned: KernelConfig, name: str
) -> Tuning:
    choices = []
    goes_in = _goes_in(session, tuned)
    for kind in dict.fromkeys([*session.tried, *found.chosen]):
        kernel, reason = found.chosen.get(kind), found.taken_back.get(kind, reasons.get(kind, ""))
        if kind not in found.chosen:
            kernel = goes_in.get((kind.layer.path, kind.layer.function, kind.mode))
            reason += "; it gets what it gets by default" if kernel else ""
        choices.append(
            Choice(
                kind.layer.path,
                kind.paths,
                kind.layer.name,
                kind.layer.class_name,
                kind.op,
                kind.mode,
                kernel or OWN_CODE,
                reason,
                tuple(session.tried.get(kind, ())),
            )
        )
    return Tuning(
        model=name,
        target=session.target,
        objective=session.objective,
        workloads=tuple(workload.name for workload in session.workloads),
        choices=tuple(choices),
        runs=tuple(found.runs),
        environment=session.environment,
        notes=(*session.notes, *found.notes),
        config=tomli_w.dumps(tuned.to_dict()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - session.began,
    )
