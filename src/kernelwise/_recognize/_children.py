"""Layers of a model, recognised by recording how arguments pass to their children.

The forward of a decoder layer takes masks, caches and positions that it only hands on. Here it is traced with the hidden
states as a tensor and with everything else as something that can be handed on and nothing more. Every child that is
called is a leaf, whatever it is called with and gives besides: what counts is the tensor that goes in and the first
result. The graph that comes out is compared with references like any other; then it is traced again with each of the
arguments that may be None left out.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kernelwise._data import Binding, Recognition
from kernelwise._recognize._compare import (
    FIRST,
    ROUNDS,
    Candidate,
    Round,
    bindings,
    compare,
    may_be,
    prove,
)
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import Bound
from kernelwise._recognize._reads import Reads, is_function
from kernelwise._recognize._record import Refused, Source, Untraceable
from kernelwise._recognize._search import Finding, find_module, widths_of
from kernelwise._recognize._stand_in import Child, Stage, make_stand_in, run
from kernelwise._recognize._trace import innermost_forward
from kernelwise.ops import OPERATIONS, Operation, Variant

_NORMS = frozenset({"rms_norm", "layer_norm"})
_CONSTANTS = (bool, int, float, str, type(None))
_LENGTHS = (2, 0, 3)  # what a child gives: one tensor, or a tuple of so many with a tensor first
_MORE = "_kernelwise_more"
_CONTEXT = 29  # positions of a context
_MOST_CHILDREN = 24
_MOST_UNKNOWN = 3  # children of a layer that may give a tensor or a tuple
_MOST_ASKED = 4


class Given:
    """An argument, or a further result of a child, that a layer may hand on and must not look into.

    An attribute of it may be handed on too. One that is a switch (its default is True or False) may be asked which it
    is: `value`.
    """

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: bool | None = None) -> None:
        self.name, self.value = name, value

    def _refuse(self, what: str) -> Any:
        raise Untraceable(f"it looks into {self.name} ({what})")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._refuse("its class")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return Given(f"{self.name}.{name}") if not name.startswith("_") else self._refuse(name)

    def __bool__(self) -> bool:
        return bool(self._refuse("as a condition")) if self.value is None else self.value

    def __iter__(self) -> Iterator[Any]:
        return self._refuse("takes it apart")  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> Any:
        return self._refuse("takes a part")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse("calls it")

    def __eq__(self, other: object) -> bool:
        return bool(self._refuse("compares it"))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return str(self._refuse("as text"))


@dataclass(frozen=True, slots=True)
class ChildCall:
    """How a layer calls one child, and what it takes of the result.

    `args` and `kwargs` hold `Given` arguments, `HIDDEN` for the tensor, constants. `lengths` has what the child may give
    (0: a tensor; otherwise a tuple of so many, of which the layer takes the first). `is_open` where that was tried out.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    lengths: tuple[int, ...]
    is_open: bool = False

    def passed(self) -> Iterator[Any]:
        """Everything that is handed to the child."""
        yield from self.args
        yield from (item for _, item in self.kwargs)

    def is_like(self, other: ChildCall, absent: frozenset[str]) -> bool:
        """Whether another call passes the same, but for arguments that are None there."""
        if self.path != other.path or [key for key, _ in self.kwargs] != [key for key, _ in other.kwargs]:
            return False
        return all(
            (theirs is None or (type(theirs) is Given and theirs.value is not None))
            if type(mine) is Given and mine.name in absent
            else type(theirs) is Given and theirs.name == mine.name
            if type(mine) is Given
            else mine is theirs or (type(theirs) is type(mine) and bool(mine == theirs))
            for mine, theirs in itertools.zip_longest(self.passed(), other.passed())
        )


class _Hidden:
    def __repr__(self) -> str:
        return "the hidden states"


HIDDEN = _Hidden()


# ---------------------------------------------------------------------------------------------------------------------
# Traces
# ---------------------------------------------------------------------------------------------------------------------


