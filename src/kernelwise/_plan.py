"""Plan: layers + rules + kernels + target → decisions. Pure: it reads values and returns values, and never imports torch.

What the user's rules ask for on the device at hand is a demand: where it cannot be met, planning fails with every reason.
What only the defaults offer is a wish: where it cannot be met, the layer keeps its own code and the decision says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kernelwise._data import Decision, Kernel, KernelRef, Layer, Plan, Target
from kernelwise._errors import PlanError
from kernelwise._mapping import Rule
from kernelwise._signature import bind

Loaded = Mapping[tuple[KernelRef, str], "Kernel | str"]
"""For each reference and device type the loaded kernel, or the reason why it could not be loaded."""


_Outcome = tuple[Decision, bool]  # and whether the user demanded a kernel there


def choose_rule(layer: Layer, rules: Iterable[Rule], *, device: str, mode: str) -> Rule | None:
    """Return the rule that decides this layer, or None where no rule speaks of it.

    A rule that names a path beats one that names only the layer; then one for this device or mode beats one for any.

    Raises:
        PlanError: two rules of one kind claim the layer.
    """
    claims = [
        rule
        for rule in rules
        if rule.layer == layer.name
        and not rule.fuses
        and rule.device in (None, device)
        and rule.mode in (None, mode)
        and (rule.path is None or any(fnmatchcase(path, rule.path) for path in layer.places))
    ]
    if not claims:
        return None

    def rank(rule: Rule) -> tuple[bool, bool, bool]:
        return rule.path is not None, rule.device is not None, rule.mode is not None

    best = max(map(rank, claims))
    winners = [rule for rule in claims if rank(rule) == best]
    if len(winners) > 1:
        raise PlanError(
            f"two rules claim {layer.path} ({layer.name})\n"
            + "".join(f"  rule       {rule.where}\n" for rule in winners)
            + "  go on      make one path pattern narrower, so that only one of them matches"
        )
    return winners[0]


def reasons_against(layer: Layer, kernel: Kernel, target: Target, mode: str) -> tuple[str, ...]:
    """Return every reason why a kernel cannot serve a layer on a target; empty means it can."""
    reasons = [reason for reason in (layer.blocked, layer.excluded) if reason]
    limits = kernel.limits
    if limits.devices and layer.device not in limits.devices:
        reasons.append(f"runs on {', '.join(limits.devices)}, not on {layer.device}")
    in_training = mode.startswith("training")
    dtypes = [dtype for dtype in limits.dtypes if not (in_training and dtype in limits.inference_only)]
    foreign = [dtype for dtype in layer.dtypes if limits.dtypes and dtype not in dtypes]
    if foreign:
        where = " in training" if in_training and limits.inference_only else ""
        reasons.append(f"takes {', '.join(dtypes) or 'nothing'}{where}; the layer has {', '.join(foreign)}")
    if limits.min_arch and target.arch and _capability(target.arch) < _capability(limits.min_arch):
        reasons.append(f"needs {limits.min_arch} or newer; this is {target.arch}")
    if mode.endswith("+compile") and not kernel.can_torch_compile:
        reasons.append("does not work under torch.compile")
    if kernel.op is not None:
        reasons.extend(_role_reasons(layer, kernel, mode))
    elif layer.function is not None and not layer.function.isidentifier():
        reasons.append(f"is a layer class; {layer.name} takes a kernel by roles")
    elif kernel.signature or kernel.function is not None:  # without both it is only described, for another machine
        missing = [name for name in kernel.reads if name not in layer.attributes]
        if missing:
            reasons.append(
                f"reads {', '.join('self.' + name for name in missing)}, which {_short(layer)} does not have"
            )
        reasons.extend(bind(layer.signature, kernel.signature)[1])
    return tuple(reasons)


def _too_small(layer: Layer, kernel: Kernel) -> tuple[str, ...]:
    """Return why nobody would gain by a kernel that a rule may ask for nevertheless."""
    return tuple(
        f"is not always faster in {dtype} with fewer than {least:,} numbers; the layer has {layer.numel:,}"
        for dtype, least in kernel.limits.gains_from
        if dtype in layer.dtypes and layer.numel < least and not (layer.blocked or layer.excluded)
    )


def _role_reasons(layer: Layer, kernel: Kernel, mode: str) -> list[str]:
    found = layer.computes(mode)
    if found is None:
        return [f"takes the roles of {kernel.op}; what {_short(layer)} computes was not recognised"]
    if found.op != kernel.op:
        return [f"computes {kernel.op}; {_short(layer)} computes {found.op}"]
    reasons = []
    taken = {parameter.name for parameter in kernel.signature}
    limits = dict(kernel.limits.options)
    for name, value in found.options:
        if name in limits and value not in limits[name]:
            reasons.append(f"supports {name} {', '.join(map(str, limits[name]))}; {_short(layer)} has {value}")
        elif taken and name not in taken and name not in limits:
            reasons.append(f"does not know the option {name}, which {_short(layer)} has as {value}")
    for role, binding in found.roles:
        if taken and role not in taken and (binding.kind, binding.value) != ("constant", None):
            reasons.append(f"has no place for the {role} of {_short(layer)}")
    return reasons


def make_plan(
    layers: Sequence[Layer],
    rules: Sequence[Rule],
    kernels: Loaded,
    *,
    target: Target,
    modes: Sequence[str],
    defaults: Mapping[tuple[str, str], Sequence[KernelRef]] | None,
    on_miss: str = "raise",
) -> Plan:
    """Decide every layer in every mode.

    Args:
        kernels: each reference of `rules` and `defaults` with its loaded kernel, or the reason why it did not load.
        defaults: the references that are offered for an operation on a device type without being asked for; None where
            the config does not want any (`inherit_mapping=False`).
        on_miss: `"raise"`, or `"keep"` to let a layer keep its own code where a demand cannot be met.

    Raises:
        PlanError: a demand cannot be met, or two rules of one kind claim one layer. The message lists all of them.
    """
    by_name: dict[str, list[Rule]] = {}
    for stated in rules:
        by_name.setdefault(stated.layer, []).append(stated)
    decisions: list[Decision] = []
    unmet: dict[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], list[Layer]] = {}
    by_place = _names_with_a_path(rules)
    used: set[Rule] = set()
    known: dict[tuple[Any, ...], list[_Outcome]] = {}
    for layer in layers:
        alike = _what_decides(layer, by_place)
        outcomes = known.get(alike)
        if outcomes is None:
            outcomes = known[alike] = []
            for mode in modes:
                rule = choose_rule(layer, by_name.get(layer.name, ()), device=layer.device, mode=mode)
                outcomes.append(_decide(layer, mode, rule, kernels, target, defaults))
                used.update([rule] if rule else [])
        for decision, is_demand in outcomes:
            decisions.append(decision.about(layer))
            if is_demand and decision.kernel is None:
                unmet.setdefault((decision.asked_by, decision.rejected), []).append(layer)
    idle = [rule for rule in rules if rule not in used]
    missed = _missed(idle, layers, target, modes)
    if on_miss == "raise" and (unmet or missed):
        raise PlanError(_explain(unmet, missed, layers, target))
    return Plan(target, tuple(decisions), tuple(_note(rule, target, modes, layers) for rule in idle))


def check_rules(
    layers: Sequence[Layer], rules: Sequence[Rule], *, target: Target, modes: Sequence[str], on_miss: str = "raise"
) -> None:
    """Find what is wrong with rules for these layers whatever their kernels are, so that nothing is loaded in vain.

    Raises:
        PlanError: two rules of one kind claim one layer; or, with `on_miss="raise"`, a rule for this target decides none.
    """
    by_name: dict[str, list[Rule]] = {}
    for rule in rules:
        by_name.setdefault(rule.layer, []).append(rule)
    by_place = _names_with_a_path(rules)
    alike = {
        (layer.name, layer.device, layer.path if layer.name in by_place else None): layer
        for layer in layers
        if layer.name in by_name
    }
    used = {
        choose_rule(layer, by_name[layer.name], device=layer.device, mode=mode)
        for layer in alike.values()
        for mode in modes
    }
    missed = _missed([rule for rule in rules if rule not in used], layers, target, modes)
    if missed and on_miss == "raise":
        raise PlanError(_explain({}, missed, layers, target))


def _names_with_a_path(rules: Iterable[Rule]) -> set[str]:
    """Return the layer names of which a rule says at which paths: there alike layers may be decided differently."""
    return {rule.layer for rule in rules if rule.path is not None}


def _missed(idle: Sequence[Rule], layers: Sequence[Layer], target: Target, modes: Sequence[str]) -> list[Rule]:
    """Of the rules that decide no layer, return those for this target and these modes: demands that nothing meets."""
    devices = {layer.device for layer in layers} | {target.device}
    return [rule for rule in idle if rule.device in (None, *devices) and (rule.mode is None or rule.mode in modes)]


def _what_decides(layer: Layer, by_place: set[str]) -> tuple[Any, ...]:
    """Everything that decides a layer: its place only where a rule for its name has a path.

    Values that `discover` shares between layers stand for themselves by identity, which is cheap for large models.
    """
    return (
        layer.path if by_place and layer.name in by_place else layer.name,
        layer.class_name,
        layer.device,
        layer.dtypes,
        layer.blocked,
        layer.excluded,
        layer.function,
        layer.numel,
        id(layer.signature),
        id(layer.attributes),
        id(layer.recognition),
        id(layer.recognition_in_training),
    )


def _decide(
    layer: Layer,
    mode: str,
    rule: Rule | None,
    kernels: Loaded,
    target: Target,
    defaults: Mapping[tuple[str, str], Sequence[KernelRef]] | None,
) -> _Outcome:
    """Try the kernel that the rule names, or without a rule every default in turn."""
    if rule is not None and rule.ref is None:
        return Decision(layer, mode, None, rule.where, reason="the rule keeps the model's own code"), False
    found = layer.computes(mode)
    op = found.op if found else ""
    refs = (rule.ref,) if rule is not None and rule.ref is not None else (defaults or {}).get((op, layer.device), ())
    asked_by, is_demand = (rule.where, not layer.excluded) if rule is not None else ("default", False)
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for ref in refs:
        kernel = kernels[ref, layer.device]
        if isinstance(kernel, str):
            reasons: tuple[str, ...] = (kernel,)
        elif rule is None and (too_small := _too_small(layer, kernel)):
            reasons = too_small
        else:
            reasons = reasons_against(layer, kernel, target, mode)
        if not reasons and isinstance(kernel, Kernel):
            return Decision(layer, mode, kernel, asked_by, tuple(rejected)), is_demand
        rejected.append((str(ref), reasons))
    if rejected:
        alone = len(rejected) == 1
        reason = "; ".join(("" if alone else f"{ref} ") + ", ".join(reasons) for ref, reasons in rejected)
    elif defaults is None:
        reason = "no rule asks for it (inherit_mapping=False)"
    elif found is None:
        reason = "no rule asks for it, and what it computes was not recognised"
    else:
        reason = f"no rule asks for it, and no kernel is put in unasked for {found.op} on {layer.device}"
    return Decision(layer, mode, None, asked_by, tuple(rejected), reason), is_demand


def _note(rule: Rule, target: Target, modes: Sequence[str], layers: Sequence[Layer]) -> str:
    if rule.device not in (None, target.device):
        return f"{rule.where} did not apply: it is for {rule.device}, the model is on {target.device}"
    if rule.mode is not None and rule.mode not in modes:
        return f"{rule.where} did not apply: it is for {rule.mode}, planned for {', '.join(modes)}"
    return f"{rule.where} did not apply: {_why_idle(rule, layers)}"


def _why_idle(rule: Rule, layers: Sequence[Layer]) -> str:
    if rule.fuses:
        return "layers are fused when transformers builds the model (from_pretrained with kernel_config)"
    paths = [layer.path for layer in layers if layer.name == rule.layer]
    if not paths:
        return f"the model has no layer {rule.layer}"
    if rule.path is not None and not any(fnmatchcase(path, rule.path) for path in paths):
        return f"no {rule.layer} stands at {rule.path} (there are {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
    return "other rules decide every layer that it matches"


def _explain(
    unmet: Mapping[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], Sequence[Layer]],
    missed: Sequence[Rule],
    layers: Sequence[Layer],
    target: Target,
) -> str:
    lines: list[str] = []
    running = " ".join(
        filter(None, [target.device, target.arch, *(f"{name} {version}" for name, version in target.versions)])
    )
    for (where, rejected), places in unmet.items():
        paths = list(dict.fromkeys(layer.path for layer in places))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        dtypes = ", ".join(places[0].dtypes)
        lines += [f"no kernel can run {paths[0]}{more} ({places[0].name})", f"  asked by   {where}"]
        lines += [f"  running on {running}" + (f", {dtypes}" if dtypes else "")]
        for ref, reasons in rejected:
            lines += [f"  tried      {ref}", *(f"               {reason}" for reason in reasons)]
    for rule in missed:
        lines += [f"nothing to do for {rule.where}: {_why_idle(rule, layers)}"]
    lines += ['  go on      change the rule, keep the own code there ("none"), or pass on_miss="keep"']
    return "\n".join(lines)


def _short(layer: Layer) -> str:
    return layer.class_name.rpartition(".")[2]


def _capability(arch: str) -> tuple[int, ...]:
    digits = "".join(filter(str.isdigit, arch))
    return (int(digits[:-1] or 0), int(digits[-1])) if digits else (0, 0)
