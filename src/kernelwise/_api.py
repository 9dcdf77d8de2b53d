"""The public functions: they join the stages and hold no logic of their own.

config → discover → plan → verify → apply → report
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from kernelwise import _apply, _discover, _plan, _prove, _verify, sources
from kernelwise._config import KernelConfig
from kernelwise._data import DEVICE_TYPES, MODES, Checks, Kernel, KernelRef, Layer, Plan, Target
from kernelwise._errors import ApplyError, KernelLoadError, PlanError
from kernelwise._mapping import DEVICE_HINTS, MISS_HINTS, MODE_HINTS, Rule, mode_name
from kernelwise._reference import did_you_mean
from kernelwise._report import Report, make_row
from kernelwise.sources.registered import is_registered

Model = TypeVar("Model", bound=nn.Module)
Config = KernelConfig | Mapping[Any, Any] | None


def current_target(device: str) -> Target:
    """Return the target for a device type on this machine. The only place that asks the hardware."""
    arch = None
    if device == "cuda" and torch.cuda.is_available():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    elif device == "rocm" and torch.cuda.is_available():
        arch = str(torch.cuda.get_device_properties(0).gcnArchName)
    return Target(device, arch, (("torch", torch.__version__),))


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
    return _make_plan(model, config, mode=mode, device=device, target=target, on_miss=on_miss)


def _make_plan(
    model: nn.Module,
    config: Config,
    *,
    mode: object,
    device: str | torch.device | None,
    target: Target | None,
    on_miss: str | None,
    prover: _prove.Prover | None = None,
) -> Plan:
    """Decide as `plan` says; with a prover, kernels are imported here only after that has gone well there."""
    config = config if isinstance(config, KernelConfig) else KernelConfig(config)  # type: ignore[arg-type]
    layers = _discover.discover(model) if isinstance(model, nn.Module) else ()
    config.sanitize_kernel_mapping(model, layers=layers)
    on_miss = config.on_miss if on_miss is None else on_miss
    if on_miss not in ("raise", "keep"):
        raise PlanError(
            f'on_miss is "raise" or "keep", got {on_miss!r}{did_you_mean(str(on_miss), ("raise", "keep"), MISS_HINTS)}\n'
            '  go on      on_miss="keep" leaves a layer its own code where its kernel cannot be had'
        )
    if target is not None:
        _check_target(target)
    rules = config.rules()
    wanted = target.device if target else _device(model, device)
    if wanted is not None and (target is not None or device is not None):
        layers = tuple(replace(layer, device=wanted) for layer in layers)
    modes = ("inference", "training") if mode is None else (_one_mode(mode),)
    devices = {layer.device for layer in layers}
    for_machine = target or current_target(wanted)
    _plan.check_rules(layers, rules, target=for_machine, modes=modes, on_miss=on_miss)
    defaults: dict[tuple[str, str], Sequence[KernelRef]] = {}
    if config.inherit_mapping:
        for layer in layers:
            for found in (layer.recognition, layer.recognition_in_training):
                if found is not None and (found.op, layer.device) not in defaults:
                    defaults[found.op, layer.device] = sources.builtin_refs(found.op, device=layer.device)
    kernels = _load(
        layers, rules, defaults, devices, modes, describe=target is not None, on_miss=on_miss, prover=prover
    )
    return _plan.make_plan(
        layers,
        rules,
        kernels,
        target=for_machine,
        modes=modes,
        defaults=defaults if config.inherit_mapping else None,
        on_miss=on_miss,
    )


def _check_model(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"{function} takes a torch.nn.Module, got {model!r}\n  go on      pass the model that has the kernels"
        )


def _check_target(target: object) -> None:
    if not isinstance(target, Target):
        device = target if isinstance(target, str) and target in DEVICE_TYPES else "cuda"
        raise PlanError(f'target is a kernelwise.Target, got {target!r}\n  go on      target=Target("{device}")')
    if target.device not in DEVICE_TYPES:
        raise _unknown_device(target.device)


def _unknown_device(device: str) -> PlanError:
    guess = did_you_mean(device, DEVICE_TYPES, DEVICE_HINTS)
    return PlanError(
        f"{device!r} is no device type that kernels are for{guess}\n  go on      use one of {', '.join(DEVICE_TYPES)}"
    )


def _one_mode(mode: object) -> str:
    name = mode_name(mode)
    if name is None:
        guess = did_you_mean(mode, MODES, MODE_HINTS) if isinstance(mode, str) else ""
        raise PlanError(
            f"mode is one of {', '.join(MODES)} or a kernels.Mode with INFERENCE or TRAINING, got {mode!r}{guess}\n"
            "  go on      name one of them, or leave it out: train() and eval() then switch"
        )
    return name


def _device(model: nn.Module, device: str | torch.device | None) -> str:
    found = _discover.model_device(model)
    if device is not None:
        try:
            found = _discover.device_type(device)
        except (RuntimeError, TypeError):  # torch knows no such device
            found = str(device)
    if found is None:
        raise PlanError(
            "the model has no parameters, so its device cannot be told\n"
            '  go on      say which: kernelize(model, device="cuda") (one of ' + ", ".join(DEVICE_TYPES) + ")"
        )
    if found not in DEVICE_TYPES and (device is not None or found != "meta"):
        raise _unknown_device(found)
    return found


def _check_place(model: object, device: str | torch.device | None) -> None:
    """Refuse a device that the model is not on: kernels for it would never run, or fail when they do."""
    if device is None or not isinstance(model, nn.Module):
        return
    wanted = _device(model, device)
    places = {_discover.device_type(p.device) for p in model.parameters() if not p.is_meta}
    if places <= {wanted}:
        return
    here = " and ".join(sorted(places))
    if wanted in places:
        raise PlanError(
            f"the model is on {here}, not on {wanted} alone\n"
            "  go on      leave device out: each layer then gets a kernel for where it is"
        )
    name = "cuda" if wanted == "rocm" else wanted  # as torch calls it
    raise PlanError(
        f"the model is on {here}, not on {wanted}\n"
        f'  go on      move it first, model.to("{name}"), or only look: plan(model, device="{name}")'
    )


def _load(
    layers: Sequence[Layer],
    rules: Sequence[Rule],
    defaults: Mapping[tuple[str, str], Sequence[KernelRef]],
    devices: set[str],
    modes: Sequence[str],
    *,
    describe: bool,
    on_miss: str,
    prover: _prove.Prover | None,
) -> dict[tuple[KernelRef, str], Kernel | str]:
    """Load every kernel that a rule or a default offers here. What a rule asks for and cannot be loaded is an error."""
    names = {layer.name for layer in layers}
    kernels: dict[tuple[KernelRef, str], Kernel | str] = {}
    for rule in sorted(rules, key=lambda rule: not _is_no_builtin(rule.ref, devices)):
        if (
            rule.ref is None
            or rule.fuses
            or rule.layer not in names
            or (rule.mode is not None and rule.mode not in modes)
        ):
            continue
        for device in devices:
            if rule.device in (None, device) and (rule.ref, device) not in kernels:
                kernels[rule.ref, device] = _load_one(
                    rule.ref, device, describe, prover, must=on_miss == "raise", where=rule.where
                )
    for (_, device), refs in defaults.items():
        for ref in refs:
            if (ref, device) not in kernels:
                kernels[ref, device] = _load_one(ref, device, describe, prover, must=False)
    return kernels


def _is_no_builtin(ref: KernelRef | None, devices: set[str]) -> bool:
    """Say whether a reference names a builtin kernel that does not exist: it is refused before another is loaded."""
    return (
        ref is not None
        and ref.scheme == "builtin"
        and any(sources.describe(ref, device=device) is None for device in devices)
    )


def _load_one(
    ref: KernelRef, device: str, describe: bool, prover: _prove.Prover | None, *, must: bool, where: str = ""
) -> Kernel | str:
    if describe:
        known = sources.describe(ref, device=device)
        if known is not None or ref.scheme != "builtin":
            return known or Kernel(ref, can_torch_compile=True)
        # No builtin kernel of that name is for the device: loading it imports nothing, and says what there is.
    try:
        before_import = None if prover is None else partial(prover.before_import, device)
        return sources.load(ref, device=device, before_import=before_import)
    except KernelLoadError as error:
        if must:
            error.args = (f"{error.args[0]}\n  asked by   {where}",)
            raise
        return error.reason


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


def decide(
    model: nn.Module,
    config: Config = None,
    *,
    mode: object = None,
    device: str | torch.device | None = None,
    on_miss: str | None = None,
    verify: bool | str = "auto",
) -> Plan:
    """Plan, and leave out what is not proven: what `kernelize` puts in, with the same arguments and errors."""
    if not any(verify is known for known in (True, False)) and verify != "auto":
        raise PlanError(
            f'verify is "auto" or False, got {verify!r}\n'
            '  go on      "auto" checks kernels that were never proven on this machine before they go in'
        )
    _check_place(model, device)
    config = config if isinstance(config, KernelConfig) else KernelConfig(config)  # type: ignore[arg-type]
    on_miss = config.on_miss if on_miss is None else on_miss
    if verify is False or (verify == "auto" and config.verify is False):
        made = _make_plan(model, config, mode=mode, device=device, target=None, on_miss=on_miss)
        return _prove.on_trust(made)
    with _prove.Prover() as prover:
        made = _make_plan(model, config, mode=mode, device=device, target=None, on_miss=on_miss, prover=prover)
        return prover.prove(model, made, on_miss=on_miss)


def plan_safely(model: nn.Module, config: Config = None, *, device: str | torch.device | None = None) -> Plan:
    """Plan as `plan` does, after the import of each kernel that is not builtin has gone well in another process."""
    with _prove.Prover() as prover:
        return _make_plan(model, config, mode=None, device=device, target=None, on_miss=None, prover=prover)


def apply(model: Model, decided: Plan) -> Model:
    """Put the kernels of a plan into the model it was made for, and return the model. Raises `ApplyError`.

    Nothing is checked: the report says which kernels are proven, by `verify` or an earlier `kernelize`.
    """
    for value, kind, name in ((model, nn.Module, "torch.nn.Module"), (decided, Plan, "kernelwise.Plan")):
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
    seed: int = 0,
) -> Checks:
    """Check that every kernel of a plan computes what its layer computes. Nothing is put into the model.

    Outputs and gradients are judged against the layer's own code in float64: a kernel may err at most twice as much as that
    code does. Layers alike are checked once. Kernels that are not builtin run in a process of their own. What is proven here
    counts for `kernelize` too.

    Args:
        decided: what `plan` returned; None: `plan(model)`.
        inputs: what the model is called with (a dict, a tuple, or one argument), to check on what its layers are given.
            None: inputs are made for each layer; weights on the meta device are then made too.
        compile: check under `torch.compile(fullgraph=True)` too, which takes seconds for each kernel.
        seconds, memory: the limits (bytes above the process's own) for each case of a kernel that is not builtin.

    Raises:
        PlanError: a kernel of the plan is only described, or inputs are given for a model on the meta device.

    >>> import torch, kernelwise
    >>> print(kernelwise.verify(torch.nn.Sequential(torch.nn.Linear(4, 4))).ok)
    True
    """
    if decided is not None and not isinstance(decided, Plan):
        raise PlanError(
            f"verify takes a model and its plan, got the {type(decided).__name__} {decided!r}\n"
            "  go on      verify(model, plan(model), inputs)"
        )
    options = _verify.Options(compile=compile, seconds=seconds, memory=memory, seed=seed)
    decided = plan(model) if decided is None else decided
    checks = _verify.verify_plan(model, decided, inputs, options=options)
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
    return "builtin" if kernel.ref.scheme == "builtin" else said.get(str(kernel.ref), "unproven")


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
