"""Stand-ins: objects on which a forward can run without the module it belongs to.

A stand-in is an object of a throw-away subclass of the module's class that holds fake tensors in place of parameters,
copies of plain attributes and leaves in place of child modules. It notes which attributes the forward reads. Nothing of
the user's module is called or written.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._subclasses.fake_tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from kernelwise._recognize._objects import AS_AN_OBJECT, Dict, List, plain, refuses
from kernelwise._recognize._reads import CODE, MISSING, OF_THE_MODULE, PLAIN, Reads, has_hooks, is_function, is_own_code
from kernelwise._recognize._record import Failed, Recorder, Refused, Source, Untraceable, Widths, no_way_back
from kernelwise._recognize._sizes import Watch


@dataclass(slots=True)
class Stage:
    """Everything one trace shares: the recorder, the fake mode, dtypes, what is read, and what is replaced.

    `overrides` replaces plain attributes of the module by name, to see what depends on them. `call_child` answers a call
    of a child module at a path, or leaves it to the stand-in with NotImplemented. `watch` notes what is decided by sizes.
    """

    recorder: Recorder
    mode: FakeTensorMode
    widths: Widths
    training: bool | None = None
    reads: Reads = field(default_factory=Reads)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    call_child: Callable[[Child, nn.Module, tuple[str, ...], tuple[Any, ...], dict[str, Any]], Any] | None = None
    watch: Watch | None = None

    def fake(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of this shape; one that can have a gradient does."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


class _MissingError(AttributeError):
    """An attribute that the module does not have either."""


class _StandIn:
    """Mixed in before the module's class: answers every attribute from the module's metadata."""

    def __init_subclass__(cls) -> None:
        """Keep the module's own `__init_subclass__` from hearing of a class that is thrown away."""

    def __getattribute__(self, name: str) -> Any:
        d = object.__getattribute__(self, "__dict__")
        view = d.get("_kernelwise_view")
        if view is None:
            return object.__getattribute__(self, name)
        if name == "__dict__":
            raise Untraceable("it looks into its own __dict__")
        if name == "__class__":
            return view.module_class
        return view.get(self, name)

    def __getattr__(self, name: str) -> Any:  # not that of nn.Module, which looks into __dict__
        raise _MissingError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __repr__(self) -> str:  # messages of exceptions name the module
        return type(self).__name__

    def __eq__(self, other: object) -> bool:
        raise Untraceable("it compares itself with something, or looks for itself somewhere")

    def __hash__(self) -> int:
        raise Untraceable("it takes itself as a key")

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
        self.module_class = type(module)

    def get(self, stand_in: Any, name: str) -> Any:
        """Return what `self.<name>` is, and note that it was read."""
        if name in self._made:
            return self._made[name]
        d = self._module.__dict__
        on_class = _on_class(type(self._module), name)
        if on_class is not None and hasattr(type(on_class), "__set__") and hasattr(type(on_class), "__get__"):
            if isinstance(on_class, property):
                self._stage.reads.note((*self._path, name), on_class)
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
            self._stage.reads.tokens[path] = OF_THE_MODULE
        else:
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
    if isinstance(value, (*PLAIN, *CODE)):
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            raise Untraceable(f"it calls a method of another module ({'.'.join(path)})")
        return value
    # A subclass of a list or a dict may have attributes, and answers of its own: only those may be read.
    if type(value) in (tuple, list):
        kind = List if type(value) is list else tuple
        return kind(stand_in_for(item, stage, (*path, str(i))) for i, item in enumerate(value))
    if type(value) is dict:
        return Dict({key: stand_in_for(item, stage, (*path, str(key))) for key, item in value.items()})
    return plain(value, stage, path, stand_in_for)


def make_stand_in(module: nn.Module, stage: Stage, path: tuple[str, ...] = ()) -> Any:
    """An object of the module's class (for `isinstance`, methods and `super()`) that shares nothing with the module."""
    cls = type(module)
    if cls.__getattribute__ is not object.__getattribute__:
        raise Untraceable(f"{cls.__name__} has a __getattribute__ of its own")
    subclass = type.__new__(type(cls), cls.__name__, (_StandIn, cls), {})
    stand_in = object.__new__(subclass)
    object.__getattribute__(stand_in, "__dict__")["_kernelwise_view"] = View(module, stage, path)
    return stand_in


