"""Decide: a model and a config → a plan whose kernels are loaded and proven. It joins discover, plan and prove.

Everything that can be known to be wrong is said before the first kernel is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kernelwise import _discover, _plan, sources
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import DEVICE_TYPES, MODES, Kernel, KernelRef, Layer, Plan, Target
from kernelwise._errors import KernelLoadError, PlanError
from kernelwise._mapping import DEVICE_HINTS, MISS_HINTS, MODE_HINTS, Rule, mode_name
from kernelwise._reference import did_you_mean
from kernelwise._verifying import _prove

Config = KernelConfig | Mapping[Any, Any] | None


def current_target(device: str) -> Target:
    """Return the target for a device type on this machine. The only place that asks the hardware."""
    arch = None
    if device == "cuda" and torch.cuda.is_available():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    elif device == "rocm" and torch.cuda.is_available():
        arch = str(torch.cuda.get_device_properties(0).gcnArchName)
    return Target(device, arch, (("torch", str(torch.__version__)),))


def make_plan(
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
            own, also = layer.recognition, layer.recognition_in_training
            for found in (own,) if also is own else (own, also):
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
        made = make_plan(model, config, mode=mode, device=device, target=None, on_miss=on_miss)
        return _prove.on_trust(made)
    with _prove.Prover() as prover:
        made = make_plan(model, config, mode=mode, device=device, target=None, on_miss=on_miss, prover=prover)
        return prover.prove(model, made, on_miss=on_miss)


def plan_safely(model: nn.Module, config: Config = None, *, device: str | torch.device | None = None) -> Plan:
    """Plan as `plan` does, after the import of each kernel that is not builtin has gone well in another process."""
    with _prove.Prover() as prover:
        return make_plan(model, config, mode=None, device=device, target=None, on_miss=None, prover=prover)


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
