"""Show why a layer is not the operation it looks most like: the two canonical graphs side by side."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass

from torch import nn

from kernelwise._recognize._compare import reference_graphs
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._record import Untraceable
from kernelwise._recognize._search import first_graph

_NEAR = 0.6  # share of operators two graphs have in common from which on they are worth a look


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The operation that a layer looks most like, and both graphs, one line a value, differing lines marked."""

    op: str
    options: tuple[tuple[str, object], ...]
    side_by_side: str


def near_miss(module: nn.Module, *, training: bool | None = None) -> NearMiss | None:
    """Return what an unknown layer looks most like, or None where it looks like nothing or cannot be traced."""
    try:
        graph, num_arguments = first_graph(module, training=training)
    except Untraceable:
        return None
    mine = _operators(graph)
    best: tuple[float, NearMiss] | None = None
    for op, variant, reference in reference_graphs(num_arguments):
        theirs = _operators(reference)
        likeness = sum((mine & theirs).values()) / max(1, sum((mine | theirs).values()))
        if likeness >= _NEAR and (best is None or likeness > best[0]):
            best = likeness, NearMiss(op.name, variant.options, _columns(op.name, reference, graph))
    return best[1] if best is not None else None


def _operators(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.reachable() if node.op != "input")


def _columns(name: str, reference: Graph, graph: Graph) -> str:
    left, right = str(reference).splitlines(), str(graph).splitlines()
    width = max(len(name), *map(len, left))
    rows = [f"  {name:{width}}   this layer", f"  {'-' * width}   {'-' * max(map(len, right))}"]
    matcher = difflib.SequenceMatcher(None, _shapes(left), _shapes(right), autojunk=False)
    for tag, start, end, from_line, to_line in matcher.get_opcodes():
        mark = " " if tag == "equal" else "*"
        for i in range(max(end - start, to_line - from_line)):
            one = left[start + i] if start + i < end else ""
            two = right[from_line + i] if from_line + i < to_line else ""
            rows.append(f"{mark} {one:{width}}   {two}".rstrip())
    return "\n".join(rows)


def _shapes(lines: list[str]) -> list[str]:
    """The lines without numbers of values, names and sizes, which differ where the computation does not."""
    return [line.partition(" = ")[2].partition("(")[0] + line.partition("# ")[2].partition(" ")[0] for line in lines]
