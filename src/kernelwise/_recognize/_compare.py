"""Compare a layer with a reference, and prove it at more sizes and dtypes.

Layer and reference are traced on the same shapes, in several ranks, sizes and dtypes, and must be the same every time
with the same filling of the roles: a branch on a shape or a dtype shows there. Numbers are bound to an attribute only
where changing the attribute changes the number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelwise._data import Binding
from kernelwise._recognize._conditions import FIXED, LARGEST, Decisions, Sizes, Tree, parts_of, sizes_otherwise
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import Bound, Match, markers, match
from kernelwise._recognize._reads import Reads
from kernelwise._recognize._record import Failed, Recorder, Source, Untraceable
from kernelwise._recognize._rounds import (
    FIRST,
    ROUNDS,
    SIZE_NAMES,
    Round,
    at_roles,
    dtype_of,
    names_of,
    round_at,
    sizes_of,
    with_size,
)
from kernelwise._recognize._sizes import Watch
from kernelwise._recognize._stand_in import Stage
from kernelwise._recognize._trace import trace
from kernelwise.ops import OPERATIONS, Operation, Variant


@dataclass(slots=True)
class Candidate:
    """A layer or a function that can be traced again and again.

    `run(stage, round)` returns its graph; `sizes(round)` are the sizes that its arguments have there, by name. `reads`
    collects what all traces have read, `decisions` what each has decided by sizes.
    """

    run: Callable[[Stage, Round], Graph]
    reads: Reads
    sizes: Callable[[Round], Sizes]
    training: bool | None = None
    decisions: dict[Round, Decisions] = field(default_factory=dict)
    proven: set[tuple[Any, ...]] = field(default_factory=set)

    def graph(self, at: Round, overrides: dict[str, Any] | None = None) -> Graph:
        """Trace once. Raises `Untraceable`."""
        watch = Watch(names_of(self.sizes(at)))
        stage = Stage(
            Recorder(watch.cut),
            FakeTensorMode(),
            at.widths,
            training=self.training,
            overrides=overrides or {},
            watch=watch,
        )
        try:
            graph = self.run(stage, at)
            if watch.failed:
                raise Untraceable("it goes on after PyTorch has raised an exception: it decides something by it")
            return graph
        finally:
            if not overrides:
                self.decisions[at] = watch.decisions
            for path, value in stage.reads.tokens.items():
                if not overrides or path[0] not in overrides:
                    self.reads.tokens.setdefault(path, value)
            self.reads.asked |= stage.reads.asked

    def decides_by_unnamed(self) -> bool:
        """Whether it decides something by a size of which nobody knows where it comes from, and that is not always the same.

        Always the same is the width of a head. What is not is another number wherever all sizes are others.
        """
        unnamed = {
            at: {tree for tree in decisions if next(parts_of(tree, "unnamed"), None) is not None}
            for at, decisions in self.decisions.items()
            if not at.absent and min(at.lead, default=2) > 1 and not (at.width and FIXED in self.sizes(at))
        }
        first = unnamed.get(FIRST, set())
        return any(not trees <= first for trees in unnamed.values()) or not first <= unnamed.get(ROUNDS[0], first)

    def numbers(self) -> frozenset[int]:
        """The whole numbers that sizes were compared with."""
        trees = (tree for decisions in self.decisions.values() for tree in decisions)
        return frozenset(n for tree in trees for n in parts_of(tree, "number") if type(n) is int and n > 2)


def reference_graph(op: Operation, variant: Variant, fixed: dict[str, int]) -> Graph | None:
    """The graph of a variant at sizes of its own; None where it has none."""
    graph = _reference_graph(op.name, op.reference, variant, tuple(fixed.items()), FIRST, None)
    return graph if isinstance(graph, Graph) else None


def may_be(op: Operation, graph: Graph) -> bool:
    there = graph.operators()
    return all(any(name in there for name in names) for names in op.operators)


def compare(
    op: Operation, variant: Variant, fixed: dict[str, int], graph: Graph, at: Round, roles: dict[str, Bound] | None
) -> Match | None:
    """Match a graph with any form of the variant; with `roles` known, on the same shapes and to the last size."""
    if roles is None:
        loose = (_match_form(op, form, variant, fixed, graph, at, None) for form in _forms(op))
        for found in loose:
            if found is not None:
                exact = compare(op, variant, fixed, graph, at, found.roles)
                if exact is not None:
                    return exact
        return None
    shapes = _shapes_of(graph, roles)
    children = {b.name: role for role, b in roles.items() if isinstance(b, Source) and b.kind == "child"}
    at = at_roles(at, children)
    for form in _forms(op):
        found = _match_form(op, form, variant, fixed, graph, at, shapes)
        if found is not None and found.roles == roles:
            return found
    return None


def fits(op: Operation, variant: Variant, fixed: dict[str, int], graph: Graph, roles: dict[str, Bound]) -> bool:
    """Whether tensors of the first round have the sizes that the operation says: a weight of one element would broadcast."""
    usual = sizes_of(FIRST, variant, fixed)
    names = {value: name for name, value in usual.items() if name in SIZE_NAMES}
    found: dict[str, int] = {}
    shapes = dict(_shapes_of(graph, roles))
    for role in op.roles:
        declared, actual = role.shape(usual), shapes.get(role.name)
        if role.kind not in ("argument", "attribute") or actual is None or len(declared) != len(actual):
            continue
        for size, there in zip(declared, actual, strict=True):
            if size in names and found.setdefault(names[size], there) != there:
                return False
    return True


def _forms(op: Operation) -> Iterator[Callable[..., Any]]:
    yield op.reference
    yield from op.forms


def _match_form(
    op: Operation,
    form: Callable[..., Any],
    variant: Variant,
    fixed: dict[str, int],
    graph: Graph,
    at: Round,
    shapes: tuple[tuple[str, tuple[int, ...]], ...] | None,
) -> Match | None:
    numbers = markers(tuple(role.name for role in op.roles if role.kind == "number"))
    reference = _reference_graph(op.name, form, variant, tuple(fixed.items()), at, shapes)
    if isinstance(reference, str):
        return None
    return match(reference, graph, numbers, exact=shapes is not None)


def _shapes_of(graph: Graph, roles: dict[str, Bound]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The shape of what fills each role: of a tensor, or of what a child gives."""
    by_source = {node.args[0]: node.shape for node in graph.reachable() if node.op in ("input", "call")}
    return tuple((role, by_source[b]) for role, b in roles.items() if isinstance(b, Source) and b in by_source)