class _Trace:
    """One way to trace a layer: which child gives a tuple, which argument is a tensor besides the hidden states."""

    def __init__(self, layer: _Layer, lengths: tuple[int, ...], tensor: str | None, refused: str | None) -> None:
        self.layer, self.tensor, self.refused, self.lengths = layer, tensor, refused, lengths
        self.candidate = Candidate(self._run, layer.reads, layer.training)
        self.calls: list[ChildCall] = []  # of the last trace
        self.num_unknown = 0
        self.looked_into = False  # whether there are children whose own code is a part of the graph

    def _run(self, stage: Stage, at: Round) -> Graph:
        layer = self.layer
        self.calls, self.num_unknown = [], 0
        stage.call_child = self._call
        stand_in = make_stand_in(layer.module, stage)
        absent = {*at.absent, self.refused}
        given: dict[str, Any] = {name: None if name in absent else Given(name) for name in layer.others}
        given |= {name: Given(name, value != (name in absent)) for name, value in layer.switches}
        width, dtype = layer.width, at.widths.activations
        if self.tensor is not None and self.tensor not in at.absent:
            context = stage.fake((*at.lead[:-1], _CONTEXT, width), dtype)
            given[self.tensor] = stage.recorder.input(context, Source("argument", self.tensor))
        if layer.takes_more:
            given[_MORE] = Given("**kwargs")
        x = stage.recorder.input(stage.fake((*at.lead, width), dtype), Source("argument", layer.x))
        result = run(stage, functools.partial(layer.forward, stand_in), (x,), given)
        is_tuple = type(result) is tuple and len(result) > 0
        if is_tuple and not all(type(item) in (Given, type(None)) for item in result[1:]):
            raise Untraceable("it returns more than one tensor of its own")
        graph = stage.recorder.finish(result[0] if is_tuple else result)
        graph.structure = "tuple" if is_tuple else "tensor"
        used = {node.args[0] for node in graph.reachable() if node.op == "call"}
        unused = [call.path for call in self.calls if Source("child", call.path) not in used]
        if unused:
            raise Untraceable(f"it calls its child {unused[0]} for something else than its result")
        return graph

    def _call(
        self, child: Child, module: nn.Module, path: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = ".".join(path)
        if name not in self.layer.norms and is_function(module):
            self.looked_into = True
            return NotImplemented  # an activation, a dropout
        stage: Stage = child.__dict__["_kernelwise"][1]
        tensors = [item for item in (*args, *kwargs.values()) if type(item) is not Given and isinstance(item, Tensor)]
        tensors = list({id(item): item for item in tensors}.values())  # query, key and value may be one tensor
        if not tensors or any(call.path == name for call in self.calls):
            raise Untraceable(f"it calls its child {name} without a tensor, or more than once")
        for item in (*args, *kwargs.values()):
            if type(item) is not Given and not isinstance(item, (Tensor, *_CONSTANTS)):
                raise Untraceable(f"it calls its child {name} with a {type(item).__name__}")
        is_linear = isinstance(getattr(module, "out_features", None), int)
        shape = child.result(tensors[0]).shape if is_linear else tensors[0].shape
        output = stage.recorder.call(
            Source("child", name), tuple(tensors), stage.fake(tuple(shape), stage.widths.leaves or tensors[0].dtype)
        )
        length = 0
        is_open = not is_linear and name not in self.layer.norms
        if is_open:
            length = self.lengths[min(self.num_unknown, len(self.lengths) - 1)]
            self.num_unknown += 1
        self.calls.append(
            ChildCall(
                name,
                tuple(_argument(item) for item in args),
                tuple((key, _argument(item)) for key, item in kwargs.items()),
                (length,),
                is_open,
            )
        )
        return (output, *(Given(f"{name}[{i}]") for i in range(1, length))) if length else output

    def refuses(self) -> bool:
        """Whether the layer itself raises an exception where it is given the argument that is left out."""
        try:
            _Trace(self.layer, self.lengths, None, None).candidate.graph(FIRST)
        except Refused:
            return True
        except Untraceable:
            return False
        return False

    def passes_plainly(self) -> bool:
        """Whether the layer is nothing but sums and calls in which each argument stands as it is, whichever are None."""
        if self.looked_into:
            return False
        self.candidate.graph(FIRST)
        calls = self.calls
        plain = {*self.layer.others, *(name for name, _ in self.layer.switches), "**kwargs"}
        if any(type(item) is Given and item.name not in plain for call in calls for item in call.passed()):
            return False
        for absent in self.absences():
            try:
                self.candidate.graph(replace(FIRST, absent=absent))
            except Untraceable:
                continue
            if len(self.calls) != len(calls) or not all(
                one.is_like(other, absent) for one, other in zip(calls, self.calls, strict=True)
            ):
                return False
        return True

    def absences(self) -> Iterator[frozenset[str]]:
        """Sets of arguments that may be None, or switches turned over, at once.

        Each alone, all of them, and every mix of those that the code compares with None.
        """
        names = [*self.layer.others, *(name for name, _ in self.layer.switches)]
        names += [self.tensor] if self.tensor else []
        asked = [name for name in names if name in self.layer.asked][:_MOST_ASKED]
        mixes = itertools.chain.from_iterable(itertools.combinations(asked, n) for n in range(2, len(asked) + 1))
        yield from dict.fromkeys(map(frozenset, (*((name,) for name in names), tuple(names), *mixes)))


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is traced: a module, its forward, and what its arguments are."""

    module: nn.Module
    forward: Callable[..., Any]
    norms: dict[str, str | None]
    reads: Reads
    training: bool | None
    width: int
    x: str
    others: tuple[str, ...]  # arguments that are only handed on
    switches: tuple[tuple[str, bool], ...]  # those that are True or False, with the default
    asked: frozenset[str]  # of the others, the ones that the code compares with None
    takes_more: bool


def _layer_of(module: nn.Module, norms: dict[str, str | None], reads: Reads, training: bool | None) -> _Layer:
    """Raises `Untraceable`."""
    forward = innermost_forward(module)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if code is None or not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Untraceable("its forward has no argument of its own first")
    more = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise Untraceable("its forward takes any number of arguments")
    if more is not None and not _only_passes_on(code, more):
        raise Untraceable(f"it looks into its **{more}")
    first, *rest = (p for p in parameters if p.name != more)
    return _Layer(
        module,
        forward,
        norms,
        reads,
        training,
        widths_of(module)[0],
        first.name,
        tuple(p.name for p in rest if not isinstance(p.default, bool)),
        tuple((p.name, p.default) for p in rest if isinstance(p.default, bool)),
        _compared_with_none(code),
        more is not None,
    )


def _traces(
    module: nn.Module, norms: dict[str, str | None], reads: Reads, training: bool | None
) -> Iterator[tuple[_Trace, Graph | str]]:
    """Every way to trace a layer that leads somewhere, with its graph or why there is none. Raises `Untraceable`."""
    layer = _layer_of(module, norms, reads, training)
    refused = False
    for tensor, absent in _ways(layer):
        if absent is not None and not refused:
            continue
        others = tuple(name for name in layer.others if name != tensor)
        tried: set[tuple[int, ...]] = set()
        for lengths in itertools.product(_LENGTHS, repeat=_MOST_UNKNOWN):
            if any(lengths[: len(prefix)] == prefix for prefix in tried):
                continue
            trace = _Trace(replace(layer, others=others), lengths, tensor, absent)
            graph: Graph | str
            try:
                graph = trace.candidate.graph(FIRST)
            except Untraceable as reason:
                graph = str(reason)
                if tensor is None and absent is None:
                    refused |= isinstance(reason, Refused)
                    if not trace.calls:
                        tried.add(())
            tried.add(lengths[: trace.num_unknown])
            yield trace, graph
        if tensor is None and absent is None and () in tried and not refused:
            return  # it fails before it calls a child: no argument that it hands to one can help


def _ways(layer: _Layer) -> Iterator[tuple[str | None, str | None]]:
    """What to take for a tensor, and what to leave out because the layer may refuse it: nothing, then one thing."""
    yield None, None
    for name in layer.others:
        if name in layer.asked:
            yield name, None
            yield None, name


def _argument(item: Any) -> Any:
    return HIDDEN if type(item) is not Given and isinstance(item, Tensor) else item


@functools.lru_cache(maxsize=4096)
def _compared_with_none(code: types.CodeType) -> frozenset[str]:
    """The names that code compares with None."""
    names = set()
    instructions = list(dis.get_instructions(code))
    for one, two, three in zip(instructions[:-2], instructions[1:-1], instructions[2:], strict=True):
        by_jump = "NONE" in two.opname
        by_operator = two.argval is None and three.opname == "IS_OP"
        if one.opname.startswith("LOAD_FAST") and (by_jump or by_operator):
            names.add(one.argval[-1] if isinstance(one.argval, tuple) else str(one.argval))
    return frozenset(names)


@functools.lru_cache(maxsize=4096)
def _only_passes_on(code: types.CodeType, name: str) -> bool:
    """Whether code does nothing with a dict but merge it into the arguments of calls."""
    instructions = list(dis.get_instructions(code))
    for one, two in zip(instructions, [*instructions[1:], None], strict=True):
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        if name in names and (names[-1] != name or two is None or two.opname not in ("DICT_MERGE", "CALL_FUNCTION_EX")):
            return False
    return name not in (*code.co_cellvars, *code.co_freevars)


# ---------------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------------


def find(module: nn.Module, *, training: bool | None) -> Finding:
    """Return what a module computes, as a layer that is one operation or as one that holds norms and blocks."""
    finding = find_module(module, training=training)
    if finding.recognition is not None:
        return finding
    layer = find_layer(module, training=training)
    if layer is None:
        return finding
    for path, value in finding.reads.tokens.items():
        layer.reads.tokens.setdefault(path, value)
    return layer


def find_layer(module: nn.Module, *, training: bool | None) -> Finding | None:
    """Return what a layer with norms among its children computes; None for a module that is no such layer."""
    norms, known = _norms_of(module, training)
    if not norms:
        return None
    reads = Reads()
    reason: str | None = None
    shown: str | None = None
    try:
        for trace, graph in _traces(module, norms, reads, training):
            if isinstance(graph, str):
                reason = reason or graph
                continue
            shown = shown or str(graph)
            for op, variant in _variants_like(graph):
                found = _compare(op, variant, graph, trace)
                if isinstance(found, Recognition):
                    return Finding(found, None, None, _merged(reads, known))
                reason = found or reason
    except Untraceable as error:
        reason = str(error)
    return Finding(None, reason or "no known layer has this graph", shown, _merged(reads, known))


def record_calls(module: nn.Module, *, training: bool | None) -> tuple[tuple[ChildCall, ...], str | None]:
    """Return how a recognised layer calls its children, in order, and the argument that it refuses, if there is one.

    No calls where the layer is not recognised.
    """
    norms, _ = _norms_of(module, training)
    try:
        for trace, graph in _traces(module, norms, Reads(), training) if norms else ():
            if isinstance(graph, str):
                continue
            for op, variant in _variants_like(graph):
                if isinstance(_compare(op, variant, graph, trace), Recognition):
                    return _with_alternatives(trace, op, variant), trace.refused
    except Untraceable:
        pass
    return (), None


def _with_alternatives(trace: _Trace, op: Operation, variant: Variant) -> tuple[ChildCall, ...]:
    """The calls of a trace, each with everything that the child may give without a change to what the layer is."""
    trace.candidate.graph(FIRST)
    calls, place = list(trace.calls), 0
    for index, call in enumerate(calls):
        if not call.is_open:
            continue
        for length in _LENGTHS:
            lengths = (*trace.lengths[:place], length, *trace.lengths[place + 1 :])
            other = _Trace(trace.layer, lengths, trace.tensor, trace.refused)
            try:
                same = compare(op, variant, {}, other.candidate.graph(FIRST), FIRST, None) is not None
            except Untraceable:
                continue
            if same and length not in calls[index].lengths:
                calls[index] = replace(calls[index], lengths=(*calls[index].lengths, length))
        place += 1
    return tuple(calls)


def _norms_of(module: nn.Module, training: bool | None) -> tuple[dict[str, str | None], dict[str, Reads]]:
    """The children that are norms with their operation, and what was read of every child that was looked at."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    if not 2 <= len(children) <= _MOST_CHILDREN:
        return {}, {}
    found = {
        name: find_module(child, training=training)
        for name, child in children.items()
        if not child._modules and all(p is None or p.ndim == 1 for p in child._parameters.values())
    }
    norms = {name: f.recognition.op if f.recognition else None for name, f in found.items() if _is_norm(f)}
    return norms, {name: f.reads for name, f in found.items()}


def _is_norm(finding: Finding) -> bool:
    """Whether a child is a known norm, or divides by the root of a mean in a way that no operation has."""
    if finding.recognition is not None:
        return finding.recognition.op in _NORMS
    return finding.graph is not None and "= mean(" in finding.graph and "= rsqrt(" in finding.graph


def _merged(reads: Reads, known: dict[str, Reads]) -> Reads:
    """What the answer depends on: what the trace has read, and what made a child a norm or not."""
    for name, child in known.items():
        for path, value in child.tokens.items():
            reads.tokens.setdefault((name, *path), value)
    return reads


def _variants_like(graph: Graph) -> Iterator[tuple[Operation, Variant]]:
    for op in OPERATIONS.values():
        if op.norms and may_be(op, graph):
            for variant in op.variants:
                if dict(variant.options).get("returns", graph.structure) == graph.structure:
                    yield op, variant


def _compare(op: Operation, variant: Variant, graph: Graph, trace: _Trace) -> Recognition | str | None:
    """What the layer is if it is this variant; else why not, or None where it is nothing like it."""
    found = compare(op, variant, {}, graph, FIRST, None)
    if found is None:
        return None
    for role in op.norms:
        bound = found.roles.get(role)
        if bound is not None and not (isinstance(bound, Source) and bound.name in trace.layer.norms):
            return f"looks like {op.name}, but its {role} ({bound}) is not known to be a norm"
    if trace.refused is not None and not trace.refuses():
        return f"looks like {op.name} without {trace.refused}, and does something else with it"
    problem = prove(op, variant, {}, trace.candidate, found.roles, ROUNDS)
    problem = problem or _prove_without(op, variant, trace, found.roles)
    if problem is not None:
        return problem
    roles = bindings(op, variant, {}, trace.candidate, found.roles)
    options = dict(variant.options)
    if "passing" in inspect.signature(op.reference).parameters:
        norm = trace.layer.norms.get(str(dict(roles or ()).get("mlp_norm", Binding("child", None)).value))
        options |= {"passing": "plain" if trace.passes_plainly() else "other", "norm": norm}
    return (
        f"looks like {op.name}, but a role has no name"
        if roles is None
        else Recognition(op.name, roles, tuple(options.items()))
    )


def _prove_without(op: Operation, variant: Variant, trace: _Trace, roles: dict[str, Bound]) -> str | None:
    """Return why a layer is something else where some of its arguments are None, or None."""
    for absent in trace.absences():
        at = replace(FIRST, absent=absent)
        try:
            graph = trace.candidate.graph(at)
        except Untraceable:
            continue  # it cannot be called this way, so nothing is lost there
        gone = frozenset(
            role for role, b in roles.items() if isinstance(b, Source) and b.kind == "argument" and b.name in absent
        )
        there = {node.args[0] for node in graph.reachable() if node.op in ("input", "call")}
        rest = {role: b for role, b in roles.items() if not isinstance(b, Source) or b in there}
        if compare(op, variant, {}, graph, replace(at, absent=gone), rest) is None:
            return f"is {op.name} {dict(variant.options)}, but not without {', '.join(sorted(absent))}"
    return None
