"""Groups: a plan → the decisions that one check can speak for, as they are about alike layers and one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelwise._alike import traits_of
from kernelwise._data import Decision, Layer, Plan
from kernelwise._discover import JOINED


@dataclass(frozen=True, slots=True)
class Group:
    """Decisions that one check can speak for: the first one, with all its paths and modes.

    `inside` are those for the children of a layer of layers that its kernel takes in.
    """

    decision: Decision
    paths: tuple[str, ...]
    modes: tuple[str, ...]
    inside: tuple[Decision, ...] = ()


def group(model: nn.Module, plan: Plan) -> tuple[Group, ...]:
    """Put together decisions of alike layers that have the same kernel; decisions without a kernel are left out.

    So are layers that hold others: what they are called with (caches, masks) belongs together and cannot be made or cut;
    and heads with their loss, which are no function that is called.
    """
    found: dict[tuple[Any, ...], list[Decision]] = {}
    shapes: dict[str, tuple[Any, ...]] = {}
    for decision in plan.decisions:
        if decision.kernel is not None and not holds_others(decision) and decision.layer.function != JOINED:
            layer = decision.layer
            if layer.path not in shapes:
                shapes[layer.path] = () if layer.function else traits_of(module_of(model, layer), None, {})
            found.setdefault(
                (layer.class_name, layer.function, layer.computes(decision.mode), decision.kernel, shapes[layer.path]),
                [],
            ).append(decision)
    return tuple(
        Group(
            decisions[0],
            tuple(dict.fromkeys(decision.layer.path for decision in decisions)),
            tuple(dict.fromkeys(decision.mode for decision in decisions)),
        )
        for decisions in found.values()
    )


def group_wholes(model: nn.Module, plan: Plan) -> tuple[Group, ...]:
    """Put together builtin decisions for layers that hold others, alike ones with one kernel and the norm that it takes in.

    They can only be checked on what the model gives them.
    """
    by_place = {(d.layer.path, d.mode): d for d in plan.decisions if d.layer.function is None}
    found: dict[tuple[Any, ...], list[Decision]] = {}
    for decision in plan.decisions:
        if decision.kernel is not None and holds_others(decision) and decision.kernel.ref.scheme == "builtin":
            layer, computes = decision.layer, decision.layer.computes(decision.mode)
            traits = traits_of(module_of(model, layer), None, {})
            alike = tuple(trait for trait in traits if trait[0] != "layer_idx")  # which only a cache is asked for
            key = (layer.class_name, computes, decision.kernel, alike)
            found.setdefault(key, []).append(decision)
    groups = []
    for decisions in found.values():
        first = decisions[0]
        norms = [f"{first.layer.path}.{b.value}" for role, b in _roles(first) if role.endswith("norm")]
        inside = tuple(by_place[path, first.mode] for path in norms if (path, first.mode) in by_place)
        paths, modes = {d.layer.path: None for d in decisions}, {d.mode: None for d in decisions}
        groups.append(Group(first, tuple(paths), tuple(modes), inside))
    return tuple(groups)


def _roles(decision: Decision) -> Sequence[tuple[str, Any]]:
    computes = decision.layer.computes(decision.mode)
    return () if computes is None else [(r, b) for r, b in computes.roles if b.kind == "child"]


def holds_others(decision: Decision) -> bool:
    """Return whether a decision is about a layer whose kernel calls the children of that layer with its own arguments."""
    found = decision.layer.computes(decision.mode)
    return found is not None and found.holds_layers


def module_of(model: nn.Module, layer: Layer) -> nn.Module:
    """Return the module that a layer is, or whose forward calls it."""
    return model.get_submodule(layer.path.rpartition(".")[0] if layer.function is not None else layer.path)
