"""The recorder: every ATen operation of a call becomes a node of a canonical graph.

Whatever a graph cannot say (control flow on data, randomness, custom autograd, writes that others see) ends in
`Untraceable` with the reason. A trace that met one never gives a graph, whatever the traced code does with the exception.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernelwise._recognize._graph import Graph, Node, parts_of


class Untraceable(Exception):  # noqa: N818
    """The forward does something that a graph cannot say; the message is the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        heard: list[Untraceable] | None = getattr(_trace, "heard", None)
        if heard is not None:
            heard.append(self)


class Failed(Untraceable):
    """The forward fails on what it was given, as it would on real tensors: it cannot be called this way."""


class Refused(Failed):
    """The forward itself raises an exception for what it was given."""


_trace = threading.local()


@contextlib.contextmanager
def no_way_back() -> Iterator[None]:
    """Raise the first `Untraceable` of the body again, where the traced code has caught it."""
    outer: list[Untraceable] | None = getattr(_trace, "heard", None)
    heard = _trace.heard = [] if outer is None else outer
    start = len(heard)
    try:
        yield
        if len(heard) > start:
            raise heard[start]
    except Untraceable:
        raise
    except Exception:
        if len(heard) > start:
            raise heard[start] from None
        raise
    finally:
        _trace.heard = outer


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input of a graph comes from: `("argument", "x")`, `("attribute", "weight")`, `("child", "up")`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Widths:
    """Dtypes of one trace: of activations, of floating parameters, and of what leaves give (None: as they are given).

    `odd` names leaves, by path or by role, that give a dtype of their own.
    """

    activations: torch.dtype
    parameters: torch.dtype
    leaves: torch.dtype | None = None
    odd: tuple[tuple[str, torch.dtype], ...] = ()

    def given_by(self, leaf: str, x: torch.Tensor) -> torch.dtype:
        """The dtype of what a leaf gives for `x`."""
        return dict(self.odd).get(leaf) or self.leaves or x.dtype


_MOST_CALLS = 64
_CUTS = {"slice.Tensor": ("start", "end"), "split.Tensor": ("split_size",)}
WHOLE = 1 << 62
"""Where a part ends of which nothing is said."""


