"""State: what Kernelwise keeps on a module that it changed, which call runs there, and how the module is copied and saved."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernelwise._applying._bind import Call
from kernelwise._applying._join import head_call
from kernelwise._data import Decision, Layer, Plan
from kernelwise._discover import JOINED, OURS, STATE
from kernelwise._errors import ApplyError
from kernelwise._forwards import is_dispatcher, own_forward, rebuild

SLOTS = ("forward", "_old_forward")
"""Where the dispatcher may stand on an instance; see `innermost_slot`."""


class Token:
    """Stands for one kernelization, so that it can be undone apart from others. Copies of a model share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Token:
        return self


@dataclass(slots=True, eq=False)
class Entry:
    """What one kernelization put on one module for one layer: a call per mode (None: the own code there). Not changed.

    `asked` has the modes in which a rule of the user decided; there this entry beats what mere defaults put in.
    """

    token: Token
    layer: Layer
    decisions: tuple[Decision, ...]
    inference: Call | None
    training: Call | None
    asked: frozenset[str] = frozenset()
    fallbacks: Counter[str] | None = None  # calls of a function that fell back; a module's own stand in its state


class ModuleState:
    """What Kernelwise knows about one module. `inference` and `training` are what its forward runs."""

    # A `__dict__` would take 300 bytes: the states of a large model are more than what a processor caches.
    __slots__ = (
        "attributes",
        "entries",
        "fallbacks",
        "found",
        "inference",
        "installed",
        "joined",
        "pins",
        "plans",
        "training",
    )

    inference: Call
    training: Call

    def __init__(self) -> None:
        self.found: Any = None  # the forward that stood on the instance before ours
        self.installed = False  # whether our dispatcher was put on the instance
        self.entries: list[Entry] = []
        self.joined: tuple[Token, ...] = ()  # kernelizations of a model whose head this is, with its loss
        self.plans: dict[Token, Plan] = {}
        self.attributes: dict[str, Any] = {}  # what stood in attributes that `set_attribute` changed
        self.fallbacks: dict[str, int] = {}
        self.pins: dict[str, Any] = {}  # what the recognition of the layer depends on, as it was

    def refresh(self, module: nn.Module) -> None:
        """Choose what runs in each mode: the newest kernelization that speaks of it, else the module's own code."""
        entry = self.entries[0] if len(self.entries) == 1 else None  # by far the most frequent case
        if entry is None or entry.inference is None or entry.training is None:
            inference, training = self._effective(module, "inference"), self._effective(module, "training")
        else:
            inference, training, function = entry.inference, entry.training, entry.layer.function
            if function is not None:
                is_same = inference is training
                inference = rebuilt_around(module, {function: inference})
                training = inference if is_same else rebuilt_around(module, {function: training})
        if self.joined:
            inference, training = _lazy(inference), _lazy(training)
        self.inference, self.training = inference, training

    def chosen(self, function: str | None, mode: str) -> Entry | None:
        """Return the entry that decides a mode: the newest that a rule made, else the newest that defaults made."""
        entries = [entry for entry in reversed(self.entries) if entry.layer.function == function]
        asked = next((entry for entry in entries if mode in entry.asked), None)
        return asked or next((entry for entry in entries if getattr(entry, mode) is not None), None)

    def _effective(self, module: nn.Module, mode: str) -> Call:
        functions = dict.fromkeys(entry.layer.function for entry in self.entries)
        chosen = {function: self.chosen(function, mode) for function in functions}
        calls = {function: getattr(entry, mode) for function, entry in chosen.items() if entry is not None}
        if calls.get(None) is not None:
            return calls[None]  # type: ignore[no-any-return]
        replaced = {name: call for name, call in calls.items() if name is not None and call is not None}
        if replaced:
            return rebuilt_around(module, replaced)
        return _run_class_forward if self.found is None else _run_found_forward

    def run_own(self, module: nn.Module, why: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own code; count `why` unless a graph is being compiled."""
        if why is not None and not torch.compiler.is_compiling():
            self.fallbacks[why] = self.fallbacks.get(why, 0) + 1
        if self.found is None:
            return own_forward(module)(module, *args, **kwargs)
        return self.found(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleState:
        copied = ModuleState()
        copied.found, copied.installed = copy.deepcopy(self.found, memo), self.installed
        copied.entries, copied.plans = list(self.entries), dict(self.plans)
        copied.joined = self.joined
        copied.attributes = copy.deepcopy(self.attributes, memo)
        copied.pins = copy.deepcopy(self.pins, memo)
        copied.inference, copied.training = self.inference, self.training
        return copied


def _run_class_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _run_found_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return getattr(self, STATE).found(*args, **kwargs)


def _lazy(call: Call) -> Call:
    """Return what a head runs that is joined with its loss, where it is known of what function its own call is."""
    if call is _run_class_forward:
        return head_call(call, F.linear)
    kernel: Any = getattr(call, "kernel_function", None)
    return head_call(call, kernel) if getattr(kernel, "__module__", "").startswith("kernelwise.kernels.") else call


# The rebuilt forwards in use, shared by all modules of a class in one kernelization. A rebuilt forward holds its calls, so
# an id in a key is not reused while its value lives.
_rebuilt_forwards: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()


def rebuilt_around(module: nn.Module, functions: dict[str, Call]) -> Call:
    """Return the module's own forward with calls in place of functions that it names.

    Raises:
        ApplyError: it cannot be rebuilt.
    """
    forward = own_forward(module)
    if JOINED in functions:
        called = {name: call for name, call in functions.items() if name != JOINED}
        joined: Call = functions[JOINED](rebuilt_around(module, called) if called else forward)
        return joined
    key = (id(forward), *(part for name, call in sorted(functions.items()) for part in (hash(name), id(call))))
    rebuilt = _rebuilt_forwards.get(key)
    if rebuilt is None:
        rebuilt = rebuild(forward, functions)
        if rebuilt is None:
            names = ", ".join(sorted(functions))
            raise ApplyError(
                f"the forward of {type(module).__name__} cannot be rebuilt around {names}\n"
                "  tried      a copy of it with globals of its own, with its decorators copied around it\n"
                '  go on      keep the own code there ("none")'
            )
        _rebuilt_forwards[key] = rebuilt
    return rebuilt


def state_of(module: nn.Module) -> ModuleState:
    """Return the module's state, putting one on it first where there is none."""
    held = module.__dict__
    state: ModuleState | None = held.get(STATE)
    if state is None:
        state = ModuleState()
        state.inference = state.training = _run_class_forward
        held[STATE] = state
        held["__reduce_ex__"] = MethodType(_reduce_clean, module)
        held["__deepcopy__"] = MethodType(_deepcopy, module)
        held["_replicate_for_data_parallel"] = MethodType(_replicate, module)
    return state


def entries_of(model: nn.Module) -> list[tuple[nn.Module, Entry]]:
    """Return every entry on a model's modules, in module order."""
    return [
        (module, entry)
        for module in model.modules()
        if STATE in module.__dict__
        for entry in module.__dict__[STATE].entries
    ]


def _reduce_clean(self: nn.Module, protocol: int) -> Any:
    """Pickle the module as it was found, so that the file loads without Kernelwise and runs the model's own code."""
    reduced: Any = type(self).__reduce_ex__(self, protocol)
    if not (isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict)):
        return reduced
    kept = {key: value for key, value in reduced[2].items() if key not in OURS} | getattr(self, STATE).attributes
    found = getattr(self, STATE).found
    for slot in SLOTS:
        if is_dispatcher(kept.get(slot)):
            if found is None:
                del kept[slot]
            else:
                kept[slot] = found
    return (*reduced[:2], kept, *reduced[3:])


def _replicate(self: nn.Module) -> nn.Module:
    """Replicate for `nn.DataParallel`: the replica's bound methods are its own, so that they read its weights."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
    for name, value in replica.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is self:
            replica.__dict__[name] = MethodType(value.__func__, replica)
    return replica


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module with its kernels: bound methods follow to the copy, the state is copied with fresh counts."""
    of_class = getattr(type(self), "__deepcopy__", None)
    if of_class is not None:
        return of_class(self, memo)  # type: ignore[no-any-return]
    reduced: Any = type(self).__reduce_ex__(self, 4)
    make, args, attributes = reduced[:3]
    copied: nn.Module = make(*args)
    memo[id(self)] = copied
    copied.__setstate__(copy.deepcopy(attributes, memo))  # type: ignore[no-untyped-call]
    return copied
