"""Layers of a model, recognised by recording how arguments pass to their children.

What `_passing` has written down is compared with references like any other graph; then the layer is traced again with each
of the arguments that may be None left out, and the children in the place of norms must be norms.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from kernelwise._data import Binding, Recognition
from kernelwise._recognize._compare import bindings, compare, may_be, prove
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import Bound
from kernelwise._recognize._passing import LENGTHS, ChildCall, LayerTrace, traces
from kernelwise._recognize._reads import Reads
from kernelwise._recognize._record import Failed, Source, Untraceable
from kernelwise._recognize._rounds import FIRST, ROUNDS
from kernelwise._recognize._search import Finding, find_module, mixes_dtypes, rounds_of_code
from kernelwise.ops import OPERATIONS, Operation, Variant

_NORMS = frozenset({"rms_norm", "layer_norm"})
_MOST_CHILDREN = 24
_TUPLES = (1, 2, 3, 4)  # results of a child
# How reasons begin where a tensor stands for a tuple or a tuple for a tensor: PyTorch names the kind of a tensor in saying that
# the two have no sum, and a norm is given a tuple.
_MISTAKEN = ("it does not run on tensors without data", "it calls its child")
_NEARNESS = ((2, "is "), (1, "looks like "))  # how the reasons of `_compare` and `prove` begin


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
    if layer.recognition is None and _says_more(finding, layer):
        return replace(finding, reads=layer.reads)
    return layer


def _says_more(finding: Finding, layer: Finding) -> bool:
    """Whether what was found without a look at the children is nearer to an operation; where both are far, has a graph."""
    own, other = _nearness(finding.reason), _nearness(layer.reason)
    return own > other or (own == other and layer.graph is None and finding.graph is not None)


def _nearness(reason: str | None) -> int:
    """How near an operation a layer is that keeps its own code for this reason; 0 where it is like none."""
    return next((rank for rank, start in _NEARNESS if (reason or "").startswith(start)), 0)


def _nearer(reason: str | None, other: str) -> str:
    """Of two reasons the one of the nearer operation, else the first: a further way to trace a layer may be far off."""
    return other if reason is None or _nearness(other) > _nearness(reason) else reason


def find_layer(module: nn.Module, *, training: bool | None) -> Finding | None:
    """Return what a layer with norms among its children computes; None for a module that is no such layer."""
    norms, known = _norms_of(module, training)
    if not norms:
        return None
    reads = Reads()
    reason: str | None = None
    shown: str | None = None
    try:
        for trace, graph in traces(module, norms, reads, training):
            if isinstance(graph, str):
                reason = _nearer(reason, graph)
                continue
            shown = shown or str(graph)
            for op, variant in _variants_like(graph):
                found = _compare(op, variant, graph, trace)
                if isinstance(found, Recognition):
                    return Finding(found, None, None, _merged(reads, known))
                if found is not None:
                    reason = _nearer(reason, found)
    except Untraceable as error:
        reason = _nearer(reason, str(error))
    return Finding(None, reason or "no known layer has this graph", shown, _merged(reads, known))


def layer_graphs(module: nn.Module, *, training: bool | None) -> Iterator[tuple[Operation, Variant, Graph]]:
    """Every variant of a layer of a model, with the graph of a module that has norms among its children."""
    norms, _ = _norms_of(module, training)
    try:
        for _, graph in traces(module, norms, Reads(), training) if norms else ():
            if isinstance(graph, Graph):
                yield from ((op, variant, graph) for op in OPERATIONS.values() if op.norms for variant in op.variants)
                return
    except Untraceable:
        pass


def record_calls(module: nn.Module, *, training: bool | None) -> tuple[tuple[ChildCall, ...], str | None]:
    """Return how a recognised layer calls its children, in order, and the argument that it refuses, if there is one.

    No calls where the layer is not recognised.
    """
    norms, _ = _norms_of(module, training)
    try:
        for trace, graph in traces(module, norms, Reads(), training) if norms else ():
            if isinstance(graph, str):
                continue
            for op, variant in _variants_like(graph):
                if isinstance(_compare(op, variant, graph, trace), Recognition):
                    return _with_alternatives(trace, op, variant), trace.refused
    except Untraceable:
        pass
    return (), None


def _with_alternatives(trace: LayerTrace, op: Operation, variant: Variant) -> tuple[ChildCall, ...]:
    """The calls of a trace, each with everything that the child may give without a change to what the layer is."""
    trace.candidate.graph(FIRST)
    calls, place = list(trace.calls), 0
    for index, call in enumerate(calls):
        if not call.is_open:
            continue
        for length in LENGTHS:
            lengths = (*trace.lengths[:place], length, *trace.lengths[place + 1 :])
            other = LayerTrace(trace.layer, lengths, trace.tensor, trace.refused)
            try:
                same = compare(op, variant, {}, other.candidate.graph(FIRST), FIRST, None) is not None
            except Untraceable:
                continue
            if same and not other.hands_on and length not in calls[index].lengths:
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
        if type(child).__call__ is nn.Module.__call__  # calling it does nothing but run its forward, and hooks
        and not child._modules
        and all(p is None or p.ndim == 1 for p in child._parameters.values())
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


def _compare(op: Operation, variant: Variant, graph: Graph, trace: LayerTrace) -> Recognition | str | None:
    """What the layer is if it is this variant; else why not, or None where it is nothing like it.

    A layer that hands on what its last child gives is what it is where that is a tensor.
    """
    if trace.hands_on:
        return None
    found = compare(op, variant, {}, graph, FIRST, None)
    if found is None:
        return None
    for role in op.norms:
        bound = found.roles.get(role)
        if bound is not None and not (isinstance(bound, Source) and bound.name in trace.layer.norms):
            return f"looks like {op.name}, but its {role} ({bound}) is not known to be a norm"
    if trace.refused is not None and not trace.refuses():
        return f"looks like {op.name} without {trace.refused}, and does something else with it"
    layer = trace.layer
    rounds = (*ROUNDS, *rounds_of_code(layer.reads, (layer.forward,), type(layer.module), found.roles))
    problem = prove(op, variant, {}, trace.candidate, found.roles, rounds)
    problem = problem or _prove_without(op, variant, trace, found.roles)
    problem = problem or _looks_at_results(op, variant, trace, found.roles)
    if problem is None and mixes_dtypes(layer.reads, (layer.forward,), type(layer.module)):
        problem = f"looks like {op.name}, but decides by the dtypes of several of its children"
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


def _looks_at_results(op: Operation, variant: Variant, trace: LayerTrace, roles: dict[str, Bound]) -> str | None:
    """Return why a layer is something else where a child gives a tensor or a tuple of another length, or None.

    A tensor of which it takes the first as if it were a tuple is the caller's mistake, and a kernel makes the same.
    """
    trace.candidate.graph(FIRST)
    num_open = sum(call.is_open for call in trace.calls)
    for place, length in itertools.product(range(num_open), (0, *_TUPLES)):
        graph = _with_length(trace, place, length)
        if graph is None or (isinstance(graph, Graph) and compare(op, variant, {}, graph, FIRST, roles) is not None):
            continue
        if length == 0 and str(graph) == str(_with_length(trace, place, -2)):
            continue
        return f"is {op.name} {dict(variant.options)}, but not where a child gives {length or 'no'} results in a tuple"
    return None


def _with_length(trace: LayerTrace, place: int, length: int) -> Graph | str | None:
    """The graph where the child that is called at this place gives so many; why there is none; None where it fails."""
    lengths = [trace.lengths[min(i, len(trace.lengths) - 1)] for i in range(max(place + 1, len(trace.lengths)))]
    lengths[place] = length
    try:
        return LayerTrace(trace.layer, tuple(lengths), trace.tensor, trace.refused).candidate.graph(FIRST)
    except Failed:
        return None
    except Untraceable as reason:
        return None if str(reason).startswith(_MISTAKEN) else str(reason)


def _prove_without(op: Operation, variant: Variant, trace: LayerTrace, roles: dict[str, Bound]) -> str | None:
    """Return why a layer is something else where some of its arguments are None, or None."""
    for absent in trace.absences():
        at = replace(FIRST, absent=absent)
        try:
            graph, _ = trace.without(absent)
        except Failed:
            continue  # it cannot be called this way, so nothing is lost there
        except Untraceable as reason:
            return f"is {op.name} {dict(variant.options)}, but not without {', '.join(sorted(absent))}: {reason}"
        gone = frozenset(
            role for role, b in roles.items() if isinstance(b, Source) and b.kind == "argument" and b.name in absent
        )
        there = {node.args[0] for node in graph.reachable() if node.op in ("input", "call")}
        rest = {role: b for role, b in roles.items() if not isinstance(b, Source) or b in there}
        if compare(op, variant, {}, graph, replace(at, absent=gone), rest) is None:
            return f"is {op.name} {dict(variant.options)}, but not without {', '.join(sorted(absent))}"
    return None
