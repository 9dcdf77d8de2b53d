"""The public functions: they join the stages and hold no logic of their own.

config → discover → plan → verify → apply → report
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from kernelwise import _discover
from kernelwise._applying import _apply
from kernelwise._data import Checks, Kernel, Plan, Target
from kernelwise._decide import Config, decide, make_plan
from kernelwise._errors import ApplyError, PlanError
from kernelwise._reporting._progress import OnCheck, progress_of
from kernelwise._reporting._report import Report, make_row
from kernelwise._tuning._tune import tune as tune
from kernelwise._verifying import _check, _prove, _verify
from kernelwise._verifying._groups import group
from kernelwise.sources.registered import is_registered

Model = TypeVar("Model", bound=nn.Module)


def plan(
    model: nn.Module,
    config: Config = None,
    *,
    mode: object = None,
    device: str | torch.device | None = None,
    target: Target | None = None,
    on_miss: str | None = None,
) -> Plan:
    """Decide which kernel goes into which layer. Loads kernels; the model is only looked at.

    Args:
        config: a `KernelConfig` or the mapping of one. None: builtin kernels for every recognised layer.
        mode: a `kernels.Mode` or its name. None: inference and training both, so that `train()` and `eval()` switch.
        device: the device type to plan for, where it is not the model's own.
        target: plan for another machine; kernels are then described, not loaded, and the plan cannot be applied.
        on_miss: `"raise"` or `"keep"`; None takes what the config says.

    Raises:
        KernelConfigError: the mapping is wrong. KernelLoadError: a kernel that the mapping asks for cannot be loaded.
        PlanError: no kernel can run a layer that the mapping asks one for, two of its rules claim one layer, an argument is
            wrong, or a lazy layer has no shape yet.

    Rules are checked against the model before the first kernel is loaded. Kernels are imported here; `kernelize` and the
    command line try the import of one that was never proven in another process first.
    """
    return make_plan(model, config, mode=mode, device=device, target=target, on_miss=on_miss)


def _check_model(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"{function} takes a torch.nn.Module, got {model!r}\n  go on      pass the model that has the kernels"
        )


def kernelize(
    model: Model,
    config: Config = None,
    *,
    mode: object = None,
    device: str | torch.device | None = None,
    on_miss: str | None = None,
    verify: bool | str = "auto",
) -> Model:
    """Put a kernel into every layer that has one, and return the model.

    Everything is decided, loaded and bound before the first module changes; an error leaves the model as it was. Arguments
    and errors are those of `plan`, `PlanError` where `device` is not the one that the model is on, and `ApplyError` where the
    model cannot be changed (its weights are on meta).

    Args:
        verify: `"auto"` checks a kernel that was never proven on this machine, on inputs made for its layer, before it goes
            in; one that is not proven is treated as one that cannot run the layer. Builtin kernels ship with their proof.
            False puts them in unproven. A config with `verify=False` says the same for `"auto"`; True overrules it.

    >>> import torch, kernelwise
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> kernelwise.kernelize(model) is model
    True
    """
    _apply.apply(model, decide(model, config, mode=mode, device=device, on_miss=on_miss, verify=verify))
    return model


def apply(model: Model, decided: Plan) -> Model:
    """Put the kernels of a plan into the model it was made for, and return the model. Raises `ApplyError`.

    Nothing is checked: the report says which kernels are proven, by `verify` or an earlier `kernelize`.
    """
    for value, kind, name in ((model, nn.Module, "torch.nn.Module"), (decided, Plan, "plan")):
        if not isinstance(value, kind):
            raise ApplyError(
                f"apply takes a model and its plan: a {name} was expected, got {value!r}\n"
                "  go on      apply(model, plan(model))"
            )
    _check_same_layers(model, decided)
    _apply.apply(model, decided if decided.proofs else _prove.recall(model, decided))
    return model


def _check_same_layers(model: nn.Module, decided: Plan) -> None:
    """A kernel by roles was chosen for what a layer computed when the plan was made: it must compute the same now."""
    found = {(layer.path, layer.function): layer for layer in _discover.discover(model)}
    for decision in decided.decisions:
        layer = found.get((decision.layer.path, decision.layer.function))
        if decision.kernel is None or decision.kernel.op is None or layer is None:
            continue  # a layer that is missing altogether is named by _apply
        planned, now = decision.layer.computes(decision.mode), layer.computes(decision.mode)
        if planned != now:
            raise ApplyError(
                f"{layer.path} computes something else than the plan was made for\n"
                f"  planned    {planned}\n  now        {now}\n  go on      plan again for this model"
            )


def verify(
    model: nn.Module,
    decided: Plan | None = None,
    inputs: Any = None,
    *,
    compile: bool = False,
    seconds: float = 60.0,
    memory: int = 8 << 30,
    capture_memory: int = 256 << 20,
    seed: int = 0,
    progress: bool | OnCheck = False,
) -> Checks:
    """Check that every kernel of a plan computes what its layer computes. Nothing is put into the model.

    Outputs and gradients are judged against the layer's own code in float64: a kernel may err at most twice as much as that
    code does. Layers alike are checked once. Kernels that are not builtin run in a process of their own. What is proven here
    counts for `kernelize` too.

    Args:
        decided: what `plan` returned; None: `plan(model)`.
        inputs: what the model is called with (a dict, a tuple, or one argument), to check on what its layers are given.
            None: inputs are made for each layer. On the meta device the model tells shapes and strides; weights are made.
        compile: check under `torch.compile(fullgraph=True)` too, which takes seconds for each kernel.
        seconds, memory: the limits (bytes above the process's own) for each case of a kernel that is not builtin.
        capture_memory: the most bytes to keep of what the model's layers are given. Layers beyond it are captured in further
            passes of the model; where not even one row fits, or a layer is not called, the notes say that inputs were made.
        progress: True draws a bar on standard error, in kinds of layers; a function is called with every check as it is done.

    Raises:
        PlanError: a kernel of the plan is only described, or the model is on the meta device and does not run there.

    >>> import torch, kernelwise
    >>> print(kernelwise.verify(torch.nn.Sequential(torch.nn.Linear(4, 4))).ok)
    True
    """
    if decided is not None and not isinstance(decided, Plan):
        raise PlanError(
            f"verify takes a model and its plan, got the {type(decided).__name__} {decided!r}\n"
            "  go on      verify(model, plan(model), inputs)"
        )
    options = _check.Options(compile=compile, seconds=seconds, memory=memory, seed=seed, capture_memory=capture_memory)
    decided = plan(model) if decided is None else decided
    with progress_of(progress, total=len(group(model, decided))) as on_check:
        checks = _verify.verify_plan(model, decided, inputs, options=options, on_check=on_check)
    _prove.remember(model, decided, checks.checks)
    return checks


def unkernelize(model: Model, *, paths: Sequence[str] | None = None) -> Model:
    """Take every kernel out again, or those at `paths` and below, and return the model.

    Only what is still ours is removed. Where somebody has wrapped a kernelized forward since, ours stays inside the wrapper
    and passes every call on to the layer's own code.

    Raises:
        PlanError: one of `paths` has no kernel at or below it, or `model` is no model.
    """
    _check_model(model, "unkernelize")
    if paths is not None:
        known = _apply.kernelized_paths(model)
        for path in [paths] if isinstance(paths, str) else paths:
            if not _apply.is_below(known, [path]):
                raise PlanError(
                    f"no kernel is at or below {path!r}\n  go on      print(kernelwise.report(model)) lists them"
                )
    _apply.remove(model, paths=[paths] if isinstance(paths, str) else paths)
    return model


@contextmanager
def kernelized(model: Model, config: Config = None, **options: Any) -> Iterator[Model]:
    """Kernelize for the length of a `with` block. Takes the arguments of `kernelize`; blocks may nest and overlap."""
    token = _apply.apply(model, decide(model, config, **options))
    try:
        yield model
    finally:
        _apply.remove(model, token=token)


def report(model: nn.Module) -> Report:
    """Say of every layer what runs in it now: its kernel, or the reason for none, and how many calls fell back.

    A model that was never kernelized gives a report that says so. Raises `PlanError` for what is no model.
    """
    _check_model(model, "report")
    decided, notes = _apply.decided(model)
    proofs = _proofs(model)
    rows = [
        make_row(decision, counts, proofs.get(id(decision.kernel)))
        if runs or decision.kernel is None
        else make_row(replace(decision, kernel=None, reason="its kernel was taken out again"), {}, None)
        for decision, counts, runs in decided
    ]
    if not rows:
        notes.append("no kernels: the model runs its own code")
    return Report(tuple(rows), tuple(dict.fromkeys(notes)))


def _proofs(model: nn.Module) -> dict[int, str]:
    """What the plans on a model say of their kernels, by the kernels' identity: a later plan may know more or less."""
    found: dict[int, str] = {}
    for module in model.modules():
        state = module.__dict__.get(_discover.STATE)
        for plan in state.plans.values() if state is not None else ():
            said = dict(plan.proofs)
            for decision in plan.decisions:
                if decision.kernel is not None:
                    found[id(decision.kernel)] = _proof(decision.kernel, said)
    return found


def _proof(kernel: Kernel, said: dict[str, str]) -> str:
    if is_registered(kernel):
        return "your word (register_op)"
    return said.get(str(kernel.ref), "unproven") if _prove.needs_proof(kernel.ref) else "builtin"


@contextmanager
def expose_hidden_kernels(model: Model) -> Iterator[Model]:
    """Register the function kernels hidden on a model's modules as submodules for the length of a `with` block.

    For versions of the `kernels` library whose own `kernelize` looks at submodules alone.
    """
    _check_model(model, "expose_hidden_kernels")
    added: list[tuple[nn.Module, str]] = []
    try:
        for module in list(model.modules()):
            for attribute in ("_kernel_funcs", "_hidden_kernels"):
                for name, wrapper in (module.__dict__.get(attribute) or {}).items():
                    if isinstance(wrapper, nn.Module) and name.isidentifier() and name not in module._modules:
                        module._modules[name] = wrapper
                        added.append((module, name))
        yield model
    finally:
        for module, name in added:
            module._modules.pop(name, None)
