"""Tune: a model, inputs and kernels → the config that is right and fastest, with its evidence.

Every candidate is proven and timed on what the model gives its layers; for each kind of layers the best is chosen; and the
choices are confirmed on the whole model. The user's model is never changed: all of it happens on a copy that shares its
weights. What was found is remembered as it is found, so a tuning that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, get_args

import tomli_w
from torch import nn

from kernelwise._applying import _apply
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import KernelRef, Layer, Target
from kernelwise._decide import Config, current_target, decide
from kernelwise._device_lock import alone_on
from kernelwise._discover import discover, model_device
from kernelwise._errors import KernelwiseError, PlanError, said
from kernelwise._evidence import AND_COMPILED, COMPILED, LIGER, OWN_CODE, Candidate, Choice, Objective, Tuning
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._contenders import CONTENDERS, caveats
from kernelwise._measuring._environment import environment
from kernelwise._measuring._race import sharing_copy
from kernelwise._measuring._workload import STEPS, Workload, run_of, undisturbed, workloads_of
from kernelwise._plan import choose_rule
from kernelwise._reference import did_you_mean
from kernelwise._tuning import _ranks
from kernelwise._tuning._candidates import Given, Kind, kinds_of, offered, read_given, spread_out
from kernelwise._tuning._choose import choose_all, saved_under_compile
from kernelwise._tuning._confirm import Confirmation, confirm, confirm_compiled
from kernelwise._tuning._races import OTHERS, Course
from kernelwise._tuning._rivals import compile_seconds, face_rivals
from kernelwise._tuning._shares import Share, shares_of
from kernelwise._tuning._surroundings import by_name, hash_of, is_split, place, settings
from kernelwise._tuning._trials import OutOfTimeError, Trials, looks_of
from kernelwise._tuning._wholes import race_wholes, wholes_of
from kernelwise._verifying import _prove
from kernelwise._verifying._worker import SECONDS as CASE_S

Progress = Callable[[str, float], object]
"""Told what is done next, and which part of the work is done, 0 to 1."""

FOR_TRIALS = 0.6
"""Which part of the time goes to candidates in their layers; the rest is for the whole model."""

NEGLIGIBLE = 0.002
"""Layers that take a smaller part of every workload are not tuned: no kernel for them could be seen in the whole."""


@dataclass(frozen=True, slots=True)
class _Request:
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
class _Session:
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
    request: _Request
    rivals: tuple[str, ...]
    progress: Progress
    shares: dict[tuple[str, tuple[str, str, str]], Share] = field(default_factory=dict)
    run_s: dict[str, float] = field(default_factory=dict)
    device_bound: set[str] = field(default_factory=set)
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
    contenders: Sequence[str] | None = None,
    steps: int = STEPS,
    seconds: float = 300.0,
    compile: bool = False,
    limit_s: float = CASE_S,
    progress: Progress | None = None,
    name: str | None = None,
) -> KernelConfig:
    """Find the fastest kernels that are right for a model on this machine, and return them as a config. Nothing is put in.

    Every kernel that is offered for a kind of layers is checked and timed on what the model gives these layers. The best are
    raced on the whole model, alone and together, and what does not hold there is taken back. `config.evidence` has all that
    was found; it prints as tables. What was measured is remembered: tuning again goes on where it was interrupted.

    Under torch.distributed every rank must call it: one for each kind of device measures, and all get the same config.
    Who measures has the device for itself among those that share the cache directory; others wait, and say so.

    Args:
        inputs: what the model is called with (a dict, a tuple, or one argument). Shapes decide what is fast.
        objective: `"latency"` counts every workload the same, `"throughput"` by the time it takes; `"memory"` takes what
            needs the least at its peak, where the device counts that.
        workload: one or several of `"forward"`, `"prefill"`, `"decode"` and `"training"`. None: prefill and decode for a
            causal language model, else forward; and training where the model is in training mode or has labels.
        config: whose kernels are tried too. Layers with None in it are not tuned; its options and its other rules stay.
        candidates: kernels to try besides those that are offered anyway: references, for all layers that they fit, or a dict
            from layer name to one or several; `"/path:*"` and `"org/repo@v1:*"` are all layers of a repository. An operator of
            PyTorch and what Inductor compiles are tried by themselves.
        contenders: what the result is raced with besides eager and builtin: some of `"torch.compile"`, `"transformers"` and
            `"liger"`. None: torch.compile, where its time suffices, and Liger on GPUs. `config.evidence.best` says who is best.
        steps: how many tokens one run of "decode" computes for each row.
        seconds: how long it may take, about. What could not be tried stands in `config.evidence.notes`.
        compile: tune for `torch.compile` too: what is chosen then goes in with `mode="inference+compile"`.
        limit_s: the time limit of each case of a kernel that is checked in a process of its own.
        progress: called with what comes next, and the part that is done, 0 to 1.
        name: what the evidence calls the model; None: its class.

    Raises:
        PlanError: an argument is wrong, the model has kernels already, is on the meta device or on several devices, or (under
            torch.distributed) a rank failed. KernelConfigError: `config` or `candidates` are wrong.
    """
    asked = config if isinstance(config, KernelConfig) else KernelConfig(config)  # type: ignore[arg-type]
    request = _Request(objective, workload, asked, candidates, contenders, steps, seconds, compile, limit_s, name)
    run = _tune_together if _ranks.several() else _tune_here
    return run(model, inputs, request, progress or (lambda what, part: None))


def _tune_here(model: nn.Module, inputs: Any, request: _Request, progress: Progress) -> KernelConfig:
    """Tune in this process alone."""
    session = _begin(model, inputs, request, progress)
    given = spread_out(read_given(request.candidates), device=session.target.device, notes=session.notes)
    refs = {kind: offered(kind, request.asked.rules(), given) for kind in session.kinds}
    # What is named for every layer that it fits is not for these.
    of_wholes = {kind: offered(kind, (), {**given, None: ()}) for kind in session.wholes}
    with alone_on(session.device, lambda what: progress(what, 0.0)):
        session.began = time.monotonic()
        return _tuned(session, refs, of_wholes)


def _tuned(
    session: _Session, refs: Mapping[Kind, Sequence[KernelRef]], of_wholes: Mapping[Kind, Sequence[KernelRef]]
) -> KernelConfig:
    """Look, try, choose, confirm."""
    request = session.request
    asked = request.asked
    _look(session)
    with _prove.Prover(seconds=request.limit_s) as prover:
        _try_all(session, refs, prover)
        chosen, reasons = choose_all(session.tried, session.objective, session.run_s, notes=session.notes)
        chosen |= dict.fromkeys(_asked_and_out(session, asked, chosen))
        named = {rule.ref for rule in asked.rules() if rule.ref is not None}.union(*refs.values(), *of_wholes.values())
        until = session.began + request.seconds
        course = Course(
            session.model,
            session.layers,
            session.modes,
            session.workloads,
            session.device,
            session.about,
            session.run_s,
            until - _to_compile(session),
            lambda what: session.progress(what, 0.7),
            session.objective,
            asked,
            {str(ref): ref for ref in named if ref.trust_remote_code},
            session.rivals,
        )
        wholes = race_wholes(course, chosen, of_wholes)
        session.tried |= wholes.tried
        session.notes += wholes.notes
        found = confirm(course, chosen | wholes.chosen)
        course = replace(course, until=until)
        by_time = session.objective != "memory"
        confirm_compiled(course, found, saved_under_compile(chosen, session.tried) if by_time else {})
        face_rivals(course, found)
    session.progress("done", 1.0)
    tuned = course.config(found.chosen)
    tuned.evidence = _evidence(session, found, reasons | wholes.reasons, tuned)
    return tuned


def _to_compile(session: _Session) -> float:
    """How many seconds are kept for compiling the whole model, which cannot be interrupted: at most half of all.

    It is compiled with its own code, and with the choices.
    """
    if not session.request.compile:
        return 0.0
    wanted = 2 * sum(compile_seconds(session.model, workload) for workload in session.workloads)
    return min(wanted, session.request.seconds / 2)


def _tune_together(model: nn.Module, inputs: Any, request: _Request, progress: Progress) -> KernelConfig:
    """Tune on one rank for each kind of device, and give every rank of torch.distributed the same config.

    Where kinds of devices come to different choices, the layers that these are about keep their own code.
    """

    def prepare() -> tuple[str, str]:
        wrapped = next((path for path, module in model.named_modules() if is_split(module)), None)
        if wrapped is not None:
            raise PlanError(
                f"{wrapped or 'the model'} is wrapped for several processes already, and one alone cannot run it\n"
                "  go on      tune the model before it is wrapped; the config serves the wrapped one too"
            )
        surroundings = environment(str(next((p.device for p in model.parameters()), "cpu")))
        looks = looks_of(by_name(inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)))
        return json.dumps(surroundings), json.dumps([hash_of(model), looks, repr(request)])

    def decide() -> dict[str, Any]:
        config = _tune_here(model, inputs, request, progress)
        assert config.evidence is not None
        return {"config": config.to_dict(), "evidence": config.evidence.to_json()}

    found = _ranks.decide_together(prepare, decide, seconds=request.seconds, join=_ranks.join)
    config = KernelConfig.from_dict(found["config"])
    config.evidence = Tuning.from_json(found["evidence"])
    return config


def _begin(model: nn.Module, inputs: Any, request: _Request, progress: Progress) -> _Session:
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
    return _Session(
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
    """What a result is raced with where nobody says: transformers would fetch code and run it in this process, unproven."""
    return (COMPILED, LIGER) if model_device(model) in ("cuda", "rocm") else (COMPILED,)


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


def _look(session: _Session) -> None:
    """Run every workload, and see how long it takes and what its layers take of it."""
    for workload in session.workloads:
        session.progress(f"where the time goes: {workload.name}", 0.0)
        with on_device(session.device), undisturbed(session.model, training=workload.training):
            run = run_of(session.model, workload)
            look = shares_of(session.model, session.kinds, workload, run, session.device)
        session.shares |= look.shares
        session.run_s[workload.name] = look.seconds
        if look.device_bound:
            session.device_bound.add(workload.name)


# ----------------------------------------------------------------------------------------------------------------- trials


def _try_all(session: _Session, refs: Mapping[Kind, Sequence[KernelRef]], prover: _prove.Prover) -> None:
    """Try every candidate: those that are quick to check before all others, and of these what matters most first."""
    kinds = _worth_tuning(session)
    tasks = [(kind, ref) for kind in kinds for ref in refs[kind]]
    tasks.sort(key=_turn)
    trials = Trials(
        session.model,
        session.target,
        session.workloads,
        session.kinds,
        prover,
        session.about[0],
        session.began + FOR_TRIALS * (session.request.seconds - _to_compile(session)),
        session.shares,
        session.device_bound,
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
        session.notes.append(
            f"not tried within {session.request.seconds:.0f} s: {shown}; tune again to go on from here"
        )


def _turn(task: tuple[Kind, KernelRef]) -> tuple[int, bool]:
    """When a candidate has its turn: builtin kernels, PyTorch's operators, others' kernels, what is compiled for seconds.

    In each of these what is for torch.compile comes last, as it takes longest.
    """
    kind, ref = task
    builtin = {"torch": 1, "inductor": 3}.get(ref.location, 0)
    return builtin if ref.scheme == "builtin" else 2, kind.mode.endswith(AND_COMPILED)


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


def _evidence(session: _Session, found: Confirmation, reasons: Mapping[Kind, str], tuned: KernelConfig) -> Tuning:
    choices = []
    goes_in = _goes_in(session, tuned)
    kinds = sorted(dict.fromkeys([*session.tried, *found.chosen]), key=lambda kind: session.modes.index(kind.mode))
    for kind in kinds:
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
        model=session.request.name or type(session.model).__name__,
        target=session.target,
        objective=session.objective,
        workloads=tuple(workload.name for workload in session.workloads),
        choices=tuple(choices),
        runs=tuple(found.runs),
        environment=session.environment,
        notes=(*session.notes, *found.notes, *caveats(found.runs)),
        config=tomli_w.dumps(tuned.to_dict()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - session.began,
        best=found.best,
    )
