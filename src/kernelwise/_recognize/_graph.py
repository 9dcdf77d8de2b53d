"""Canonical graphs: what a traced call computes, written so that equal computations look equal.

A graph is a set of interned nodes: two equal expressions in one graph are one node, so comparing nodes is comparing
identities. `Graph.apply` takes an ATen operation as it was traced and rewrites it by a fixed set of identities. Those
that hold bit for bit: casts and views that change nothing, `x - y` as `x + (-y)`, `pow(x, 2)` as `x * x`, promotion to
a wider dtype made explicit, splits as slices, no dimensions of size one in front of what broadcasts. Those that hold up
to the rounding of one operation: `pow(x, -0.5)`, `1 / sqrt(x)` and `y / sqrt(x)` through `rsqrt`. Whatever has no rule
stays as it was traced, and therefore equals nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

Shape = tuple[int, ...]

_MOVEMENT = frozenset({"neg", "slice", "view", "permute", "expand", "cat"})

# What a detach or a call under `no_grad` does to the gradient is part of what a layer computes.
_WITHOUT_GRADIENT = "without_gradient"
# Arguments of ATen operations that say where a result lives, not what it is.
_PLACEMENT = frozenset({"layout", "device", "pin_memory", "non_blocking", "memory_format", "copy"})


class Node:
    """One value of a graph. Interned by its graph: equality is identity."""

    __slots__ = ("args", "dtype", "op", "shape")

    def __init__(self, op: str, args: tuple[Any, ...], shape: Shape, dtype: torch.dtype) -> None:
        self.op, self.args, self.shape, self.dtype = op, args, shape, dtype

    def inputs(self) -> Iterator[Node]:
        """The nodes this one is computed from, in order."""
        return _nodes_of(self.args)


def _nodes_of(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes_of(item)


class Graph:
    """A builder of interned nodes, and the outputs once the call has returned.

    `structure` is `"tensor"` or `"tuple"`: what the traced function gave back.
    """

    def __init__(self) -> None:
        self.outputs: tuple[Node, ...] = ()
        self.structure = "tensor"
        self._interned: dict[tuple[Any, ...], Node] = {}

    def node(self, op: str, args: tuple[Any, ...], shape: Shape, dtype: torch.dtype) -> Node:
        """Return the node for this expression, the one that is already there if there is one."""
        key = (op, dtype, shape, _key_of(args))
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = Node(op, args, shape, dtype)
        return found

    def apply(
        self, name: str, arguments: dict[str, Any], shape: Shape, dtype: torch.dtype, *, grad: bool = True
    ) -> Node:
        """Return the canonical node of one traced operation with one result.

        `name` is `packet.overload` (`"add.Tensor"`), `arguments` holds every argument of the schema by name.
        """
        arguments = {key: value for key, value in arguments.items() if key not in _PLACEMENT}
        if not grad and any(True for _ in _nodes_of(tuple(arguments.values()))):
            return self.node(_WITHOUT_GRADIENT, (name, *arguments.values()), shape, dtype)
        rule = _RULES.get(name.split(".")[0])
        result = rule(self, arguments, shape, dtype) if rule is not None else None
        return result if result is not None else self.node(name, tuple(arguments.values()), shape, dtype)

    def operators(self) -> frozenset[str]:
        """Names of the operations that the outputs depend on."""
        return frozenset(node.op for node in self.reachable())

    def reachable(self) -> list[Node]:
        """Every node that the outputs depend on, inputs before users."""
        order: list[Node] = []
        seen: set[int] = set()
        stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(self.outputs)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((item, False) for item in node.inputs())
        return order

    def __str__(self) -> str:
        numbers: dict[int, str] = {}
        lines = []
        for node in self.reachable():
            numbers[id(node)] = f"%{len(numbers)}"
            what = f"{node.op}({', '.join(_show(arg, numbers) for arg in node.args)})"
            lines.append(f"{numbers[id(node)]} = {what}  # {str(node.dtype)[6:]} {list(node.shape)}")
        return "\n".join([*lines, "return " + ", ".join(numbers[id(node)] for node in self.outputs)])

    # The rest are the building blocks of the rules.

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """`x` in `dtype`; a widening that is taken back at once is nothing."""
        if x.dtype == dtype:
            return x
        if x.op == "to" and x.args[0].dtype == dtype and _holds(x.dtype, dtype):
            inner: Node = x.args[0]
            return inner
        if x.op in _MOVEMENT and x.dtype.is_floating_point and dtype.is_floating_point:
            first = x.args[0]  # moving numbers and rounding them is the same in either order
            moved = tuple(self.cast(part, dtype) for part in first) if x.op == "cat" else self.cast(first, dtype)
            return self.node(x.op, (moved, *x.args[1:]), x.shape, dtype)
        return self.node("to", (x,), x.shape, dtype)

    def neg(self, x: Node) -> Node:
        """`-x`."""
        if x.op == "neg":
            inner: Node = x.args[0]
            return inner
        return self.node("neg", (x,), x.shape, x.dtype)

    def mul(self, x: Any, y: Any, shape: Shape, dtype: torch.dtype) -> Node:
        """`x * y` with type promotion made explicit and signs moved outwards."""
        x, y = self._promote(x, dtype), self._promote(y, dtype)
        if not isinstance(x, Node):
            x, y = y, x
        if not isinstance(y, Node) and y == 1 and x.shape == shape and x.dtype == dtype:
            one_times: Node = x
            return one_times
        if x.op == "neg":
            return self.neg(self.mul(x.args[0], y, shape, dtype))
        if isinstance(y, Node) and y.op == "neg":
            return self.neg(self.mul(x, y.args[0], shape, dtype))
        return self.node("mul", self._aligned(x, y, shape), shape, dtype)

    def add(self, x: Any, y: Any, shape: Shape, dtype: torch.dtype) -> Node:
        """`x + y` with type promotion made explicit."""
        x, y = self._promote(x, dtype), self._promote(y, dtype)
        if not isinstance(x, Node):
            x, y = y, x
        return self.node("add", self._aligned(x, y, shape), shape, dtype)

    def _aligned(self, x: Any, y: Any, shape: Shape) -> tuple[Any, Any]:
        """Both, one of them without dimensions of size one in front where the other has all dimensions anyway."""
        if not isinstance(y, Node) or not x.shape or not y.shape:
            return x, y
        x_goes = x.shape[0] == 1 and len(y.shape) == len(shape)
        y_goes = y.shape[0] == 1 and len(x.shape) == len(shape)
        if x_goes and y_goes:  # the smaller one, so that it does not matter which of them has been given the ones
            x_size, y_size = ((math.prod(v.shape), v.op != "view") for v in (x, y))
            x_goes, y_goes = x_size < y_size, y_size < x_size
        if y_goes:
            y = self.view(y, _without_leading_ones(y.shape))
        elif x_goes:
            x = self.view(x, _without_leading_ones(x.shape))
        return x, y

    def negative(self, x: Any) -> Any:
        """`-x` for a node or a number."""
        return self.neg(x) if isinstance(x, Node) else -x

    def _promote(self, x: Any, dtype: torch.dtype) -> Any:
        # A tensor without dimensions takes part in promotion as a number does; its own dtype is kept.
        if isinstance(x, Node):
            return self.cast(x, dtype) if x.shape and x.dtype.is_floating_point and dtype.is_floating_point else x
        return float(x) if dtype.is_floating_point and isinstance(x, (int, float)) else x

    def permute(self, x: Node, dims: Shape) -> Node:
        """`x` with its dimensions in the order `dims`."""
        if x.op == "permute":
            dims, x = tuple(x.args[1][dim] for dim in dims), x.args[0]
        if dims == tuple(range(len(dims))):
            return x
        return self.node("permute", (x, dims), tuple(x.shape[dim] for dim in dims), x.dtype)

    def view(self, x: Node, shape: Shape) -> Node:
        """`x` with its elements in the same order under another shape."""
        if x.op == "view":
            x = x.args[0]
        return x if x.shape == shape else self.node("view", (x,), shape, x.dtype)

    def slice(self, x: Node, dim: int, start: int, end: int, step: int = 1) -> Node:
        """`x[..., start:end:step, ...]` along `dim`."""
        if step == 1 and x.op == "slice" and x.args[1] == dim and x.args[4] == 1:
            offset = x.args[2]
            x, start, end = x.args[0], start + offset, end + offset
        if (start, end, step) == (0, x.shape[dim], 1):
            return x
        inner = _under_ones(x, dim)
        if inner is not None:  # a dimension of size one may as well be put in after the cut
            sliced = self.slice(x.args[0], inner, start, end, step)
            size = sliced.shape[inner]
            return self.view(sliced, (*x.shape[:dim], size, *x.shape[dim + 1 :]))
        if x.op == "view" and dim == len(x.shape) - 1 > 0 and end - start == 1:
            row, columns = x.args[0], x.shape[-1]
            if row.shape == (
                *x.shape[:-2],
                x.shape[-2] * columns,
            ):  # one column of rows folded up is every so many elements
                folded = self.slice(row, dim - 1, start, row.shape[-1], columns)
                return self.view(folded, (*x.shape[:-1], 1))
        shape = (*x.shape[:dim], max(0, -(-(end - start) // step)), *x.shape[dim + 1 :])
        return self.node("slice", (x, dim, start, end, step), shape, x.dtype)


def _without_leading_ones(shape: Shape) -> Shape:
    first = next((dim for dim, size in enumerate(shape) if size != 1), len(shape) - 1)
    return shape[first:]


def _under_ones(x: Node, dim: int) -> int | None:
    """The dimension that `dim` of x is in what x is a view of, where the view only puts in or drops ones."""
    if x.op != "view" or x.shape[dim] == 1:
        return None
    inside = [size for size in x.args[0].shape if size != 1]
    if inside != [size for size in x.shape if size != 1]:
        return None
    place = sum(size != 1 for size in x.shape[:dim])
    return [i for i, size in enumerate(x.args[0].shape) if size != 1][place]


def _key_of(value: Any) -> Any:
    # Numbers of different types are different arguments (1 == True == 1.0 in Python).
    if isinstance(value, Node):
        return ("node", id(value))
    if isinstance(value, tuple):
        return tuple(_key_of(item) for item in value)
    return (type(value), value)


def _show(value: Any, numbers: dict[int, str]) -> str:
    if isinstance(value, Node):
        return numbers[id(value)]
    if isinstance(value, tuple):
        return f"({', '.join(_show(item, numbers) for item in value)})"
    return str(value)


_WIDER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    return narrow in _WIDER.get(wide, ())


Rule = Callable[[Graph, dict[str, Any], Shape, torch.dtype], "Node | None"]


def _same(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x = a["self"]
    return x if isinstance(x, Node) and x.shape == shape and x.dtype == dtype else None


def _to(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.cast(a["self"], dtype)


def _add(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.add(a["self"], a["other"], shape, dtype) if a.get("alpha", 1) == 1 else None


def _sub(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    if a.get("alpha", 1) != 1 or not dtype.is_floating_point:
        return None
    return graph.add(a["self"], graph.negative(a["other"]), shape, dtype)


def _rsub(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    if a.get("alpha", 1) != 1 or not dtype.is_floating_point:
        return None
    return graph.add(a["other"], graph.negative(a["self"]), shape, dtype)


def _mul(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.mul(a["self"], a["other"], shape, dtype)


def _div(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x, y = a["self"], a["other"]
    if a.get("rounding_mode") is not None or not dtype.is_floating_point:
        return None
    if isinstance(y, Node):
        if y.op == "sqrt" and y.dtype == dtype:
            return graph.mul(x, graph.node("rsqrt", y.args, y.shape, dtype), shape, dtype)
        return graph.node("div", (graph._promote(x, dtype), graph._promote(y, dtype)), shape, dtype)
    mantissa = abs(float(y)).hex().split("p")[0] if y else ""
    if mantissa == "0x1.0000000000000":  # a power of two: its inverse is exact
        return graph.mul(x, 1.0 / y, shape, dtype)
    return graph.node("div", (graph._promote(x, dtype), float(y)), shape, dtype)


def _neg(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.neg(a["self"])


def _pow(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x, exponent = a["self"], a["exponent"]
    if not isinstance(x, Node) or isinstance(exponent, Node) or not dtype.is_floating_point or x.dtype != dtype:
        return None
    if exponent == 2:
        return graph.mul(x, x, shape, dtype)
    if exponent == -0.5:
        return graph.node("rsqrt", (x,), shape, dtype)
    if exponent == 0.5:
        return graph.node("sqrt", (x,), shape, dtype)
    return graph.node("pow", (x, float(exponent)), shape, dtype)


def _square(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.mul(a["self"], a["self"], shape, dtype)


def _reciprocal(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x = a["self"]
    if x.op == "sqrt" and x.dtype == dtype:
        return graph.node("rsqrt", x.args, shape, dtype)
    return graph.node("div", (1.0, graph._promote(x, dtype)), shape, dtype)


def _unary(name: str) -> Rule:
    def rule(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
        x = a["self"]
        return graph.node(name, (x,), shape, dtype) if x.dtype == dtype and len(a) == 1 else None

    return rule


def _reduction(name: str) -> Rule:
    def rule(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
        x = a["self"]
        if not a.get("dim"):
            return None
        dims = tuple(sorted(dim % len(x.shape) for dim in a["dim"]))
        one = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
        return graph.view(graph.node(name, (graph.cast(x, dtype), dims), one, dtype), shape)

    return rule


def _transpose(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x: Node = a["self"]
    dims = list(range(len(x.shape)))
    if len(dims) < 2:
        return x
    first, second = a.get("dim0", 0) % len(dims), a.get("dim1", 1) % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return graph.permute(x, tuple(dims))


def _permute(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.permute(a["self"], tuple(dim % len(shape) for dim in a["dims"]))


def _view(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    return graph.view(a["self"], shape) if "dtype" not in a else None


def _expand(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x: Node = a["self"]
    return x if x.shape == shape else graph.node("expand", (x,), shape, dtype)


def _slice(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x = a["self"]
    dim = a["dim"] % len(x.shape)
    size = x.shape[dim]
    start, end, step = slice(a["start"], a["end"], a["step"]).indices(size)
    return graph.slice(x, dim, start, max(start, end), step)


def _select(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    x = a["self"]
    dim = a["dim"] % len(x.shape)
    index = a["index"] % x.shape[dim]
    return graph.view(graph.slice(x, dim, index, index + 1), shape)


def _cat(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    dim = a["dim"] % len(shape)
    parts = tuple(graph.cast(part, dtype) for part in a["tensors"] if part.shape[dim : dim + 1] != (0,))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else graph.node("cat", (parts, dim), shape, dtype)


def _stack(graph: Graph, a: dict[str, Any], shape: Shape, dtype: torch.dtype) -> Node | None:
    dim = a["dim"] % len(shape)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = tuple(graph.view(graph.cast(part, dtype), one) for part in a["tensors"])
    return graph.node("cat", (parts, dim), shape, dtype)


_RULES: dict[str, Rule] = {
    "alias": _same,
    "clone": _same,
    "lift_fresh": _same,
    "_to_copy": _to,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "pow": _pow,
    "square": _square,
    "reciprocal": _reciprocal,
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "t": _transpose,
    "transpose": _transpose,
    "permute": _permute,
    "view": _view,
    "_unsafe_view": _view,
    "_reshape_alias": _view,
    "reshape": _view,
    "unsqueeze": _view,
    "squeeze": _view,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "stack": _stack,
    **{name: _unary(name) for name in ("rsqrt", "sqrt", "sigmoid", "tanh", "erf", "exp", "silu", "relu", "cos", "sin")},
}


def parts_of(graph: Graph, name: str, arguments: dict[str, Any], sizes: tuple[Shape, ...]) -> list[Node] | None:
    """Return the results of an operation that only takes its input apart (`split`, `unbind`), or None for others."""
    packet = name.split(".")[0]
    x = arguments.get("self")
    if packet not in ("split", "split_with_sizes", "unbind") or not isinstance(x, Node):
        return None
    dim = arguments["dim"] % len(x.shape)
    start, parts = 0, []
    for shape in sizes:
        size = 1 if packet == "unbind" else shape[dim]
        parts.append(graph.view(graph.slice(x, dim, start, start + size), shape))
        start += size
    return parts
