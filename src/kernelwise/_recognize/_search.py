"""Find the operation that a traced layer or function is, and prove it at more sizes and dtypes.

A layer is first traced once, in bfloat16. The references whose operators occur in its graph are traced the same way
and compared without sizes; that fills the roles. Then layer and reference are traced again on the same shapes, in
several ranks, sizes and dtypes, and must be the same every time with the same filling: a branch on a shape or a dtype
shows there. Numbers are bound to an attribute only where changing the attribute changes the number.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelwise._data import Binding, Recognition
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import Bound, Match, markers, match
from kernelwise._recognize._reads import Reads
from kernelwise._recognize._record import Recorder, Source, Untraceable, Widths
from kernelwise._recognize._stand_in import Stage, make_stand_in
from kernelwise._recognize._trace import innermost_forward, parameters_of, trace
from kernelwise.ops import OPERATIONS, Operation, Role, Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, slots=True)
class Round:
    """One way to trace: the leading dimensions of the inputs, the dtypes, and the arguments that are None."""

    lead: tuple[int, ...]
    widths: Widths
    absent: frozenset[str] = frozenset()

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.lead[0]

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.lead[-1]


# Primes that no width of a model is: a leading dimension is never mistaken for another one.
FIRST = Round((11, 13), Widths(BF16, BF16))
ROUNDS = (
    Round((1031, 8209), Widths(BF16, BF16)),
    Round((1, 1), Widths(F16, F16)),
    Round((17,), Widths(F32, F32)),
    Round((7, 19, 23), Widths(F32, F32)),
    Round((11, 13), Widths(BF16, F32)),
    Round((11, 13), Widths(F32, BF16)),
    Round((11, 13), Widths(F16, F16)),
    Round((11, 13), Widths(BF16, BF16, F32)),
)
_DEFAULT_SIZES = {"B": 11, "S": 13, "H": 34, "I": 58, "D": 46, "R": 28, "Hq": 3, "Hk": 5}


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer about one layer, and what it was read from."""

    recognition: Recognition | None
    reason: str | None
    graph: str | None
    reads: Reads


@dataclass(slots=True)
class Candidate:
    """A layer or a function that can be traced again and again.

    `run(stage, round)` returns its graph. `reads` collects what all traces have read.
    """

    run: Callable[[Stage, Round], Graph]
    reads: Reads
    training: bool | None = None

    def graph(self, at: Round, overrides: dict[str, Any] | None = None) -> Graph:
        """Trace once. Raises `Untraceable`."""
        stage = Stage(Recorder(), FakeTensorMode(), at.widths, training=self.training, overrides=overrides or {})
        try:
            return self.run(stage, at)
        finally:
            for path, value in stage.reads.tokens.items():
                if not overrides or path[0] not in overrides:
                    self.reads.tokens.setdefault(path, value)


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


def find_module(module: nn.Module, *, training: bool | None) -> Finding:
    """Return what `module` computes."""
    reads = Reads()
    try:
        forward = innermost_forward(module)
        needed, optional = _tensor_arguments(forward)
        candidate, graph = _first_trace(module, forward, (*needed, *optional), reads, training)
    except Untraceable as reason:
        return Finding(None, str(reason), None, reads)
    near = None
    for op in OPERATIONS.values():
        if op.function or len(_arguments(op)) != len(needed) + len(optional) or not _may_be(op, graph):
            continue
        for variant, fixed in itertools.product(op.variants, _integers(op, reads)):
            found = _compare(op, variant, fixed, graph, FIRST, None)
            if found is None:
                continue
            problem = _prove(op, variant, fixed, candidate, found.roles, ROUNDS)
            problem = problem or _prove_without(op, variant, fixed, candidate, found.roles, optional)
            if problem is None:
                roles = _bindings(op, variant, fixed, candidate, found.roles)
                if roles is not None:
                    return Finding(Recognition(op.name, roles, variant.options), None, None, reads)
                problem = f"looks like {op.name}, but a role is filled by something a kernel cannot be given"
            near = near or problem
    return Finding(None, near or "no known operation has this graph", str(graph), reads)


