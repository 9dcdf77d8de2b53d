"""The layers of a model as a tree, with alike ones folded: what the report page shows of where each kernel runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from kernelwise._evidence import OWN_CODE, Choice
from kernelwise._table import ROOT


@dataclass(frozen=True, slots=True)
class Node:
    """A module, or several with consecutive or other numbers that hold the same.

    `label` is its name below its parent (`"layers.0–29"`), `alike` how many it stands for. `choices` are indexes into the
    choices that were made for this module itself, one for each mode. `layers` counts the layers in it for which there was a
    choice, itself included, and `changed` those that get a kernel; both for all alike ones together.
    """

    label: str
    alike: int
    choices: tuple[int, ...]
    children: tuple[Node, ...]
    layers: int
    changed: int


@dataclass(slots=True)
class _Module:
    choices: list[int] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)


def tree(choices: Sequence[Choice]) -> tuple[Node, ...]:
    """Return the modules at the top, with what is below them.

    Only layers for which there was a choice stand in it, and the modules on the way to them.
    """
    root = _Module()
    for index, choice in enumerate(choices):
        for path in choice.paths or (choice.layer,):
            module = root
            for part in path.split(".") if path else (ROOT,):
                module = module.children.setdefault(part, _Module())
            module.choices.append(index)
    changed = frozenset(index for index, choice in enumerate(choices) if choice.chosen != OWN_CODE)
    return tuple(
        _joined(node) for node in _folded(_node(name, module, changed) for name, module in root.children.items())
    )


def _node(name: str, module: _Module, changed: frozenset[int]) -> Node:
    children = _folded(_node(child, below, changed) for child, below in module.children.items())
    return Node(
        name,
        1,
        tuple(module.choices),
        children,
        sum(child.layers for child in children) + bool(module.choices),
        sum(child.changed for child in children) + (not changed.isdisjoint(module.choices)),
    )


def _folded(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Fold siblings whose names are numbers and that hold the same."""
    groups: dict[Node | str, list[Node]] = {}
    for node in nodes:
        numbered = node.label.isdecimal()
        groups.setdefault(replace(node, label="") if numbered else node.label, []).append(node)
    return tuple(_together(group) if len(group) > 1 else group[0] for group in groups.values())


def _together(group: list[Node]) -> Node:
    return replace(
        group[0],
        label=_ranges([int(node.label) for node in group]),
        alike=len(group),
        layers=sum(node.layers for node in group),
        changed=sum(node.changed for node in group),
    )


def _joined(node: Node) -> Node:
    """Join a module that only holds one other with that one: `model` and `layers` become `model.layers`."""
    children = tuple(_joined(child) for child in node.children)
    if node.choices or len(children) != 1:
        return replace(node, children=children)
    (child,) = children
    joined = replace(child, label=f"{node.label}.{child.label}", alike=node.alike * child.alike)
    return replace(joined, layers=node.layers, changed=node.changed)


def _ranges(numbers: list[int]) -> str:
    """Say numbers in short.

    >>> _ranges([0, 1, 2, 3, 7, 9, 10])
    '0–3, 7, 9–10'
    """
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(low) if low == high else f"{low}\N{EN DASH}{high}" for low, high in spans)
