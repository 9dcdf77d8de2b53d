"""Find the operation that a traced layer or function is, and prove it at more sizes and dtypes.

A layer is first traced once, in bfloat16. The references whose operators occur in its graph are traced the same way
and compared without sizes; that fills the roles. Then layer and reference are traced again on the same shapes, in
several ranks, sizes and dtypes, and must be the same every time with the same filling: a branch on a shape or a dtype
shows there. Numbers are bound to an attribute only where changing the attribute changes the number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kernelwise._data import Binding, Recognition
from kernelwise._recognize._compare import Candidate, bindings, compare, fits, may_be, prove, prove_without
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import Bound
from kernelwise._recognize._reach import decides_by_dtype_in, decides_by_size_in
from kernelwise._recognize._reads import Reads
from kernelwise._recognize._record import Failed, Source, Untraceable
from kernelwise._recognize._rounds import (
    FIRST,
    ROUNDS,
    ROUNDS_OF_DTYPES,
    ROUNDS_OF_FUNCTIONS,
    ROUNDS_OF_RANKS,
    Round,
    arguments_of,
    dtype_of,
    rounds_of_children,
    rounds_of_heads,
    shape_of,
    sizes_of,
    sizes_of_function,
    sizes_of_module,
)
from kernelwise._recognize._stand_in import Stage, make_stand_in
from kernelwise._recognize._trace import innermost_forward, parameters_of, trace
from kernelwise.ops import OPERATIONS, Operation, Role, Variant

OTHER_WIDTH = 255
"""A second width for modules that do not care: one without parameters may do something else at the first."""
OTHER_HEAD = 128


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer about one layer, and what it was read from."""

    recognition: Recognition | None
    reason: str | None
    graph: str | None
    reads: Reads


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
        if (
            op.function
            or op.loss
            or op.norms
            or len(arguments_of(op)) != len(needed) + len(optional)
            or not may_be(op, graph)
        ):
            continue
        for variant, fixed in itertools.product(op.variants, _integers(op, reads)):
            found = compare(op, variant, fixed, graph, FIRST, None)
            if found is None:
                continue
            problem = prove(op, variant, fixed, candidate, found.roles, ROUNDS)
            problem = problem or prove_without(op, variant, fixed, candidate, found.roles, optional)
            if problem is None:
                elsewhere = (
                    replace(FIRST, width=OTHER_WIDTH),
                    *rounds_of_code(reads, (forward,), type(module), found.roles),
                )
                problem = prove(op, variant, fixed, candidate, found.roles, elsewhere)
            if problem is None and mixes_dtypes(reads, (forward,), type(module)):
                problem = f"looks like {op.name}, but decides by the dtypes of several of its children"
            if problem is None and not fits(op, variant, fixed, graph, found.roles):
                problem = f"looks like {op.name}, but the sizes of its tensors only fit by broadcasting"
            if problem is None:
                roles = bindings(op, variant, fixed, candidate, found.roles)
                if roles is not None:
                    return Finding(Recognition(op.name, roles, variant.options), None, None, reads)
                problem = f"looks like {op.name}, but a role is filled by something a kernel cannot be given"
            near = near or problem
    return Finding(None, near or "no known operation has this graph", str(graph), reads)


def rounds_of_code(
    reads: Reads, functions: tuple[Any, ...], cls: type | None = None, roles: Mapping[str, Bound] | None = None
) -> tuple[Round, ...]:
    """Further rounds for code that decides something by dtypes and, in a module, by numbers of dimensions.

    `roles` says which children the module has.
    """
    has_ranks = cls is not None and decides_by_size_in(reads, functions, cls)
    has_dtypes = decides_by_dtype_in(reads, functions, cls)
    children = [b.name for b in (roles or {}).values() if isinstance(b, Source) and b.kind == "child"]
    return (
        *(ROUNDS_OF_RANKS if has_ranks else ()),
        *(ROUNDS_OF_DTYPES if has_dtypes else ()),
        *(rounds_of_children(children) if has_dtypes and len(children) > 1 else ()),
    )


def mixes_dtypes(reads: Reads, functions: tuple[Any, ...], cls: type) -> bool:
    """Whether code decides something by dtypes and has read tensors of several children, which a trace gives one dtype."""
    holders = {
        path[:-1] for path, value in reads.tokens.items() if isinstance(value, tuple) and value[:1] == ("tensor",)
    }
    return len(holders) > 1 and decides_by_dtype_in(reads, functions, cls)


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
        takes = ", ".join([*needed, *(f"{name}=None" for name in optional)]) or "nothing"
        raise Untraceable(
            f"its forward takes {takes}; known operations take one tensor, or two, the second of which may be None"
        )
    return needed, optional


def _first_trace(
    module: nn.Module, forward: Callable[..., Any], arguments: tuple[str, ...], reads: Reads, training: bool | None
) -> tuple[Candidate, Graph]:
    """Trace with the first width that the module takes, and return how to trace it again."""
    reason: Untraceable | None = None
    for width in widths_of(module):

        def run(stage: Stage, at: Round, width: int = width) -> Graph:
            stand_in = make_stand_in(module, stage)
            shape, dtype = (*at.lead, at.width or width), at.widths.activations
            given = {
                name: None
                if name in at.absent
                else stage.recorder.input(stage.fake(shape, dtype), Source("argument", name))
                for name in arguments
            }
            return trace(stage, functools.partial(forward, stand_in), (), given)

        sizes = functools.partial(sizes_of_module, width, next(module.parameters(), None) is not None)
        candidate = Candidate(run, reads, sizes, training)
        try:
            return candidate, candidate.graph(FIRST)
        except Untraceable as error:
            reason = reason or error
    assert reason is not None
    raise reason


