"""Tune: a model, inputs and kernels → the config that is right and fastest, with its evidence.

Every candidate is proven and timed on what the model gives its layers; for each kind of layers the best is chosen; and the
choices are confirmed on the whole model. The user's model is never changed: all of it happens on a copy that shares its
weights. What was found is remembered as it is found, so a tuning that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import tomli_w
from torch import nn

from kernelwise._configuring._config import KernelConfig
from kernelwise._data import KernelRef
from kernelwise._decide import Config, decide
from kernelwise._device_lock import alone_on
from kernelwise._errors import KernelwiseError, PlanError, said
from kernelwise._evidence import AND_COMPILED, OWN_CODE, Choice, Tuning
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._contenders import caveats
from kernelwise._measuring._environment import environment
from kernelwise._measuring._workload import STEPS, run_of, undisturbed
from kernelwise._tuning import _ranks
from kernelwise._tuning._candidates import Given, Kind, offered, read_given, spread_out
from kernelwise._tuning._choose import choose_all, saved_under_compile
from kernelwise._tuning._confirm import Confirmation, confirm, confirm_compiled
from kernelwise._tuning._races import Course, compile_seconds
from kernelwise._tuning._rivals import face_rivals
from kernelwise._tuning._session import Progress, Request, Session, begin
from kernelwise._tuning._shares import shares_of
from kernelwise._tuning._surroundings import by_name, hash_of, is_split
from kernelwise._tuning._trials import OutOfTimeError, Trials, looks_of
from kernelwise._tuning._wholes import race_wholes
from kernelwise._verifying import _prove
from kernelwise._verifying._worker import SECONDS as CASE_S

FOR_TRIALS = 0.6
"""Which part of the time goes to candidates in their layers; the rest is for the whole model."""

TO_COMPILE = 0.6
"""Which part of the time may be kept for compiling the whole model. What is left of it when that was quick is not used."""

NEGLIGIBLE = 0.002
"""Layers that take a smaller part of every workload are not tuned: no kernel for them could be seen in the whole."""


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
        contenders: what is raced besides eager, builtin and the result: some of `"torch.compile"`, `"transformers"` and
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
    request = Request(objective, workload, asked, candidates, contenders, steps, seconds, compile, limit_s, name)
    run = _tune_together if _ranks.several() else _tune_here
    return run(model, inputs, request, progress or (lambda what, part: None))


def _tune_here(model: nn.Module, inputs: Any, request: Request, progress: Progress) -> KernelConfig:
    """Tune in this process alone."""
    session = begin(model, inputs, request, progress)
    given = spread_out(read_given(request.candidates), device=session.target.device, notes=session.notes)
    refs = {kind: offered(kind, request.asked.rules(), given) for kind in session.kinds}
    # What is named for every layer that it fits is not for these.
    of_wholes = {kind: offered(kind, (), {**given, None: ()}) for kind in session.wholes}
    with alone_on(session.device, lambda what: progress(what, 0.0)):
        session.began = time.monotonic()
        return _tuned(session, refs, of_wholes)


def _tuned(
    session: Session, refs: Mapping[Kind, Sequence[KernelRef]], of_wholes: Mapping[Kind, Sequence[KernelRef]]
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
        found = confirm(course, chosen | wholes.chosen, until=until)
        course = replace(course, until=until)
        saved: dict[str, dict[str, float]] = {}
        if request.compile and session.objective != "memory":
            saved = saved_under_compile(chosen, session.tried, _goes_in(session, course.config(found.chosen)))
        confirm_compiled(course, found, saved)
        face_rivals(course, found)
    session.progress("done", 1.0)
    tuned = course.config(found.chosen)
    tuned.evidence = _evidence(session, found, reasons | wholes.reasons, tuned)
    return tuned


def _to_compile(session: Session) -> float:
    """How many seconds are kept for compiling the whole model, which cannot be interrupted: at most `TO_COMPILE` of all.

    It is compiled with its own code, and with the choices.
    """
    if not session.request.compile:
        return 0.0
    wanted = 2 * sum(compile_seconds(session.model, workload) for workload in session.workloads)
    return min(wanted, TO_COMPILE * session.request.seconds)


def _tune_together(model: nn.Module, inputs: Any, request: Request, progress: Progress) -> KernelConfig:
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


def _asked_and_out(session: Session, asked: KernelConfig, chosen: Mapping[Kind, str | None]) -> list[Kind]:
    """The kinds for which nothing could be chosen and what the user's config names is out: its rule would fail there."""
    named = {(rule.layer, str(rule.ref)) for rule in asked.rules() if rule.ref is not None}
    return [
        kind
        for kind, tried in session.tried.items()
        if kind not in chosen and any(one.out and (kind.layer.name, one.kernel) in named for one in tried)
    ]


def _look(session: Session) -> None:
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


def _try_all(session: Session, refs: Mapping[Kind, Sequence[KernelRef]], prover: _prove.Prover) -> None:
    """Try every candidate: those that are quick to check before all others, and of these what matters most first."""
    kinds = _worth_tuning(session)
    tasks = [(kind, ref) for kind in kinds for ref in refs[kind]]
    tasks.sort(key=_turn)
    seconds = FOR_TRIALS * (session.request.seconds - _to_compile(session))
    trials = Trials(
        session.model,
        session.target,
        session.workloads,
        session.kinds,
        prover,
        session.about[0],
        session.began + seconds,
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
            f"not tried within the {seconds:.0f} of {session.request.seconds:.0f} s that are for layers: {shown}; tune again "
            "to go on from here"
        )


def _turn(task: tuple[Kind, KernelRef]) -> tuple[int, bool]:
    """When a candidate has its turn: builtin kernels, PyTorch's operators, others' kernels, what is compiled for seconds.

    In each of these what is for torch.compile comes last, as it takes longest.
    """
    kind, ref = task
    builtin = {"torch": 1, "inductor": 3}.get(ref.location, 0)
    return builtin if ref.scheme == "builtin" else 2, kind.mode.endswith(AND_COMPILED)


def _worth_tuning(session: Session) -> list[Kind]:
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


def _goes_in(session: Session, tuned: KernelConfig) -> dict[tuple[str, str | None, str], str]:
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


def _evidence(session: Session, found: Confirmation, reasons: Mapping[Kind, str], tuned: KernelConfig) -> Tuning:
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
        notes=tuple(dict.fromkeys((*session.notes, *found.notes, *caveats(found.runs)))),
        config=tomli_w.dumps(tuned.to_dict()),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.monotonic() - session.began,
        best=found.best,
    )
