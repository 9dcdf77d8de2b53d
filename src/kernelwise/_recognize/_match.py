"""Compare the graph of a layer with the graph of a reference, and find what fills each role."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from kernelwise._recognize._graph import Graph, Node
from kernelwise._recognize._record import Source

COMMUTATIVE = frozenset({"add", "mul"})
Bound = Source | float

# Numbers that stand for a role in a traced reference: no formula has them, and float32 holds them exactly.
_MARKERS = tuple(struct.unpack("f", struct.pack("f", 0.0123291015625 * (1 + i / 64)))[0] for i in range(8))


def markers(names: tuple[str, ...]) -> dict[str, float]:
    """A number of its own for every number role."""
    return dict(zip(names, _MARKERS, strict=False))


class Match:
    """A pairing of the nodes of a reference with those of a candidate that is consistent so far."""

    __slots__ = ("_exact", "_numbers", "pairs", "roles")

    def __init__(self, numbers: Mapping[str, float], *, exact: bool) -> None:
        self._numbers = {value: name for name, value in numbers.items()}
        self._exact = exact
        self.pairs: dict[Node, Node] = {}
        self.roles: dict[str, Bound] = {}

    def _copy(self) -> Match:
        other = Match({}, exact=self._exact)
        other._numbers = self._numbers
        other.pairs, other.roles = dict(self.pairs), dict(self.roles)
        return other

    def _take(self, other: Match) -> None:
        self.pairs, self.roles = other.pairs, other.roles

    def bind(self, role: str, bound: Bound) -> bool:
        """Fill a role; False where it is filled otherwise, or where the same thing fills another role."""
        if role in self.roles:
            return bool(self.roles[role] == bound)
        if isinstance(bound, Source) and bound in self.roles.values():
            return False
        self.roles[role] = bound
        return True

    def nodes(self, reference: Node, candidate: Node) -> bool:
        """Whether the two expressions are the same under one filling of the roles."""
        known = self.pairs.get(reference)
        if known is not None:
            return known is candidate
        if reference.op != candidate.op or reference.dtype != candidate.dtype:
            return False
        if len(reference.shape) != len(candidate.shape) or (self._exact and reference.shape != candidate.shape):
            return False
        if reference.op in COMMUTATIVE:
            a, b = reference.args
            c, d = candidate.args
            attempt = self._copy()
            if attempt.values((a, b), (c, d)):
                self._take(attempt)
            elif not self.values((a, b), (d, c)):
                return False
        elif not self.values(reference.args, candidate.args):
            return False
        self.pairs[reference] = candidate
        return True

    def values(self, reference: Any, candidate: Any) -> bool:
        """Whether two arguments (nodes, sources, numbers, tuples of them) are the same."""
        if isinstance(reference, Node):
            return isinstance(candidate, Node) and self.nodes(reference, candidate)
        if isinstance(reference, Source):
            return isinstance(candidate, Source) and self.bind(reference.name, candidate)
        if isinstance(reference, tuple):
            return (
                isinstance(candidate, tuple)
                and len(reference) == len(candidate)
                and all(self.values(r, c) for r, c in zip(reference, candidate, strict=True))
            )
        if isinstance(reference, float) and reference in self._numbers:
            return isinstance(candidate, float) and self.bind(self._numbers[reference], candidate)
        if isinstance(reference, float) and -reference in self._numbers:
            return isinstance(candidate, float) and self.bind(self._numbers[-reference], -candidate)
        if isinstance(candidate, (Node, Source, tuple)):
            return False
        if not self._exact and type(reference) is int and type(candidate) is int:
            return True
        return type(reference) is type(candidate) and bool(reference == candidate)


def match(reference: Graph, candidate: Graph, numbers: Mapping[str, float], *, exact: bool = True) -> Match | None:
    """Return how the roles of `reference` are filled in `candidate`, or None where the graphs differ.

    `numbers` are the markers with which the reference was traced. Without `exact`, sizes are not compared.
    """
    if reference.structure != candidate.structure or len(reference.outputs) != len(candidate.outputs):
        return None
    found = Match(numbers, exact=exact)
    return found if found.values(reference.outputs, candidate.outputs) else None