@functools.lru_cache(maxsize=2048)
def _reference_graph(
    name: str,
    form: Callable[..., Any],
    variant: Variant,
    fixed: tuple[tuple[str, int], ...],
    at: Round,
    shapes: tuple[tuple[str, tuple[int, ...]], ...] | None,
) -> Graph | str:
    """The graph of one form of a reference, or why it has none at these shapes."""
    op = OPERATIONS[name]
    stage = Stage(Recorder(), FakeTensorMode(), at.widths)
    known = dict(shapes) if shapes is not None else None
    constants = dict(variant.constants)
    sizes = sizes_of(at, variant, dict(fixed))
    numbers = markers(tuple(role.name for role in op.roles if role.kind == "number"))
    given: dict[str, Any] = {}
    for role in op.roles:
        if role.name in constants:
            given[role.name] = constants[role.name]
        elif role.name in at.absent:
            given[role.name] = None
        elif role.kind == "number":
            given[role.name] = numbers[role.name]
        else:
            shape = role.shape(sizes) if known is None else known.get(role.name)
            if shape is None and at.absent:  # what belongs to an absent argument need not be there
                given[role.name] = None
                continue
            if shape is None:
                return f"nothing fills {role.name}"
            source = Source("role", role.name)
            if role.kind == "child":
                given[role.name] = _RoleChild(stage, source, shape)
            else:
                given[role.name] = stage.recorder.input(stage.fake(shape, dtype_of(role, at)), source)
    try:
        return trace(stage, form, (), {**given, **dict(fixed), **dict(variant.options)})
    except Untraceable as reason:
        return str(reason)


