"""How the forward of a layer passes its arguments to its children: traces that write it down.

The forward is traced with the hidden states as a tensor and with everything else as something that can be handed on and
nothing more. Every child that is called is a leaf, whatever it is called with and gives besides: what counts is the tensor
that goes in and the first result. Whether a child gives a tensor or a tuple is found by trying.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kernelwise._recognize._code import class_asked_for, only_passes_on
from kernelwise._recognize._compare import Candidate
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._reads import Reads, is_function
from kernelwise._recognize._record import Failed, Refused, Source, Untraceable
from kernelwise._recognize._rounds import FIRST, Round, sizes_of_module
from kernelwise._recognize._search import widths_of
from kernelwise._recognize._stand_in import Child, Stage, make_stand_in, run
from kernelwise._recognize._trace import innermost_forward

_CONSTANTS = (bool, int, float, str, type(None))
LENGTHS = (2, 0, 3)
"""What a child may give: one tensor (0), or a tuple of so many with a tensor first. Attention comes first and gives a pair."""
_MORE = "_kernelwise_more"
_CONTEXT = 29  # positions of a context
_MOST_UNKNOWN = 3  # children of a layer that may give a tensor or a tuple
_MOST_ASKED = 5
_REFUSED = (
    *("lt", "le", "gt", "ge", "ne", "contains", "len", "index", "int", "float", "neg", "abs", "format"),
    *(
        side + name
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
        for side in ("", "r")
    ),
    *(side + name for name in ("and", "or", "xor") for side in ("", "r")),
)
"""What Python asks of a number or a container: where it is answered with a TypeError, code may catch that."""


def _can_be_written(item: Any) -> bool:
    """Whether an argument of a child is no constant, or one that Python source can say: no enum, no infinity."""
    if type(item) is Given or not isinstance(item, _CONSTANTS):
        return True
    return type(item) in _CONSTANTS and (type(item) is not float or math.isfinite(item))


class Kinds:
    """What a trace says when it is asked what something given is: of no class, and not None, but where `taken` says it is.

    `asked` collects the questions, as text, and `conditions` the switches that were asked. All answers must lead to the
    same layer.
    """

    __slots__ = ("asked", "conditions", "taken")

    def __init__(self, asked: set[str], conditions: set[str], taken: frozenset[str]) -> None:
        self.asked, self.conditions, self.taken = asked, conditions, taken

    def takes(self, question: str) -> bool:
        """Note a question that has no answer of its own, and whether it is answered by yes this time."""
        self.asked.add(question)
        return question in self.taken

    def answer(self, name: str, asker: types.FrameType) -> type | None:
        """The class to be taken for, where `isinstance(<variable>, <class>)` asks; None where something else does."""
        cls = class_asked_for(asker)
        if cls is None:
            return None
        return cls if self.takes(f"{name} as a {cls.__name__}") else Given


class Given:
    """An argument, or a further result of a child, that a layer may hand on and must not look into.

    An attribute of it may be handed on too. One that is a switch (its default is True or False) may be asked which it
    is: `value`. Whether it is of some class may be asked where `kinds` has answers.
    """

    __slots__ = ("kinds", "name", "value")

    def __init__(self, name: str, value: bool | None = None, kinds: Kinds | None = None) -> None:
        self.name, self.value, self.kinds = name, value, kinds

    def _refuse(self, what: str) -> Any:
        raise Untraceable(f"it looks into {self.name} ({what})")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        answer = self.kinds.answer(self.name, sys._getframe(1)) if self.kinds is not None else None
        return self._refuse("its class") if answer is None else answer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return self._refuse(name)
        if self.kinds is not None and self.kinds.takes(f"{self.name}.{name} as None"):
            return None
        return Given(f"{self.name}.{name}", kinds=self.kinds)

    def __bool__(self) -> bool:
        if self.value is None:
            return bool(self._refuse("as a condition"))
        if self.kinds is not None:
            self.kinds.conditions.add(self.name)
        return self.value

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


def _refuse_all() -> None:
    def refused(name: str) -> Callable[..., Any]:
        return lambda self, *_: self._refuse(f"__{name}__")

    for name in _REFUSED:
        setattr(Given, f"__{name}__", refused(name))


_refuse_all()


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


class LayerTrace:
    """One way to trace a layer: which child gives a tuple, which argument is a tensor besides the hidden states."""

    def __init__(self, layer: TracedLayer, lengths: tuple[int, ...], tensor: str | None, refused: str | None) -> None:
        self.layer, self.tensor, self.refused, self.lengths = layer, tensor, refused, lengths
        sizes = functools.partial(sizes_of_module, layer.width, True)
        self.candidate = Candidate(self._run, layer.reads, sizes, layer.training)
        self.calls: list[ChildCall] = []  # of the last trace
        self.num_unknown = 0
        self._length_of: dict[str, int] = {}
        self.kinds_asked: set[str] = set()
        self._conditions: set[str] = set()
        self._kinds = Kinds(self.kinds_asked, self._conditions, frozenset())
        self._without: dict[frozenset[str], tuple[Graph | Untraceable, list[ChildCall]]] = {}
        self.returns_more = False  # whether it gives back, in some case, what a child gave besides its own result
        self.hands_on = False  # whether its result is the very tuple that a child gave, as that would be a tensor
        self._tuples: list[Any] = []
        self.looked_into = False  # whether there are children whose own code is a part of the graph

    def _run(self, stage: Stage, at: Round) -> Graph:
        layer = self.layer
        self.calls, self.num_unknown, self._tuples = [], 0, []
        stage.call_child = self._call
        stand_in = make_stand_in(layer.module, stage)
        absent = {*at.absent, self.refused}
        kinds = self._kinds = Kinds(self.kinds_asked, self._conditions, at.absent)
        given: dict[str, Any] = {name: None if name in absent else Given(name, kinds=kinds) for name in layer.others}
        given |= {name: Given(name, value != (name in absent), kinds) for name, value in layer.switches}
        width, dtype = layer.width, at.widths.activations
        if self.tensor is not None and self.tensor not in at.absent:
            context = stage.fake((*at.lead[:-1], _CONTEXT, width), dtype)
            given[self.tensor] = stage.recorder.input(context, Source("argument", self.tensor))
        if layer.takes_more:
            given[_MORE] = Given("**kwargs")
        x = stage.recorder.input(stage.fake((*at.lead, width), dtype), Source("argument", layer.x))
        result = run(stage, functools.partial(layer.forward, stand_in), (x,), given)
        is_tuple = type(result) is tuple and len(result) > 0
        if is_tuple:
            self._look_at_the_rest(stage, result[1:], with_results=bool(at.absent))
        graph = stage.recorder.finish(result[0] if is_tuple else result)
        self.hands_on = any(result is given for given in self._tuples)
        graph.structure = "tuple" if is_tuple and not self.hands_on else "tensor"
        return graph

    def _look_at_the_rest(self, stage: Stage, rest: tuple[Any, ...], *, with_results: bool) -> None:
        """What a layer gives back besides its result: arguments, what children gave besides theirs; where asked, theirs."""
        for item in rest:
            if type(item) in (Given, type(None)):
                continue
            if not (with_results and isinstance(item, Tensor) and stage.recorder.is_call(item)):
                raise Untraceable("it returns more than one tensor of its own")
            self.returns_more = True

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
        shape = tuple(child.result(tensors[0]).shape if is_linear else tensors[0].shape)
        length = 0
        is_open = not is_linear and name not in self.layer.norms
        if is_open and len(shape) > 2 and shape[-2] > 1 and self._kinds.takes(f"{name} giving one position"):
            shape = (*shape[:-2], 1, shape[-1])
        output: Any = stage.recorder.call(
            Source("child", name), tuple(tensors), stage.fake(shape, stage.widths.given_by(name, tensors[0]))
        )
        if is_open:
            # By name from the second trace on, in which a child before it may be left out.
            length = self._length_of.setdefault(name, self.lengths[min(self.num_unknown, len(self.lengths) - 1)])
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
        if length < 0:
            output, length = output[0], -length
        if not length:
            return output
        more = [f"{name}[{i}]" for i in range(1, length)]
        self._tuples.append((output, *(None if self._kinds.takes(f"{item} as None") else Given(item) for item in more)))
        return self._tuples[-1]

    def refuses(self) -> bool:
        """Whether the layer itself raises an exception where it is given the argument that is left out."""
        try:
            LayerTrace(self.layer, self.lengths, None, None).candidate.graph(FIRST)
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
        if not all(_can_be_written(item) for call in calls for item in call.passed()):
            return False
        for absent in self.absences():
            try:
                _, there = self.without(absent)
            except Failed:
                continue
            except Untraceable:
                return False
            if len(there) != len(calls) or not all(
                one.is_like(other, absent) for one, other in zip(calls, there, strict=True)
            ):
                return False
        return not self.returns_more

    def without(self, absent: frozenset[str]) -> tuple[Graph, list[ChildCall]]:
        """The graph of the layer, and its calls, where some of its arguments are None. Raises `Untraceable`."""
        if absent not in self._without:
            graph: Graph | Untraceable
            try:
                graph = self.candidate.graph(replace(FIRST, absent=absent))
            except Untraceable as reason:
                graph = reason
            self._without[absent] = graph, self.calls
        graph, calls = self._without[absent]
        if isinstance(graph, Untraceable):
            raise graph
        return graph, calls

    def absences(self) -> Iterator[frozenset[str]]:
        """Sets of arguments that may be None, switches turned over, and questions answered by yes, at once.

        Each alone, all of them, every two arguments, and every mix of those that the code asks for.
        """
        arguments = [*self.layer.others, *(name for name, _ in self.layer.switches)]
        arguments += [self.tensor] if self.tensor else []
        names = [*arguments, *sorted(self.kinds_asked)]
        asked = [name for name in names if name in self.layer.asked or name in self._conditions][:_MOST_ASKED]
        mixes = itertools.chain.from_iterable(itertools.combinations(asked, n) for n in range(2, len(asked) + 1))
        pairs = itertools.combinations(arguments, 2)
        yield from dict.fromkeys(map(frozenset, (*((name,) for name in names), tuple(names), *mixes, *pairs)))


@dataclass(frozen=True, slots=True)
class TracedLayer:
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


def _layer_of(module: nn.Module, norms: dict[str, str | None], reads: Reads, training: bool | None) -> TracedLayer:
    """Raises `Untraceable`."""
    forward = innermost_forward(module)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if code is None or not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Untraceable("its forward has no argument of its own first")
    more = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise Untraceable("its forward takes any number of arguments")
    if more is not None and not only_passes_on(code, more):
        raise Untraceable(f"it looks into its **{more}")
    first, *rest = (p for p in parameters if p.name != more)
    return TracedLayer(
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


def traces(
    module: nn.Module, norms: dict[str, str | None], reads: Reads, training: bool | None
) -> Iterator[tuple[LayerTrace, Graph | str]]:
    """Every way to trace a layer that leads somewhere, with its graph or why there is none. Raises `Untraceable`."""
    layer = _layer_of(module, norms, reads, training)
    refused = False
    for tensor, absent in _ways(layer):
        if absent is not None and not refused:
            continue
        others = tuple(name for name in layer.others if name != tensor)
        tried: set[tuple[int, ...]] = set()
        for lengths in itertools.product(LENGTHS, repeat=_MOST_UNKNOWN):
            if any(lengths[: len(prefix)] == prefix for prefix in tried):
                continue
            trace = LayerTrace(replace(layer, others=others), lengths, tensor, absent)
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


def _ways(layer: TracedLayer) -> Iterator[tuple[str | None, str | None]]:
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