def widths_of(module: nn.Module) -> list[int]:
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


def find_function(function: types.FunctionType) -> Finding:
    """Return what a plain function of tensors computes."""
    reads = Reads()
    traced = _traced(function)
    if isinstance(traced, str):
        return Finding(None, traced, None, reads)
    near: str | None = None
    for op in traced.operations():
        choice = next(iter(op.choices), None)
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
            roles = [(role.name, Binding("argument", _name(first[role.name]))) for role in arguments_of(op)]
            if choice is not None and traced.choice is not None:
                roles.append((choice, Binding("argument", traced.choice)))
            elif choice is not None:
                roles.append((choice, Binding("constant", next(iter(fitting)))))
            return Finding(Recognition(op.name, tuple(roles), variant.options), None, None, reads)
    return Finding(None, near or "no known operation has this graph", traced.shown, reads)


def function_graphs(function: types.FunctionType) -> Iterator[tuple[Operation, Variant, dict[str, int], Graph]]:
    """Every variant that a function could be by its arguments, with the function's graph at the sizes of that variant."""
    traced = _traced(function)
    if isinstance(traced, str):
        return
    for op in traced.operations():
        choice = next(iter(op.choices), None)
        for variant, value in itertools.product(op.variants, op.choices.get(choice or "", (None,))):
            fixed = {} if choice is None or value is None else {choice: value}
            with contextlib.suppress(Untraceable):
                yield op, variant, fixed, traced.candidate(arguments_of(op), variant, fixed).graph(FIRST)


def _traced(function: types.FunctionType) -> _TracedFunction | str:
    """A function that can be traced; else why its arguments are not those of an operation."""
    parameters = list(parameters_of(function).values())
    others = [p for p in parameters if p.default is not p.empty]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return "it takes any number of arguments"
    if len(others) > 1 or (others and type(others[0].default) is not int):
        return f"it also takes {', '.join(p.name for p in others)}"
    needed = [p.name for p in parameters if p.default is p.empty]
    return _TracedFunction(function, needed, others[0].name if others else None)


def _name(bound: Bound) -> str:
    assert isinstance(bound, Source)
    return bound.name


class _TracedFunction:
    """A function and the graphs it has given so far, by the shapes it was given."""

    def __init__(self, function: types.FunctionType, needed: list[str], choice: str | None) -> None:
        self._function, self._needed, self.choice = function, needed, choice
        self._first: dict[Any, Graph | str] = {}

    @property
    def shown(self) -> str | None:
        """The first graph there is."""
        return next((str(graph) for graph in self._first.values() if isinstance(graph, Graph)), None)

    def operations(self) -> Iterator[Operation]:
        """The operations that take as many tensors, and an integer if the function does."""
        for op in OPERATIONS.values():
            if op.function and len(self._needed) == len(arguments_of(op)) and (self.choice is None or op.choices):
                yield op

    def candidate(self, arguments: list[Role], variant: Variant, fixed: dict[str, int]) -> Candidate:
        def run(stage: Stage, at: Round) -> Graph:
            given = []
            for role, name in zip(arguments, self._needed, strict=True):
                tensor = stage.fake(shape_of(role, at, variant, fixed), dtype_of(role, at))
                given.append(stage.recorder.input(tensor, Source("argument", name)))
            extra = {} if self.choice is None else {self.choice: next(iter(fixed.values()))}
            return trace(stage, self._function, tuple(given), extra)

        return Candidate(run, Reads(), sizes_of_function)

    def compare(self, op: Operation, variant: Variant, choice: str | None, value: int | None) -> dict[str, Bound] | str:
        """The filling of the roles if the function is this variant; else why not, or nothing worth telling."""
        fixed = {} if choice is None or value is None else {choice: value}
        arguments = arguments_of(op)
        candidate = self.candidate(arguments, variant, fixed)
        sizes = sizes_of(FIRST, variant, fixed)
        key = (value, tuple((role.shape(sizes), role.follows) for role in arguments))
        if key not in self._first:
            try:
                self._first[key] = candidate.graph(FIRST)
            except Untraceable as reason:
                self._first[key] = str(reason)
        graph = self._first[key]
        if isinstance(graph, str) or not may_be(op, graph):
            return ""
        found = compare(op, variant, fixed, graph, FIRST, None)
        if found is None:
            return ""
        problem = prove(op, variant, fixed, candidate, found.roles, ROUNDS)
        elsewhere = (*rounds_of_heads((OTHER_HEAD,)), *rounds_of_code(Reads(), (self._function,)))
        problem = problem or prove(op, variant, fixed, candidate, found.roles, (*elsewhere, *ROUNDS_OF_FUNCTIONS))
        if problem is None and self._takes_more(arguments, variant, fixed, candidate.numbers()):
            problem = f"is {op.name} {dict(variant.options)}, but also takes more elements or tokens than it turns"
        return dict(found.roles) if problem is None else problem

    def _takes_more(
        self, arguments: list[Role], variant: Variant, fixed: dict[str, int], numbers: frozenset[int]
    ) -> bool:
        """Whether the function runs where only a part of what it is given can be turned, which the variant has no word for."""
        for option, whole, part in (("part", "all", "first"), ("tokens", "all", "last")):
            if (option, whole) in variant.options:
                partial = self.candidate(arguments, replace(variant, options=(*variant.options, (option, part))), fixed)
                if not all(self._fails(partial, at) for at in (FIRST, *rounds_of_heads(2 * n for n in numbers))):
                    return True
        return False

    @staticmethod
    def _fails(candidate: Candidate, at: Round) -> bool:
        try:
            candidate.graph(at)
        except Failed:
            return True
        except Untraceable:
            return False
        return False