class Recorder(TorchDispatchMode):
    """Writes every ATen operation into a graph of canonical nodes.

    `note_cut(size, end)` hears of every part of a tensor that would end, or begin, beyond the size: at a larger one it cuts.
    """

    def __init__(self, note_cut: Callable[[int, int], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note_cut = note_cut
        self.graph = Graph()
        self._values: dict[int, Node] = {}
        self._tensors: list[torch.Tensor] = []  # keeps ids alive
        self._given: set[int] = set()  # storages that belong to the caller
        self.paused = False
        self._called: list[Node] = []

    def input(self, tensor: torch.Tensor, source: Source) -> torch.Tensor:
        """Make `tensor` an input of the graph."""
        self._bind(tensor, self.graph.node("input", (source,), tuple(tensor.shape), tensor.dtype))
        self._given.add(_storage(tensor))
        return tensor

    def call(self, source: Source, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Make `output` the result of an opaque call."""
        if len(self._called) == _MOST_CALLS:  # a whole model: what it reads would be compared at every look
            raise Untraceable(f"it calls more than {_MOST_CALLS} children, which no operation does")
        _refuse_custom_autograd(tuple(item for item in arguments if isinstance(item, torch.Tensor)))
        # Without gradients the child gets none either: another thing than a call.
        op = "call" if torch.is_grad_enabled() else "call_without_gradient"
        node = self.graph.node(op, (source, self._read(arguments)), tuple(output.shape), output.dtype)
        if any(node is earlier for earlier in self._called):
            raise Untraceable(f"it calls its {source} twice with the same")
        self._called.append(node)
        self._bind(output, node)
        self._given.add(_storage(output))
        return output

    def is_call(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is what a child gave, as it gave it."""
        node = self._values.get(id(tensor))
        return node is not None and node.op == "call"

    def finish(self, result: Any) -> Graph:
        """Set the graph's outputs to what the traced function returned."""
        if isinstance(result, torch.Tensor):
            outputs: tuple[Any, ...] = (result,)
        elif type(result) is tuple and result and all(isinstance(item, torch.Tensor) for item in result):
            outputs, self.graph.structure = result, "tuple"
        else:
            raise Untraceable(f"it returns {type(result).__name__}, not a tensor or a tuple of tensors")
        self.graph.outputs = tuple(self._read(item) for item in outputs)
        _refuse_custom_autograd(outputs)
        if any(tensor._backward_hooks for tensor in self._tensors):
            raise Untraceable("it puts a hook on a gradient")
        used = {id(node) for node in self.graph.reachable()}
        for node in self._called:
            if id(node) not in used:
                raise Untraceable(f"it calls its {node.args[0]} for something else than its result")
        return self.graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise Untraceable("its control flow or its shapes depend on data") from None
        if self.paused or func.namespace == "prim":
            return result
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untraceable(f"it draws random numbers ({func})")
        schema = func._schema
        arguments = dict(zip((a.name for a in schema.arguments), args, strict=False))
        for argument in schema.arguments[len(args) :]:
            arguments[argument.name] = kwargs.get(argument.name, argument.default_value)
        name = str(func).removeprefix("aten.")
        if name == "lift_fresh.default":
            self._bind(result, self._constant(arguments["self"]))
            return result
        if schema.is_mutable:
            self._write_in_place(func, arguments, result)
            return result
        if self._note_cut is not None and name in _CUTS:
            size = arguments["self"].shape[arguments["dim"]]
            for end in (arguments.get(key) for key in _CUTS[name]):
                if type(end) is int and size < abs(end) < WHOLE:
                    self._note_cut(size, abs(end))
        read = {key: self._read(value) for key, value in arguments.items()}
        if isinstance(result, torch.Tensor):
            self._bind(result, self._apply(name, read, result))
        elif isinstance(result, (tuple, list)):
            self._bind_all(name, read, result)
        else:
            raise Untraceable(f"it computes a Python value from a tensor ({func})")
        return result

    def _apply(self, name: str, read: dict[str, Any], result: torch.Tensor) -> Node:
        return self.graph.apply(name, read, tuple(result.shape), result.dtype, grad=torch.is_grad_enabled())

    def _bind_all(self, name: str, read: dict[str, Any], results: Any) -> None:
        tensors = [item for item in results if isinstance(item, torch.Tensor)]
        shapes = tuple(tuple(item.shape) for item in tensors)
        parts = parts_of(self.graph, name, read, shapes) if torch.is_grad_enabled() else None
        if parts is None:
            if not tensors:
                return
            whole = self.graph.apply(name, read, shapes[0], tensors[0].dtype, grad=torch.is_grad_enabled())
            parts = [self.graph.node("item", (whole, i), shapes[i], tensors[i].dtype) for i in range(len(tensors))]
        for tensor, node in zip(tensors, parts, strict=True):
            self._bind(tensor, node)

    def _write_in_place(self, func: Any, arguments: dict[str, Any], result: Any) -> None:
        """Record `x.add_(y)` as `x = x.add(y)`, where nobody else can see the write."""
        packet, overload = str(func).removeprefix("aten.").split(".")
        target = arguments.get("self")
        if not packet.endswith("_") or packet.endswith("__") or result is not target or target is None:
            raise Untraceable(f"it writes into a tensor ({func})")
        storage = _storage(target)
        views = sum(_storage(tensor) == storage for tensor in self._tensors)
        if storage in self._given or views != 1:
            raise Untraceable(f"it writes into a tensor that others see ({func})")
        read = {key: self._read(value) for key, value in arguments.items()}
        self._bind(target, self._apply(f"{packet.removesuffix('_')}.{overload}", read, target))

    def _constant(self, tensor: Any) -> Node:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.numel() != 1:
            raise Untraceable("it builds a tensor of constants")
        return self.graph.node("constant", (tensor.item(),), tuple(tensor.shape), tensor.dtype)

    def _bind(self, tensor: torch.Tensor, node: Node) -> None:
        if id(tensor) not in self._values:
            self._tensors.append(tensor)
        self._values[id(tensor)] = node

    def _read(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = self._values.get(id(value))
            if node is None:
                raise Untraceable("it uses a tensor that is neither an argument nor an attribute of the module")
            return node
        if isinstance(value, (tuple, list)):
            return tuple(self._read(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._read(item)) for key, item in sorted(value.items()))
        return value


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _refuse_custom_autograd(outputs: tuple[torch.Tensor, ...]) -> None:
    stack: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            raise Untraceable(f"it has a gradient of its own ({type(function).__name__})")
        stack.extend(following for following, _ in function.next_functions)
