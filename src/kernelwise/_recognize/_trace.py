"""Run a forward on fake tensors and write down what it computes.

Nothing of the user's module is called or written: its forward runs on a stand-in, an object of a throw-away subclass
that holds fake tensors in place of parameters, copies of plain attributes and leaves in place of child modules. The
stand-in notes which attributes the forward reads, which is what a cached answer depends on. Whatever the trace cannot
follow (control flow on data, randomness, custom autograd, writes to the module) ends in `Untraceable` with the reason.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import inspect
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._subclasses.fake_tensor
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kernelwise._recognize._graph import Graph, Node, parts_of


class Untraceable(Exception):  # noqa: N818
    """The forward does something that a graph cannot say; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input of a graph comes from: `("argument", "x")`, `("attribute", "weight")`, `("child", "up")`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Widths:
    """Dtypes of one trace: of activations, of floating parameters, and of what leaves give (None: as they are given)."""

    activations: torch.dtype
    parameters: torch.dtype
    leaves: torch.dtype | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The recorder
# ---------------------------------------------------------------------------------------------------------------------


_MOST_CALLS = 64


class Recorder(TorchDispatchMode):
    """Writes every ATen operation into a graph of canonical nodes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self._values: dict[int, Node] = {}
        self._tensors: list[torch.Tensor] = []  # keeps ids alive
        self._given: set[int] = set()  # storages that belong to the caller
        self.paused = False
        self._num_calls = 0

    def input(self, tensor: torch.Tensor, source: Source) -> torch.Tensor:
        """Make `tensor` an input of the graph."""
        self._bind(tensor, self.graph.node("input", (source,), tuple(tensor.shape), tensor.dtype))
        self._given.add(_storage(tensor))
        return tensor

    def call(self, source: Source, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Make `output` the result of an opaque call."""
        self._num_calls += 1
        if self._num_calls > _MOST_CALLS:  # a whole model: what it reads would be compared at every look
            raise Untraceable(f"it calls more than {_MOST_CALLS} children, which no operation does")
        node = self.graph.node("call", (source, self._read(arguments)), tuple(output.shape), output.dtype)
        self._bind(output, node)
        self._given.add(_storage(output))
        return output

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
        return self.graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
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


# ---------------------------------------------------------------------------------------------------------------------
# What a forward reads
# ---------------------------------------------------------------------------------------------------------------------

MISSING = "<missing>"
Token = Any
_SCALARS = frozenset({bool, int, float, str, type(None)})
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)


@dataclass(slots=True)
class Reads:
    """The attributes that a traced forward has read, and what stood there: what a cached answer depends on.

    A path is a tuple of names, from the module (`("config", "eps")`, `("act_fn", "training")`).
    """

    tokens: dict[tuple[str, ...], Token] = field(default_factory=dict)

    def note(self, path: tuple[str, ...], value: Any) -> None:
        """Note that the forward has read `value` at `path`."""
        self.tokens.setdefault(path, token(value))


def token(value: Any) -> Token:
    """Return what a trace can see of `value`, as something that can be compared and that keeps nothing alive."""
    kind = type(value)
    if kind in _SCALARS:
        return (kind, value)
    if isinstance(value, torch.Tensor):
        floating = value.dtype.is_floating_point
        return ("tensor", None if floating else value.dtype, value.shape)
    if isinstance(value, nn.Module):
        return child_token(value)
    if isinstance(value, (tuple, list)):
        return (kind, tuple(token(item) for item in value))
    if isinstance(value, dict):
        return (kind, tuple((key, token(item)) for key, item in value.items()))
    if isinstance(value, types.MethodType):
        return ("method", weakref.ref(value.__func__))
    if isinstance(value, functools.partial):
        return ("partial", token(value.func), token(value.args), token(value.keywords))
    if isinstance(value, (type, types.FunctionType)):
        return weakref.ref(value)
    if isinstance(value, (*_PLAIN, *_CODE)):
        return value
    return ("object", weakref.ref(kind))


