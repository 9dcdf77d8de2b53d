"""What was not recognised and why: for all of a model, and for one layer with two canonical graphs side by side."""

from __future__ import annotations

import difflib
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kernelwise._recognize._children import layer_graphs
from kernelwise._recognize._compare import reference_graph
from kernelwise._recognize._graph import Graph, Node
from kernelwise._recognize._match import COMMUTATIVE
from kernelwise._recognize._record import Untraceable
from kernelwise._recognize._rounds import arguments_of
from kernelwise._recognize._search import first_graph, function_graphs
from kernelwise.ops import OPERATIONS, Operation, Variant

_NEAR = 0.6  # share of operators two graphs have in common from which on they are worth a look

_SOME = 2  # what an integer of a reference is here (a group size, a number of experts): sizes are not compared


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The operation that a layer looks most like, and both graphs, one line a value, differing lines marked."""

    op: str
    options: tuple[tuple[str, object], ...]
    side_by_side: str


def near_miss(layer: nn.Module | types.FunctionType, *, training: bool | None = None) -> NearMiss | None:
    """Return what an unknown layer or function looks most like; None where it looks like nothing or cannot be traced."""
    best: tuple[tuple[float, float], NearMiss] | None = None
    for op, variant, reference, graph in _pairs(layer, training):
        mine, theirs = _operators(graph), _operators(reference)
        likeness = sum((mine & theirs).values()) / max(1, sum((mine | theirs).values()))
        if likeness < _NEAR or (best is not None and likeness < best[0][0]):
            continue
        rank = likeness, _matcher(reference, graph).ratio()  # of the same operators, those in the same order
        if best is None or rank > best[0]:
            best = rank, NearMiss(op.name, variant.options, _columns(op.name, reference, graph))
    return best[1] if best is not None else None


def _pairs(
    layer: nn.Module | types.FunctionType, training: bool | None
) -> Iterator[tuple[Operation, Variant, Graph, Graph]]:
    """Every variant that a layer could be by its arguments: the graph of its reference, and that of the layer."""
    if not isinstance(layer, nn.Module):
        for op, variant, fixed, graph in function_graphs(layer):
            reference = reference_graph(op, variant, fixed)
            if reference is not None:
                yield op, variant, reference, graph
        return
    for op, variant, graph in (*_module_graphs(layer, training), *layer_graphs(layer, training=training)):
        reference = reference_graph(op, variant, dict.fromkeys(op.choices, _SOME))
        if reference is not None:
            yield op, variant, reference, graph


def _module_graphs(module: nn.Module, training: bool | None) -> Iterator[tuple[Operation, Variant, Graph]]:
    try:
        graph, num_arguments = first_graph(module, training=training)
    except Untraceable:
        return
    for op in OPERATIONS.values():
        if not op.function and not op.loss and not op.norms and len(arguments_of(op)) == num_arguments:
            yield from ((op, variant, graph) for variant in op.variants)


def _operators(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.reachable() if node.op != "input")


def _matcher(reference: Graph, graph: Graph) -> difflib.SequenceMatcher[tuple[str, str]]:
    left, right = ([(node.op, str(node.dtype)) for node in item.reachable()] for item in (reference, graph))
    return difflib.SequenceMatcher(None, left, right, autojunk=False)


def _columns(name: str, reference: Graph, graph: Graph) -> str:
    left, right = str(reference).splitlines(), str(graph).splitlines()
    mine, theirs = list(graph.reachable()), list(reference.reachable())
    width = max(len(name), *map(len, left))
    rows = [f"  {name:{width}}   this layer", f"  {'-' * width}   {'-' * max(map(len, right))}"]
    pairs: dict[Node, Node] = {}
    for _, start, end, from_line, to_line in _matcher(reference, graph).get_opcodes():
        for i in range(max(end - start, to_line - from_line)):
            one, two = (theirs[start + i : end][:1], mine[from_line + i : to_line][:1])
            same = bool(one and two) and _alike(one[0], two[0], pairs)
            rows.append(
                f"{' ' if same else '*'} {left[start + i] if one else '':{width}}   "
                f"{right[from_line + i] if two else ''}".rstrip()
            )
    same = [pairs.get(node) for node in reference.outputs] == list(graph.outputs)
    rows.append(f"{' ' if same else '*'} {left[-1]:{width}}   {right[-1]}")
    return "\n".join(rows)


def _alike(reference: Node, node: Node, pairs: dict[Node, Node]) -> bool:
    """Whether two values are computed alike from values that stand beside each other; sizes and numbers aside."""
    if (reference.op, reference.dtype) != (node.op, node.dtype):
        return False
    pairs[reference] = node
    theirs, mine = [pairs.get(item) for item in reference.inputs()], list(node.inputs())
    if theirs != mine and not (reference.op in COMMUTATIVE and theirs[::-1] == mine):
        return False
    return reference.op == "input" or _places(reference) == _places(node)


def _places(node: Node) -> list[object]:
    """What else decides a value than values and sizes: dimensions, counted from the last one, and words."""
    rank = len(node.shape)
    return [
        item - rank if type(item) is int and 0 <= item < rank else item
        for arg in node.args
        for item in (arg if isinstance(arg, tuple) else (arg,))
        if type(item) in (str, bool) or (type(item) is int and -rank <= item < rank)
    ]