def _integers(op: Operation, reads: Reads) -> list[dict[str, int]]:
    """The values that the integer role of an operation may have: those of the attributes that the forward reads."""
    if not op.choices:
        return [{}]
    (role,) = op.choices
    values = [value[1] for path, value in reads.tokens.items() if _is_integer(path, value)]
    return [{role: value} for value in dict.fromkeys(values)]


def _is_integer(path: tuple[str, ...], value: Any) -> bool:
    return len(path) == 1 and isinstance(value, tuple) and value[0] is int and value[1] > 0


def first_graph(module: nn.Module, *, training: bool | None) -> tuple[Graph, int]:
    """Return the graph of a module's first trace, and how many tensors it was given. Raises `Untraceable`."""
    forward = innermost_forward(module)
    needed, optional = _tensor_arguments(forward)
    graph = _first_trace(module, forward, (*needed, *optional), Reads(), training)[1]
    return graph, len(needed) + len(optional)


def reference_graphs(num_arguments: int) -> Iterator[tuple[Operation, Variant, Graph]]:
    """Every variant of every operation of modules that takes so many tensors, with its graph at sizes of its own."""
    for op in OPERATIONS.values():
        if not op.function and len(_arguments(op)) == num_arguments:
            for variant in op.variants:
                graph = _reference_graph(op.name, op.reference, variant, (), FIRST, None)
                if isinstance(graph, Graph):
                    yield op, variant, graph


def _arguments(op: Operation) -> list[Role]:
    return [role for role in op.roles if role.kind == "argument"]