@refuses(*AS_AN_OBJECT)  # one module may stand at two places, which have a stand-in each
class Child:
    """Stands for a child module: a leaf, or its own code where it is nothing but a function.

    A child without parameters, buffers and hooks is such a function (an activation); containers are looked into. Every
    other child is a call to something unknown.
    """

    def __init__(self, module: nn.Module, stage: Stage, path: tuple[str, ...]) -> None:
        self.__dict__["_kernelwise"] = (module, stage, path)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        module, stage, path = self.__dict__["_kernelwise"]
        if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] not in ("torch", "kernelwise"):
            stage.reads.ask((*path, "__class__"), type(module))
        return type(module)

    def _inner(self) -> Any:
        d = self.__dict__
        if "_inner_stand_in" not in d:
            module, stage, path = d["_kernelwise"]
            d["_inner_stand_in"] = make_stand_in(module, stage, path)
        return d["_inner_stand_in"]

    def __getattr__(self, name: str) -> Any:
        _, stage, path = self.__dict__["_kernelwise"]
        stage.reads.asked.add((*path, name))
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
        if stage.call_child is not None:
            answer = stage.call_child(self, module, path, args, kwargs)
            if answer is not NotImplemented:
                return answer
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
        return stage.recorder.call(Source("child", ".".join(path)), args, self.result(args[0]))

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the shape that the child gives. Only a shape: what the child computes stays unknown."""
        module, path = self.__dict__["_kernelwise"][0], self.__dict__["_kernelwise"][2]
        stage: Stage = self.__dict__["_kernelwise"][1]
        wide_in, wide_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(wide_in, int) and isinstance(wide_out, int):
            stage.reads.note((*path, "in_features"), wide_in)
            stage.reads.note((*path, "out_features"), wide_out)
            if x.shape[-1] != wide_in:
                raise Failed(f"its child {'.'.join(path)} takes {wide_in} features, not {x.shape[-1]}")
            return stage.fake((*x.shape[:-1], wide_out), stage.widths.given_by(".".join(path), x))
        inner = Stage(Recorder(), stage.mode, stage.widths, training=False)
        stand_in = make_stand_in(module, inner)
        given = inner.recorder.input(stage.fake(tuple(x.shape), x.dtype), Source("argument", "x"))
        stage.recorder.paused = True
        watch = stage.watch or Watch({})
        watch.paused = True
        try:
            result = run(inner, functools.partial(type(module).forward, stand_in), (given,), {})
        finally:
            stage.recorder.paused = watch.paused = False
            for key, value in inner.reads.tokens.items():
                if value is not OF_THE_MODULE:  # its mode is its own: the call of a leaf stays a call
                    stage.reads.tokens.setdefault((*path, *key), value)
        if not isinstance(result, torch.Tensor):
            raise Untraceable(f"its child {'.'.join(path)} gives no single tensor")
        return stage.fake(tuple(result.shape), stage.widths.given_by(".".join(path), x))


# Of Python and of PyTorch, where something does not fit; and what they say where only a trace fails: on tensors without
# data, on a write into an input, which may have no gradient otherwise, and on an argument that a layer only hands on.
_PLAIN_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_ONLY_HERE = (
    *("FakeTensor", "fake tensor", "tensor subclass", "data pointer", "in-place operation"),
    *("'Given'", "not Given", "(Given", ", Given"),
)


class _WithoutAutocast(TorchFunctionMode):
    """Refuses what a forward computes under an autocast of its own: where operations are recorded, it is over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Untraceable("it computes something under autocast")
        return func(*args, **(kwargs or {}))


def run(stage: Stage, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    default = torch.get_default_dtype()
    try:
        with (
            _quiet(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.amp.autocast("cpu", enabled=False),
            torch.amp.autocast("cuda", enabled=False),
            _WithoutAutocast(),
            stage.mode,
            stage.recorder,
            stage.watch or contextlib.nullcontext(),
            no_way_back(),
        ):
            return function(*args, **kwargs)
    except Untraceable:
        raise
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        if _says_no(error):
            raise Refused(f"it raises {type(error).__name__}: {line[:120]}") from None
        only_here = not isinstance(error, _PLAIN_ERRORS) or any(words in str(error) for words in _ONLY_HERE)
        kind = Untraceable if only_here else Failed
        raise kind(f"it does not run on tensors without data ({type(error).__name__}: {line[:120]})") from None
    finally:
        if torch.get_default_dtype() != default:
            torch.set_default_dtype(default)


def _says_no(error: Exception) -> bool:
    """Whether the code that was traced raises on purpose, or lacks an attribute; not PyTorch, and nothing here."""
    if isinstance(error, _MissingError):
        return True
    end = error.__traceback__
    while end is not None and end.tb_next is not None:
        end = end.tb_next
    if end is None or str(end.tb_frame.f_globals.get("__name__")).partition(".")[0] in ("torch", "kernelwise"):
        return False
    return end.tb_frame.f_code.co_code[end.tb_lasti] == dis.opmap["RAISE_VARARGS"]


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