def forget_references() -> None:
    """Forget the graphs of references: an operation may have another reference now."""
    _reference_graph.cache_clear()


class _RoleChild:
    """A child of a reference: called, it is a leaf; its weight has a dtype and nothing else."""

    def __init__(self, stage: Stage, source: Source, shape: tuple[int, ...]) -> None:
        self._stage, self._source, self._shape = stage, source, shape
        self.weight = stage.fake((1, 1), stage.widths.parameters)

    def __call__(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        shape = self._shape if len(self._shape) == x.dim() else (*x.shape[:-1], self._shape[-1])
        output = self._stage.fake(shape, self._stage.widths.given_by(self._source.name, x))
        return self._stage.recorder.call(self._source, (x, *more), output)


_MOST_DECISIONS = 48


def prove(
    op: Operation,
    variant: Variant,
    fixed: dict[str, int],
    candidate: Candidate,
    roles: dict[str, Bound],
    rounds: tuple[Round, ...],
) -> str | None:
    """Return why a layer that matched in the first round is not this variant after all, or None.

    Besides these rounds, it is tried at sizes at which it decides something else than there, and at what it decides at those.
    """
    problem = _prove(op, variant, fixed, candidate, roles, rounds)
    done = [at for at in (FIRST, *rounds) if at in candidate.decisions]
    outcomes: dict[Tree, set[bool]] = {}
    for at in done:
        for tree, outcome in candidate.decisions[at].items():
            outcomes.setdefault(tree, set()).add(outcome)
    most = len(done) + _MOST_DECISIONS
    for at in done:  # which grows
        for tree, outcome in candidate.decisions[at].items():
            if problem is not None:
                return problem
            if {outcome} != outcomes[tree]:
                continue
            outcomes[tree].add(not outcome)  # it is looked for once
            sizes = sizes_otherwise(tree, candidate.decisions[at], candidate.sizes(at), with_size)
            if sizes is None:
                beyond = any(LARGEST < abs(number) < math.inf for number in parts_of(tree, "number"))
                if beyond or _is_computed(tree):
                    return f"is {op.name} {dict(variant.options)} in bfloat16, but decides by a size that is not tried"
                continue
            there = round_at(at, sizes)
            problem = _prove(op, variant, fixed, candidate, roles, (there,))
            if there in candidate.decisions and there not in done:
                done.append(there)
                for other, found in candidate.decisions[there].items():
                    outcomes.setdefault(other, set()).add(found)
            if len(done) > most:
                return f"is {op.name} {dict(variant.options)} in bfloat16, but decides more by sizes than is tried"
    if problem is None and candidate.decides_by_unnamed():
        return f"is {op.name} {dict(variant.options)} in bfloat16, but decides by a size that it has made itself"
    return problem


def _is_computed(tree: Tree) -> bool:
    """Whether a decision is about more than one size as it is, of those that can be anything."""
    if not set(parts_of(tree, "size")) - {FIXED, "D", "R"}:
        return False
    return any(part[0] not in ("size", "number", "unnamed") for part in tree[1:])


def _prove(
    op: Operation,
    variant: Variant,
    fixed: dict[str, int],
    candidate: Candidate,
    roles: dict[str, Bound],
    rounds: tuple[Round, ...],
) -> str | None:
    has_parameters = any(role.kind == "attribute" or role.follows == "parameters" for role in op.roles)
    has_leaves = any(role.kind == "child" for role in op.roles)
    # A forward that looks at a child's weight may do something else where its dtype is another one.
    has_parameters |= any(
        len(path) > 1 and isinstance(value, tuple) and value[:1] == ("tensor",)
        for path, value in candidate.reads.tokens.items()
    )
    for at in rounds:
        key = (op.name, variant, tuple(fixed.items()), at)
        if key in candidate.proven:
            continue
        candidate.proven.add(key)
        if not has_parameters and at.widths.activations != at.widths.parameters:
            continue
        if not has_leaves and at.widths.leaves is not None:
            continue
        try:
            graph = candidate.graph(at)
        except Untraceable as reason:
            if op.any_rank and at.width is None and not at.sizes:
                return f"is {op.name} in some shapes, but not on {len(at.lead)} leading dimensions: {reason}"
            if not isinstance(reason, Failed):
                return f"is {op.name} {dict(variant.options)} in bfloat16, but not always: {reason}"
            continue  # it cannot be called this way, so nothing is lost there
        if compare(op, variant, fixed, graph, at, roles) is None:
            return f"is {op.name} {dict(variant.options)} in bfloat16, but not {at}"
    return None


def prove_without(
    op: Operation,
    variant: Variant,
    fixed: dict[str, int],
    candidate: Candidate,
    roles: dict[str, Bound],
    optional: tuple[str, ...],
) -> str | None:
    """Return why a layer is not this variant where arguments that may be None are None, or None."""
    for role, bound in roles.items():
        if not isinstance(bound, Source) or bound.name not in optional or bound.kind != "argument":
            continue
        try:
            graph = candidate.graph(replace(FIRST, absent=frozenset({bound.name})))
        except Failed:
            continue  # it cannot be called this way, so nothing is lost there
        except Untraceable as reason:
            return f"is {op.name} {dict(variant.options)}, but not without {bound.name}: {reason}"
        rest = {name: filled for name, filled in roles.items() if name != role}
        if compare(op, variant, fixed, graph, replace(FIRST, absent=frozenset({role})), rest) is None:
            return f"is {op.name} {dict(variant.options)}, but not without {bound.name}"
    return None


def bindings(
    op: Operation, variant: Variant, fixed: dict[str, int], candidate: Candidate, roles: dict[str, Bound]
) -> tuple[tuple[str, Binding], ...] | None:
    """The roles in the order of the operation, numbers traced back to attributes; None where a kind does not fit."""
    constants = dict(variant.constants)
    bound: list[tuple[str, Binding]] = []
    for role in op.roles:
        if role.name in constants:
            bound.append((role.name, Binding("constant", constants[role.name])))
            continue
        filled = roles[role.name]
        if isinstance(filled, float):
            marker = markers(("any",))["any"]
            name = _attribute_of(op, variant, fixed, candidate, {**roles, role.name: marker}, filled, marker)
            bound.append((role.name, Binding("attribute", name) if name else Binding("constant", filled)))
        elif filled.kind != role.kind or ("." in filled.name and filled.kind == "attribute"):
            return None
        else:
            bound.append((role.name, Binding(role.kind, filled.name)))  # type: ignore[arg-type]
    for role_name, value in fixed.items():  # 1 divides every width, so a layer with groups can be traced with it
        name = _attribute_of(op, variant, {role_name: 1}, candidate, roles, value, 1) if value != 1 else None
        bound.append((role_name, Binding("attribute", name) if name else Binding("constant", value)))
    return tuple(bound)


def _attribute_of(
    op: Operation,
    variant: Variant,
    fixed: dict[str, int],
    candidate: Candidate,
    roles: dict[str, Bound],
    value: float,
    other: float,
) -> str | None:
    """Return the attribute that a number comes from: the one that, set to `other`, makes the number `other`."""
    for path, read in list(candidate.reads.tokens.items()):
        if len(path) != 1 or not isinstance(read, tuple) or read[0] not in (float, int) or not _close(read[1], value):
            continue
        try:
            graph = candidate.graph(FIRST, overrides={path[0]: other})
        except Untraceable:
            continue
        if compare(op, variant, fixed, graph, FIRST, roles) is not None:
            return path[0]
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)