def child_token(module: nn.Module) -> Token:
    """What decides how a trace goes on at a child: its class, and whether it is a function or a leaf."""
    return (weakref.ref(type(module)), is_function(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether anything but the class's own forward runs when this module is called."""
    d = module.__dict__
    return bool(
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or d.get("_compiled_call_impl") is not None
        or ("forward" in d and not is_own_code(module, d["forward"]))
        or type(module).__call__ is not nn.Module.__call__
    )


def is_function(module: nn.Module) -> bool:
    """Whether a module is nothing but a function: no parameters, no buffers, nothing around its forward."""
    d = module.__dict__
    return (
        all(value is None for value in d["_parameters"].values())
        and all(value is None for value in d["_buffers"].values())
        and not has_hooks(module)
        and all(child is None or is_function(child) for child in d["_modules"].values())
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """Everything one trace shares: the recorder, the fake mode, dtypes, what is read, and what is replaced.

    `overrides` replaces plain attributes of the module by name, to see what depends on them.
    """

    recorder: Recorder
    mode: FakeTensorMode
    widths: Widths
    training: bool | None = None
    reads: Reads = field(default_factory=Reads)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def fake(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of this shape; one that can have a gradient does."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


class _StandIn:
    """Mixed in before the module's class: answers every attribute from the module's metadata."""

    def __init_subclass__(cls) -> None:
        """Keep the module's own `__init_subclass__` from hearing of a class that is thrown away."""

    def __getattribute__(self, name: str) -> Any:
        d = object.__getattribute__(self, "__dict__")
        view = d.get("_kernelwise_view")
        if view is None or name in ("__class__", "__dict__"):
            if view is not None and name == "__dict__":
                raise Untraceable("it looks into its own __dict__")
            return object.__getattribute__(self, name)
        return view.get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"it writes to its attribute {name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"it deletes its attribute {name}")


_INTERNAL = frozenset({"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"})


class View:
    """The attributes of one module as a trace sees them."""

    def __init__(self, module: nn.Module, stage: Stage, path: tuple[str, ...]) -> None:
        self._module, self._stage, self._path = module, stage, path
        self._made: dict[str, Any] = {}

    def get(self, stand_in: Any, name: str) -> Any:
        """Return what `self.<name>` is, and note that it was read."""
        if name in self._made:
            return self._made[name]
        d = self._module.__dict__
        on_class = _on_class(type(self._module), name)
        if on_class is not None and hasattr(type(on_class), "__set__") and hasattr(type(on_class), "__get__"):
            return object.__getattribute__(stand_in, name)  # a property: it runs on the stand-in
        if name in _INTERNAL:
            raise Untraceable(f"it looks into {name}")
        if name in d and not is_own_code(self._module, d[name]):
            value = d[name]
            if isinstance(value, types.MethodType) and value.__self__ is self._module:
                self._stage.reads.note((*self._path, name), value)
                return types.MethodType(value.__func__, stand_in)
            return self._keep(name, value)
        if on_class is not None:
            if not callable(on_class) and not hasattr(type(on_class), "__get__"):
                return self._keep(name, on_class)
            self._stage.reads.note((*self._path, name), getattr(type(self._module), name))
            return object.__getattribute__(stand_in, name)
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in d[kind]:
                return self._keep(name, d[kind][name])
        if _on_class(type(self._module), "__getattr__") is not nn.Module.__getattr__:
            raise Untraceable(f"{type(self._module).__name__} has a __getattr__ of its own")
        self._stage.reads.tokens[(*self._path, name)] = MISSING
        raise AttributeError(f"'{type(self._module).__name__}' object has no attribute '{name}'")

    def _keep(self, name: str, value: Any) -> Any:
        path = (*self._path, name)
        if not self._path and name in self._stage.overrides:
            value = self._stage.overrides[name]
        if name == "training" and self._stage.training is not None:
            value = self._stage.training
        self._stage.reads.note(path, value)
        made = self._made[name] = stand_in_for(value, self._stage, path)
        return made


def _on_class(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def stand_in_for(value: Any, stage: Stage, path: tuple[str, ...]) -> Any:
    """Return what the trace uses in place of an attribute's value."""
    if isinstance(value, torch.Tensor):
        dtype = stage.widths.parameters if value.dtype.is_floating_point else value.dtype
        return stage.recorder.input(stage.fake(tuple(value.shape), dtype), Source("attribute", ".".join(path)))
    if isinstance(value, nn.Module):
        return Child(value, stage, path)
    if isinstance(value, (*_PLAIN, *_CODE)):
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            raise Untraceable(f"it calls a method of another module ({'.'.join(path)})")
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(stand_in_for(item, stage, (*path, str(i))) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {key: stand_in_for(item, stage, (*path, str(key))) for key, item in value.items()}
    return _Plain(value, stage, path)


class _Plain:
    """Stands for an object that is neither a module nor a tensor (a config): attributes can be read, nothing called."""

    def __init__(self, value: Any, stage: Stage, path: tuple[str, ...]) -> None:
        self.__dict__["_kernelwise"] = (value, stage, path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_kernelwise"][0])

    def __getattr__(self, name: str) -> Any:
        value, stage, path = self.__dict__["_kernelwise"]
        if name.startswith("__"):
            raise Untraceable(f"it uses {'.'.join(path)} as more than a bag of values ({name})")
        try:
            found = getattr(value, name)
        except AttributeError:
            stage.reads.tokens[(*path, name)] = MISSING
            raise
        if isinstance(found, _CODE):
            raise Untraceable(f"it calls a method of {'.'.join(path)} ({name})")
        stage.reads.note((*path, name), found)
        return stand_in_for(found, stage, (*path, name))

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"it writes to {'.'.join(self.__dict__['_kernelwise'][2])}.{name}")


def make_stand_in(module: nn.Module, stage: Stage, path: tuple[str, ...] = ()) -> Any:
    """An object of the module's class (for `isinstance`, methods and `super()`) that shares nothing with the module."""
    cls = type(module)
    subclass = type.__new__(type(cls), cls.__name__, (_StandIn, cls), {})
    stand_in = object.__new__(subclass)
    object.__getattribute__(stand_in, "__dict__")["_kernelwise_view"] = View(module, stage, path)
    return stand_in


class Child:
    """Stands for a child module: a leaf, or its own code where it is nothing but a function.

    A child without parameters, buffers and hooks is such a function (an activation); containers are looked into. Every
    other child is a call to something unknown.
    """

    def __init__(self, module: nn.Module, stage: Stage, path: tuple[str, ...]) -> None:
        self.__dict__["_kernelwise"] = (module, stage, path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_kernelwise"][0])

    def _inner(self) -> Any:
        d = self.__dict__
        if "_inner_stand_in" not in d:
            module, stage, path = d["_kernelwise"]
            d["_inner_stand_in"] = make_stand_in(module, stage, path)
        return d["_inner_stand_in"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"it writes to its child {'.'.join(self.__dict__['_kernelwise'][2])}")

    def __iter__(self) -> Any:
        module = self.__dict__["_kernelwise"][0]
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            raise Untraceable("it iterates over a child")
        return (self[index] for index in range(len(module)))

    def __len__(self) -> int:
        return len(self.__dict__["_kernelwise"][0])

    def __getitem__(self, index: Any) -> Any:
        module, stage, path = self.__dict__["_kernelwise"]
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or isinstance(index, slice):
            raise Untraceable("it takes a part of a child")
        child = module[index]
        name = next(name for name, item in module._modules.items() if item is child)
        stage.reads.note((*path, name), child)
        return Child(child, stage, (*path, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, stage, path = self.__dict__["_kernelwise"]
        if type(module) is nn.Sequential and not has_hooks(module):
            (value,) = args
            for child in self:
                value = child(value)
            return value
        if is_function(module):
            return self._inner().forward(*args, **kwargs)
        tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
        if len(tensors) != 1 or len(args) != 1 or kwargs:
            raise Untraceable(f"it calls its child {'.'.join(path)} with more than one tensor")
        return stage.recorder.call(Source("child", ".".join(path)), args, self._result(args[0]))

    def _result(self, x: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the shape that the child gives. Only a shape: what the child computes stays unknown."""
        module, path = self.__dict__["_kernelwise"][0], self.__dict__["_kernelwise"][2]
        stage: Stage = self.__dict__["_kernelwise"][1]
        wide_in, wide_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(wide_in, int) and isinstance(wide_out, int):
            stage.reads.note((*path, "in_features"), wide_in)
            stage.reads.note((*path, "out_features"), wide_out)
            if x.shape[-1] != wide_in:
                raise Untraceable(f"its child {'.'.join(path)} takes {wide_in} features, not {x.shape[-1]}")
            return stage.fake((*x.shape[:-1], wide_out), stage.widths.leaves or x.dtype)
        inner = Stage(Recorder(), stage.mode, stage.widths, training=False)
        stand_in = make_stand_in(module, inner)
        given = inner.recorder.input(stage.fake(tuple(x.shape), x.dtype), Source("argument", "x"))
        stage.recorder.paused = True
        try:
            result = _run(inner, functools.partial(type(module).forward, stand_in), (given,), {})
        finally:
            stage.recorder.paused = False
            for key, value in inner.reads.tokens.items():
                stage.reads.tokens.setdefault((*path, *key), value)
        if not isinstance(result, torch.Tensor):
            raise Untraceable(f"its child {'.'.join(path)} gives no single tensor")
        return stage.fake(tuple(result.shape), stage.widths.leaves or x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------------------------------


def trace(stage: Stage, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Return the canonical graph of `function(*args, **kwargs)`. Raises `Untraceable`.

    Tensors among the arguments must have been made inputs of the stage's recorder.
    """
    return stage.recorder.finish(_run(stage, function, args, kwargs))


def _run(stage: Stage, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    default = torch.get_default_dtype()
    try:
        with (
            _quiet(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.amp.autocast("cpu", enabled=False),
            stage.mode,
            stage.recorder,
        ):
            return function(*args, **kwargs)
    except Untraceable:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise Untraceable("its control flow or its shapes depend on data") from None
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        raise Untraceable(f"it does not run on tensors without data ({type(error).__name__}: {line[:120]})") from None
    finally:
        if torch.get_default_dtype() != default:
            torch.set_default_dtype(default)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch from logging shapes that do not fit: trying them is how a width is found."""
    logger = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    thread = threading.get_ident()

    def other_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(other_thread)
    try:
        yield
    finally:
        logger.removeFilter(other_thread)


def innermost_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the function under every hook: what the module itself computes, `self` first.

    Raises `Untraceable` where somebody has put another forward on the instance.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return type(module).forward
    if "_hf_hook" in module.__dict__:  # accelerate keeps the forward that its hook is around here
        forward = module.__dict__.get("_old_forward", forward)
    if is_own_code(module, forward):
        return type(module).forward
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return forward.__func__
    raise Untraceable("its forward was replaced on this instance")


def is_own_code(module: nn.Module, forward: object) -> bool:
    """Whether a forward on an instance stands for its class's: it runs a kernel of ours, or it is the class's, bound.

    The `kernels` library leaves the latter on every layer that it looks at, also where it replaces nothing.
    """
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    # The mark is the function itself: decorators that copy attributes to wrappers copy a mark that is not theirs.
    own = (getattr(forward.__func__, "__kernelwise__", None), type(module).forward)
    return any(function is forward.__func__ for function in own)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function by name, without those that need not be given and that its code never reads."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    parameters = dict(inspect.signature(function).parameters)
    if code is None:
        return parameters
    given = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in _STARRED}
    return {name: p for name, p in parameters.items() if name in given or name in _names_read(code)}


_STARRED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


@functools.lru_cache(maxsize=4096)
def _names_read(code: types.CodeType) -> frozenset[str]:
    read: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD", "STORE_FAST_LOAD")):
            read.update(instruction.argval if isinstance(instruction.argval, tuple) else (str(instruction.argval),))
    return frozenset(read)