def _tensor_arguments(forward: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The arguments that a forward needs besides `self`, and those that it reads if they are not None."""
    named = list(parameters_of(forward).values())[1:]
    starred = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = tuple(p.name for p in named if p.default is p.empty and p.kind not in starred)
    optional = tuple(p.name for p in named if p.default is None)
    others = [p.name for p in named if p.name not in (*needed, *optional)]
    if others:
        raise Untraceable(f"its forward also takes {', '.join(others)}")
    if not 1 <= len(needed) <= len(needed) + len(optional) <= 2:
        raise Untraceable(f"its forward takes {len(needed)} arguments, and {len(optional)} that may be None")
    return needed, optional


def _first_trace(
    module: nn.Module, forward: Callable[..., Any], arguments: tuple[str, ...], reads: Reads, training: bool | None
) -> tuple[Candidate, Graph]:
    """Trace with the first width that the module takes, and return how to trace it again."""
    reason: Untraceable | None = None
    for width in _widths_of(module):

        def run(stage: Stage, at: Round, width: int = width) -> Graph:
            stand_in = make_stand_in(module, stage)
            shape, dtype = (*at.lead, width), at.widths.activations
            given = {
                name: None
                if name in at.absent
                else stage.recorder.input(stage.fake(shape, dtype), Source("argument", name))
                for name in arguments
            }
            return trace(stage, functools.partial(forward, stand_in), (), given)

        candidate = Candidate(run, reads, training)
        try:
            return candidate, candidate.graph(FIRST)
        except Untraceable as error:
            reason = reason or error
    assert reason is not None
    raise reason


def _widths_of(module: nn.Module) -> list[int]:
    """Widths that the last dimension of the input may have, the likeliest first."""
    widths: list[int] = []
    for child in module.children():
        wide_in = getattr(child, "in_features", None)
        if isinstance(wide_in, int):
            widths.append(wide_in)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    tensors += [tensor for child in module.children() for tensor in child.parameters()]
    widths += [size for tensor in tensors if tensor is not None for size in reversed(tensor.shape)]
    for value in module.__dict__.values():
        widths += [size for size in (value if isinstance(value, (tuple, list)) else (value,)) if type(size) is int]
    return [width for width in dict.fromkeys(widths) if width > 1][:6] or [62]


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def find_function(function: Callable[..., Any]) -> Finding:
    """Return what a plain function of tensors computes."""
    reads = Reads()
    parameters = list(parameters_of(function).values())
    needed = [p.name for p in parameters if p.default is p.empty]
    others = [p for p in parameters if p.default is not p.empty]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return Finding(None, "it takes any number of arguments", None, reads)
    if len(others) > 1 or (others and type(others[0].default) is not int):
        return Finding(None, f"it also takes {', '.join(p.name for p in others)}", None, reads)
    traced = _TracedFunction(function, needed, others[0].name if others else None)
    near: str | None = None
    for op in OPERATIONS.values():
        choice = next(iter(op.choices), None)
        if not op.function or len(needed) != len(_arguments(op)) or (traced.choice is not None and choice is None):
            continue
        for variant in op.variants:
            answers = {
                value: traced.compare(op, variant, choice, value) for value in op.choices.get(choice or "", (None,))
            }
            fitting = {value: answer for value, answer in answers.items() if not isinstance(answer, str)}
            near = near or next((a for a in answers.values() if isinstance(a, str) and a), None)
            if not fitting or (traced.choice is not None and len(fitting) != len(answers)):
                continue  # an argument must mean for every value what it means in the reference
            first = next(iter(fitting.values()))
            if any(answer != first for answer in fitting.values()):
                continue
            roles = [(role.name, Binding("argument", _name(first[role.name]))) for role in _arguments(op)]
            if choice is not None and traced.choice is not None:
                roles.append((choice, Binding("argument", traced.choice)))
            elif choice is not None:
                roles.append((choice, Binding("constant", next(iter(fitting)))))
            return Finding(Recognition(op.name, tuple(roles), variant.options), None, None, reads)
    return Finding(None, near or "no known operation has this graph", traced.shown, reads)


def _name(bound: Bound) -> str:
    assert isinstance(bound, Source)
    return bound.name


class _TracedFunction:
    """A function and the graphs it has given so far, by the shapes it was given."""

    def __init__(self, function: Callable[..., Any], needed: list[str], choice: str | None) -> None:
        self._function, self._needed, self.choice = function, needed, choice
        self._first: dict[Any, Graph | str] = {}

    @property
    def shown(self) -> str | None:
        """The first graph there is."""
        return next((str(graph) for graph in self._first.values() if isinstance(graph, Graph)), None)

    def _candidate(self, arguments: list[Role], variant: Variant, fixed: dict[str, int]) -> Candidate:
        def run(stage: Stage, at: Round) -> Graph:
            sizes = _sizes(at, variant, fixed)
            given = []
            for role, name in zip(arguments, self._needed, strict=True):
                tensor = stage.fake(role.shape(sizes), _dtype(role, at))
                given.append(stage.recorder.input(tensor, Source("argument", name)))
            extra = {} if self.choice is None else {self.choice: next(iter(fixed.values()))}
            return trace(stage, self._function, tuple(given), extra)

        return Candidate(run, Reads())

    def compare(self, op: Operation, variant: Variant, choice: str | None, value: int | None) -> dict[str, Bound] | str:
        """The filling of the roles if the function is this variant; else why not, or nothing worth telling."""
        fixed = {} if choice is None or value is None else {choice: value}
        arguments = _arguments(op)
        candidate = self._candidate(arguments, variant, fixed)
        sizes = _sizes(FIRST, variant, fixed)
        key = (value, tuple((role.shape(sizes), role.follows) for role in arguments))
        if key not in self._first:
            try:
                self._first[key] = candidate.graph(FIRST)
            except Untraceable as reason:
                self._first[key] = str(reason)
        graph = self._first[key]
        if isinstance(graph, str) or not _may_be(op, graph):
            return ""
        found = _compare(op, variant, fixed, graph, FIRST, None)
        if found is None:
            return ""
        problem = _prove(op, variant, fixed, candidate, found.roles, ROUNDS)
        if problem is None and ("part", "all") in variant.options and self._takes_a_part(arguments, variant, fixed):
            problem = f"is {op.name} {dict(variant.options)}, but also turns a part of the elements"
        return dict(found.roles) if problem is None else problem

    def _takes_a_part(self, arguments: list[Role], variant: Variant, fixed: dict[str, int]) -> bool:
        partial = replace(variant, options=(*variant.options, ("part", "first")))
        try:
            self._candidate(arguments, partial, fixed).graph(FIRST)
        except Untraceable:
            return False
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Comparing with a reference
# ---------------------------------------------------------------------------------------------------------------------


def _may_be(op: Operation, graph: Graph) -> bool:
    there = graph.operators()
    return all(any(name in there for name in names) for names in op.operators)


def _compare(
    op: Operation, variant: Variant, fixed: dict[str, int], graph: Graph, at: Round, roles: dict[str, Bound] | None
) -> Match | None:
    """Match a graph with any form of the variant; with `roles` known, on the same shapes and to the last size."""
    if roles is None:
        loose = (_match_form(op, form, variant, fixed, graph, at, None) for form in _forms(op))
        for found in loose:
            if found is not None:
                exact = _compare(op, variant, fixed, graph, at, found.roles)
                if exact is not None:
                    return exact
        return None
    shapes = _shapes_of(graph, roles)
    for form in _forms(op):
        found = _match_form(op, form, variant, fixed, graph, at, shapes)
        if found is not None and found.roles == roles:
            return found
    return None


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
    sizes = _sizes(at, variant, dict(fixed))
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
            if shape is None:
                return f"nothing fills {role.name}"
            source = Source("role", role.name)
            if role.kind == "child":
                given[role.name] = _RoleChild(stage, source, shape)
            else:
                given[role.name] = stage.recorder.input(stage.fake(shape, _dtype(role, at)), source)
    try:
        return trace(stage, form, (), {**given, **dict(fixed), **dict(variant.options)})
    except Untraceable as reason:
        return str(reason)


def forget_references() -> None:
    """Forget the graphs of references: an operation may have another reference now."""
    _reference_graph.cache_clear()


def _sizes(at: Round, variant: Variant, fixed: dict[str, int]) -> dict[str, Any]:
    return {**_DEFAULT_SIZES, "lead": at.lead, "B": at.batch, "S": at.length, **dict(variant.options), **fixed}


def _dtype(role: Role, at: Round) -> torch.dtype:
    if role.follows == "complex":
        return torch.complex64
    wide = role.kind == "attribute" or role.follows == "parameters"
    return at.widths.parameters if wide else at.widths.activations


class _RoleChild:
    """A child of a reference: called, it is a leaf; its weight has a dtype and nothing else."""

    def __init__(self, stage: Stage, source: Source, shape: tuple[int, ...]) -> None:
        self._stage, self._source, self._shape = stage, source, shape
        self.weight = stage.fake((1, 1), stage.widths.parameters)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._stage.recorder.call(
            self._source, (x,), self._stage.fake(self._shape, self._stage.widths.leaves or x.dtype)
        )


def _prove(
    op: Operation,
    variant: Variant,
    fixed: dict[str, int],
    candidate: Candidate,
    roles: dict[str, Bound],
    rounds: tuple[Round, ...],
) -> str | None:
    """Return why a layer that matched in the first round is not this variant after all, or None."""
    has_parameters = any(role.kind == "attribute" or role.follows == "parameters" for role in op.roles)
    has_leaves = any(role.kind == "child" for role in op.roles)
    # A forward that looks at a child's weight may do something else where its dtype is another one.
    has_parameters |= any(
        len(path) > 1 and isinstance(value, tuple) and value[:1] == ("tensor",)
        for path, value in candidate.reads.tokens.items()
    )
    for at in rounds:
        if not has_parameters and at.widths.activations != at.widths.parameters:
            continue
        if not has_leaves and at.widths.leaves is not None:
            continue
        try:
            graph = candidate.graph(at)
        except Untraceable as reason:
            if op.any_rank:
                return f"is {op.name} in some shapes, but not on {len(at.lead)} leading dimensions: {reason}"
            continue  # it cannot be called this way, so nothing is lost there
        if _compare(op, variant, fixed, graph, at, roles) is None:
            a, p = (str(d).removeprefix("torch.") for d in (at.widths.activations, at.widths.parameters))
            where = f"on inputs of {len(at.lead) + 1} dimensions {at.lead} in {a}, parameters in {p}"
            where += ", children that give another dtype" if at.widths.leaves else ""
            return f"is {op.name} {dict(variant.options)} in bfloat16, but not {where}"
    return None


def _prove_without(
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
        except Untraceable:
            continue
        rest = {name: filled for name, filled in roles.items() if name != role}
        if _compare(op, variant, fixed, graph, replace(FIRST, absent=frozenset({role})), rest) is None:
            return f"is {op.name} {dict(variant.options)}, but not without {bound.name}"
    return None


def _bindings(
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
        if _compare(op, variant, fixed, graph, FIRST, roles) is not None:
            return path[0]
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)
