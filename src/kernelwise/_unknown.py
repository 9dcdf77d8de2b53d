"""What was not recognised in a model, and why; and what one of its layers computes, beside the operation it looks most like.

Beside `discover`, which lists the layers where a kernel can go. Nothing here is needed to put kernels in; it is for whoever
asks why a layer keeps its own code, or wants to add an operation.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from kernelwise._data import Binding, Layer, Recognition
from kernelwise._discover import discover, places_of
from kernelwise._errors import KernelwiseError
from kernelwise._recognize import NearMiss, Unknown, functions_called, near_miss, recognize
from kernelwise._reference import nearest
from kernelwise._table import ROOT

_HOLDS = "it only holds other modules, and each of them has a path of its own"
_NOTHING = Binding("constant", None)  # in a role that this layer does not have
_MOST_PATHS = 3  # of alike layers, that are written out

HOW_TO_ADD = (
    "  go on      what it computes can be made known with kernelwise.register_op: docs/recognition.md, "
    '"Add an operation"'
)


@dataclass(frozen=True, slots=True)
class UnknownLayer:
    """A module that computes no known operation, or a function that its forward calls. `like` is what it nearly is."""

    path: str
    name: str  # the class, or the name of the function
    reason: str
    like: str | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a layer computes, or why that is not known; alike layers, at several `paths`, have one.

    `name` is its class, or the name of a function with brackets. Without a `recognition` there is the `reason`; its `graph`
    where it could be traced, and the operation that it looks most like where it looks like one. `blocked` says why no
    kernel can go there, whatever it computes.
    """

    paths: tuple[str, ...]
    name: str
    recognition: Recognition | None = None
    reason: str | None = None
    near: NearMiss | None = None
    graph: str | None = None
    blocked: str | None = None

    def __str__(self) -> str:
        more = len(self.paths) - _MOST_PATHS
        shown = ", ".join(path or ROOT for path in self.paths[:_MOST_PATHS]) + (f" and {more} more" if more > 0 else "")
        lines = [f"{shown} ({self.name})"]
        if self.recognition is not None:
            roles = [(role, bound) for role, bound in self.recognition.roles if bound != _NOTHING]
            width = max((len(role) for role, _ in roles), default=0)
            lines[0] += f" is {self.recognition.op}{_options(self.recognition.options)}"
            lines += [f"  {role:{width}}  the {bound.kind} {bound.value}" for role, bound in roles]
        else:
            lines[0] += f" is unknown: {self.reason}"
        if self.blocked is not None:
            lines.append(f"  no kernel can go here: {self.blocked}")
        if self.near is not None:
            nearby = f"{self.near.op}{_options(self.near.options)}"
            lines += [f"  nearest  {nearby}; lines that differ are marked", "", self.near.side_by_side]
        elif self.graph is not None:
            lines += ["  nothing known is near; it computes", "", *(f"  {x}" for x in self.graph.splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Place:
    """A module, a function that its forward calls, or what `discover` lists besides (`what` is None).

    `names` are further ways to ask for it: its class, the name of its layer, of a function its path with its own name.
    """

    paths: tuple[str, ...]
    name: str
    what: nn.Module | types.FunctionType | None
    answer: Recognition | Unknown
    layer: Layer | None
    names: tuple[str, ...]

    def is_at(self, pattern: str) -> bool:
        if isinstance(self.answer, Unknown) and _only_holds(self.what):
            return pattern in self.paths
        return any(name == pattern or fnmatchcase(name, pattern) for name in (*self.paths, *self.names))


def unknown_layers(model: nn.Module) -> tuple[UnknownLayer, ...]:
    """Return the modules of a model in which no operation is recognised in inference, and functions that could be traced.

    Containers are left out, and functions that take or give something else than tensors.

    Raises:
        PlanError: a lazy layer has no shape yet.
    """
    near = _NearMisses()
    found = []
    for place in itertools.chain.from_iterable(_modules_of(model)):
        if isinstance(place.answer, Unknown) and place.what is not None and not _only_holds(place.what):
            like = near.of(place)
            reason = place.answer.reason
            found.append(UnknownLayer(place.paths[0], place.name, reason, like.op if like is not None else None))
    return tuple(found)


def explain(model: nn.Module, pattern: str) -> tuple[Explanation, ...]:
    """Return what the layers at a place compute in inference, alike ones together.

    A place is whatever `kernelwise layers` prints: a path, each of those of a shared module, the name of a layer, a class; or
    a pattern, as rules of a config have it. With a module come the functions that its forward calls.

    Raises:
        KernelwiseError: nothing stands there.
        PlanError: a lazy layer has no shape yet.
    """
    wanted = "" if pattern == ROOT else pattern
    near = _NearMisses()
    found: dict[Explanation, dict[str, None]] = {}
    known: set[str] = set()
    for places in _modules_of(model):
        known.update(*((*place.paths, *place.names) for place in places))
        for place in places if places[0].is_at(wanted) else [place for place in places if place.is_at(wanted)]:
            found.setdefault(_explanation(place, near), {}).update(dict.fromkeys(place.paths))
    if not found:
        raise KernelwiseError(
            f"the model has nothing at {pattern!r}{nearest(pattern, filter(None, known))}\n"
            "  go on      kernelwise layers MODEL lists what there is; a pattern such as *.mlp works too"
        )
    return tuple(replace(alike, paths=tuple(paths)) for alike, paths in found.items())


def explanation_text(found: Sequence[Explanation]) -> str:
    """Return explanations as text, with how to add an operation where one of them has a graph and no operation."""
    can_be_added = any(item.recognition is None and item.graph is not None for item in found)
    return "\n\n".join([*map(str, found), *([HOW_TO_ADD] if can_be_added else [])])


def _modules_of(model: nn.Module) -> Iterator[tuple[_Place, ...]]:
    """Each module of a model: itself, then the functions that its forward calls and that are known or could be traced."""
    of_modules: dict[str, Layer] = {}
    of_functions: dict[str, dict[str, Layer]] = {}
    for layer in discover(model):
        if layer.function is None:
            of_modules[layer.path] = layer
        else:
            owner = layer.path.removesuffix(layer.name).removesuffix(".")
            of_functions.setdefault(owner, {})[layer.function] = layer
    for module, paths in places_of(model).items():
        listed = of_functions.get(paths[0], {})
        known = of_modules.get(paths[0])
        name = type(module).__name__
        answer = recognize(module, training=False)
        places = [_Place(tuple(paths), name, module, answer, known, (name, *([known.name] if known else [])))]
        for name, function, its_answer in functions_called(module):
            its_layer = listed.pop(name, None)
            its_paths = tuple(f"{path}.{name}" if path else name for path in paths)
            shown = f"{function.__name__}()"
            if its_layer is not None:
                names = (shown, its_layer.name, *its_paths)
                places.append(_Place(its_layer.paths, shown, function, its_answer, its_layer, names))
            elif isinstance(its_answer, Recognition) or its_answer.graph is not None:
                places.append(_Place(its_paths, shown, function, its_answer, None, (shown,)))
        for name, layer in listed.items():
            what = layer.recognition or Unknown("what it computes was not recognised")
            places.append(_Place(layer.paths, f"{name.removeprefix('?')}()", None, what, layer, (layer.name,)))
        yield tuple(places)


def _only_holds(what: nn.Module | types.FunctionType | None) -> bool:
    """Whether a module computes nothing itself: a container, or a module without a forward."""
    return getattr(type(what), "forward", None) in (nn.Module.forward, nn.Sequential.forward)


def _explanation(place: _Place, near: _NearMisses) -> Explanation:
    """What there is to say about a place, without its paths."""
    layer, answer = place.layer, place.answer
    blocked = (layer.blocked or layer.excluded) if layer is not None else None
    if isinstance(answer, Recognition):
        return Explanation((), place.name, answer, blocked=blocked)
    reason = _HOLDS if _only_holds(place.what) else answer.reason
    return Explanation((), place.name, None, reason, near.of(place), answer.graph, blocked)


class _NearMisses:
    """What unknown layers look most like, looked up once for alike ones."""

    def __init__(self) -> None:
        self._known: dict[object, NearMiss | None] = {}

    def of(self, place: _Place) -> NearMiss | None:
        what, answer = place.what, place.answer
        if what is None or not isinstance(answer, Unknown) or answer.graph is None:
            return None  # code of which there is no graph is not traced again: it may not even be run
        key = (type(what) if isinstance(what, nn.Module) else what, answer.graph)
        if key not in self._known:
            self._known[key] = near_miss(what, training=False)
        return self._known[key]


def _options(options: tuple[tuple[str, object], ...]) -> str:
    return f" ({', '.join(f'{name}={value}' for name, value in options)})" if options else ""
